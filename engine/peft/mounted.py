"""An adaptable operator of the backbone, wrapped once at load: tasks attach and detach between microbatches.

Legend: T tokens of the packed stream, K inputs, N outputs.
"""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.peft.adapter import Adapter, BaseOp
from engine.peft.layout import Layout


class MountedLinear(nn.Module):
    """A frozen nn.Linear or Conv1D that adds the resident tasks' adapters on their own spans.

    Keeps the names `weight` and `bias`, so that the backbone's state dict does not change.
    """

    def __init__(self, base: nn.Linear | Conv1D, name: str, site: int, layout: Layout) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        is_conv1d = isinstance(base, Conv1D)
        weight_KN = base.weight if is_conv1d else base.weight.T
        self.op = BaseOp(name, site, weight_KN.detach(), None if base.bias is None else base.bias.detach(), is_conv1d)
        self.in_features, self.out_features = self.op.in_features, self.op.out_features
        self.layout = layout
        self.adapters: dict[str, Adapter] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        uses = [(span, self.adapters[span.task]) for span in self.layout.spans if span.task in self.adapters]
        if not uses:
            return x @ self.op.weight_KN if self.op.bias_N is None else self._with_bias(x)
        x_TK = x.reshape(-1, x.shape[-1])
        method = type(uses[0][1])  # one method today; with more, each aggregates in turn
        return method.aggregate(self.op, x_TK, uses, self.layout.training).view(*x.shape[:-1], -1)

    def _with_bias(self, x: torch.Tensor) -> torch.Tensor:
        assert self.op.bias_N is not None
        return torch.addmm(self.op.bias_N, x.reshape(-1, x.shape[-1]), self.op.weight_KN).view(*x.shape[:-1], -1)


def mount_all(model: Any, layout: Layout) -> dict[str, MountedLinear]:
    """Wraps every linear operator of `model` but its output head; returns them by full name, in order."""
    head = model.get_output_embeddings()
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    mounted: dict[str, MountedLinear] = {}
    for site, (name, module) in enumerate(found):
        parent, _, last = name.rpartition(".")
        mounted[name] = MountedLinear(module, name, site, layout)
        setattr(model.get_submodule(parent), last, mounted[name])
    return mounted
