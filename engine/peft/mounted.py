"""Modules of the backbone that adapters can be mounted on, wrapped once at load: tasks attach and detach between
microbatches.

Legend: T tokens of the packed stream, L tokens of one span, K inputs, N outputs.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.kernels.multi_lora import multi_lora
from engine.methods import Site, SiteKind
from engine.peft.adapter import Adapter, BaseOp
from engine.peft.layout import Layout, TaskSpan

Uses = Sequence[tuple[TaskSpan, Adapter]]


class MountedLinear(nn.Module):
    """A frozen nn.Linear or Conv1D that runs the resident tasks' adapters on their own spans.

    Keeps the names `weight` and `bias`, so that the backbone's state dict does not change.
    """

    def __init__(self, base: nn.Linear | Conv1D, name: str, index: int, layout: Layout) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        is_conv1d = isinstance(base, Conv1D)
        weight_KN = (base.weight if is_conv1d else base.weight.T).detach()
        bias_N = None if base.bias is None else base.bias.detach()
        num_in, num_out = weight_KN.shape
        site = Site(name, num_in, num_out, SiteKind.LINEAR, bias_N is not None)
        self.op = BaseOp(site, index, base, weight_KN, bias_N, is_conv1d)
        self.in_features, self.out_features = self.op.in_features, self.op.out_features
        self.layout = layout
        self.adapters: dict[str, Adapter] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TK = x.reshape(-1, x.shape[-1])
        uses = self.layout.uses(self.adapters)
        return self._adapted(x_TK, uses).view(*x.shape[:-1], -1) if uses else self._plain(x)

    def _adapted(self, x_TK: torch.Tensor, uses: Uses) -> torch.Tensor:
        """Dispatch, the operator with every low-rank addition in one kernel, aggregate."""
        training = self.layout.training
        before = [use for use in uses if use[1].rewrites_input]
        x_TK = rewrite(x_TK, before, lambda x_LK, span, adapter: adapter.before(x_LK, span, training))
        pairs = [pair for span, adapter in uses if (pair := adapter.low_rank(span, training)) is not None]
        factors = [factor for _, a_RK, b_NR in pairs for factor in (a_RK, b_NR)]
        if pairs:
            y_TN = multi_lora(x_TK, self.op.weight_KN, self.op.bias_N, [use for use, _, _ in pairs], factors)
        else:
            y_TN = self._plain(x_TK)
        after = [use for use in uses if use[1].rewrites_output]
        return rewrite(
            y_TN, after, lambda y_LN, span, adapter: adapter.after(x_TK[span.start : span.end], y_LN, span, training)
        )

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        if self.op.bias_N is None:
            return x @ self.op.weight_KN
        return torch.addmm(self.op.bias_N, x.reshape(-1, x.shape[-1]), self.op.weight_KN).view(*x.shape[:-1], -1)


class MountedNorm:
    """A frozen norm whose output is rewritten on the spans of tasks that train their own copy of its vectors."""

    def __init__(self, base: nn.Module, name: str, index: int, layout: Layout) -> None:
        weight: Any = base.weight
        bias = getattr(base, "bias", None)
        site = Site(name, len(weight), len(weight), SiteKind.NORM, bias is not None)
        self.op = BaseOp(site, index, base, weight.detach(), None if bias is None else bias.detach())
        self.layout = layout
        self.adapters: dict[str, Adapter] = {}
        base.register_forward_hook(self._rewrite)

    def _rewrite(self, module: nn.Module, args: tuple[torch.Tensor], y_1TN: torch.Tensor) -> torch.Tensor | None:
        uses = self.layout.uses(self.adapters)
        if not uses:
            return None
        x_TN, training = args[0].flatten(0, 1), self.layout.training
        y_TN = rewrite(
            y_1TN.flatten(0, 1),
            uses,
            lambda y, span, adapter: adapter.after(x_TN[span.start : span.end], y, span, training),
        )
        return y_TN.view(y_1TN.shape)


Mounted = MountedLinear | MountedNorm


def rewrite(
    stream_TN: torch.Tensor, uses: Uses, change: Callable[[torch.Tensor, TaskSpan, Adapter], torch.Tensor]
) -> torch.Tensor:
    """The stream with each use's span changed. Split and cat, whose gradients are views and one copy."""
    if not uses:
        return stream_TN
    bounds = [0, *(bound for span, _ in uses for bound in (span.start, span.end)), len(stream_TN)]
    pieces = list(torch.split(stream_TN, [b - a for a, b in itertools.pairwise(bounds)]))
    for i, (span, adapter) in enumerate(uses):
        pieces[2 * i + 1] = change(pieces[2 * i + 1], span, adapter).to(stream_TN.dtype)
    return torch.cat(pieces)


def mount_linears(model: Any, layout: Layout) -> dict[str, MountedLinear]:
    """Wraps every linear operator of `model` but its output head; returns them by full name, in order."""
    head = model.get_output_embeddings()
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    mounted: dict[str, MountedLinear] = {}
    for index, (name, module) in enumerate(found):
        parent, _, last = name.rpartition(".")
        mounted[name] = MountedLinear(module, name, index, layout)
        setattr(model.get_submodule(parent), last, mounted[name])
    return mounted


def mount_norms(model: Any, layout: Layout) -> dict[str, MountedNorm]:
    """Hooks every norm of `model`: a module so called, whose weight is a vector."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if (isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("Norm"))
        and getattr(getattr(module, "weight", None), "ndim", 0) == 1
    ]
    return {name: MountedNorm(module, name, index, layout) for index, (name, module) in enumerate(found)}
