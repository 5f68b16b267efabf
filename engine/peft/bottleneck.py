"""Bottleneck adapters (arXiv 1902.00751, 2005.00247, 2110.04366): y += scale * (act(h D^T + d) U^T + u).

h is the operator's output y (serial) or its input x (parallel). PEFT has no such method: docs/ADAPTERS.md defines the
file format. Legend: T tokens of the stream, L of one span, K inputs, N outputs, S bottleneck.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from engine.kernels.grouped_gemm import grouped_gemm
from engine.methods import Activation, Bottleneck, BottleneckPlacement
from engine.peft.adapter import Adapter, BaseOp
from engine.peft.layout import TaskSpan
from engine.peft.seeded_init import uniform_

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.RELU: functional.relu,
    Activation.GELU: functional.gelu,
    Activation.SILU: functional.silu,
    Activation.TANH: torch.tanh,
}


class BottleneckAdapter(Adapter):
    """The weights D [S, K or N], U [N, S] and biases d [S], u [N] of one task at one operator or sublayer."""

    method: Bottleneck

    def initialise(self) -> None:
        """Initialise D and d as nn.Linear does, U and u to zero, so that the task starts as the backbone."""
        bound = 1 / math.sqrt(self.tensors["down_weight"].shape[1])
        for name in ("down_weight", "down_bias"):
            uniform_(self.tensors[name], bound, self.seed, f"{self.op.name}/{name}")
        self.tensors["up_weight"].zero_()
        self.tensors["up_bias"].zero_()

    def changes_output(self, training: bool) -> bool:
        return True

    @classmethod
    def change_outputs(
        cls,
        uses: Sequence[tuple[TaskSpan, "BottleneckAdapter"]],
        x_TK: torch.Tensor,
        ys: Sequence[torch.Tensor],
        training: bool,
    ) -> Sequence[torch.Tensor]:
        """Compute two grouped products for each pair of activation and placement among the tasks."""
        kinds = [(adapter.method.activation, adapter.method.placement) for _, adapter in uses]
        changed = list(ys)
        for kind in dict.fromkeys(kinds):
            at = [i for i, kind_of_use in enumerate(kinds) if kind_of_use == kind]
            outputs = _outputs([uses[i] for i in at], x_TK, [ys[i] for i in at], *kind)
            for i, output_LN in zip(at, outputs, strict=True):
                changed[i] = output_LN
        return changed

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


def _outputs(
    uses: Sequence[tuple[TaskSpan, BottleneckAdapter]],
    x_TK: torch.Tensor,
    ys: Sequence[torch.Tensor],
    activation: Activation,
    placement: BottleneckPlacement,
) -> tuple[torch.Tensor, ...]:
    """Return the outputs [L, N] of adapters that have the same activation and placement."""
    adapters, num_tokens, ones = [adapter for _, adapter in uses], [len(y_LN) for y_LN in ys], [1.0] * len(uses)
    down, down_bias, up, up_bias = (
        [adapter.tensors[name] for adapter in adapters] for name in ("down_weight", "down_bias", "up_weight", "up_bias")
    )
    y = torch.cat([y_LN.flatten() for y_LN in ys])  # copies: a saved view would keep the whole stream alive
    is_serial = placement is BottleneckPlacement.SERIAL
    h = y if is_serial else torch.cat([x_TK[span.start : span.end].flatten() for span, _ in uses])
    s = _ACTIVATIONS[activation](grouped_gemm(h, num_tokens, down, down_bias, ones))
    y = y + grouped_gemm(s, num_tokens, up, up_bias, [adapter.method.scale for adapter in adapters])
    return torch.split(y.view(-1, ys[0].shape[1]), num_tokens)


ADAPTER = BottleneckAdapter
