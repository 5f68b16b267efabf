"""Bottleneck adapters (arXiv 1902.00751, 2005.00247, 2110.04366): y += scale * (act(h D^T + d) U^T + u).

h is the operator's output y (serial) or its input x (parallel). PEFT has no such method: docs/ADAPTERS.md tells the
format. Legend: L tokens of one span, K inputs, N outputs, S bottleneck.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from engine.methods import Activation, Bottleneck, Placement
from engine.peft.adapter import Adapter, BaseOp
from engine.peft.drawing import uniform_
from engine.peft.layout import TaskSpan

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.RELU: functional.relu,
    Activation.GELU: functional.gelu,
    Activation.SILU: functional.silu,
    Activation.TANH: torch.tanh,
}


class BottleneckAdapter(Adapter):
    """D [S, K or N], d [S], U [N, S], u [N] of one task at one operator or sublayer."""

    method: Bottleneck

    def initialise(self) -> None:
        """D and d as nn.Linear's default; U and u zero, so that the task starts as the backbone."""
        bound = 1 / math.sqrt(self.tensors["down_weight"].shape[1])
        for name in ("down_weight", "down_bias"):
            uniform_(self.tensors[name], bound, self.seed, f"{self.op.name}/{name}")
        self.tensors["up_weight"].zero_()
        self.tensors["up_bias"].zero_()

    def after(self, x_LK: torch.Tensor, y_LN: torch.Tensor, span: TaskSpan, training: bool) -> torch.Tensor:
        h = y_LN if self.method.placement is Placement.SERIAL else x_LK.clone()  # kept: not the stream it is part of
        down, down_bias, up, up_bias = (t.to(h.dtype) for t in self.tensors.values())
        s_LS = _ACTIVATIONS[self.method.activation](functional.linear(h, down, down_bias))
        return y_LN + self.method.scale * functional.linear(s_LS, up, up_bias)

    @classmethod
    def config(cls, method: Bottleneck, ops: Sequence[BaseOp], common: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "peft_type": method.peft_type,
            "size": method.size,
            "placement": method.placement.value,
            "activation": method.activation.value,
            "scale": method.scale,
            "target_modules": [op.name for op in ops],
        }


ADAPTER = BottleneckAdapter
