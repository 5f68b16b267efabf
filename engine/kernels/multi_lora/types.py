"""The arguments of multi_lora: linear operators that read one stream, and the low-rank adapters that tasks use on them.

A use is one task's adapter of one operator, on the task's own tokens of the stream.
Legend: T tokens, K inputs, N outputs, R rank, L tokens of one adapter slice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.kernels.constants import MAX_OPERATORS
from engine.kernels.packed_weight import PackedWeight


@dataclass(frozen=True)
class AdapterSlice:
    """One task's adapter on tokens [start, end) of the stream. `keep_mask` makes its dropout mask [L, K], if any."""

    start: int
    end: int
    scale: float
    keep_mask: Callable[[], torch.Tensor] | None = None
    keep_scale: float = 1.0


class LowRank(NamedTuple):
    """The factors of one use. Each gets a gradient if it requires one."""

    a_RK: torch.Tensor
    b_NR: torch.Tensor
    shrink_gain_R: torch.Tensor | None = None  # d
    expand_gain_N: torch.Tensor | None = None  # g


class Operator(NamedTuple):
    """One linear operator of a group, with its adapters: `factors` holds one LowRank for each of `uses`, in order.

    `packed`: W packed for a CPU.
    """

    weight_KN: torch.Tensor
    bias_N: torch.Tensor | None
    uses: Sequence[AdapterSlice]
    factors: Sequence[LowRank]
    packed: PackedWeight | None = None

    def base(self, x_TK: torch.Tensor) -> torch.Tensor:
        """Return X W + b."""
        if self.packed is not None:
            return self.packed.times(x_TK, self.bias_N)
        return x_TK @ self.weight_KN if self.bias_N is None else torch.addmm(self.bias_N, x_TK, self.weight_KN)

    def gradient(self, dy_TN: torch.Tensor, dx_TK: torch.Tensor | None) -> torch.Tensor:
        """Return dY W^T, added to dX in place if there is one."""
        if self.packed is not None:
            return self.packed.gradient(dy_TN, dx_TK)
        return dy_TN @ self.weight_KN.T if dx_TK is None else dx_TK.addmm_(dy_TN, self.weight_KN.T)


def check(x_TK: torch.Tensor, operators: Sequence[Operator]) -> None:
    """Raise ValueError if the group's shapes or ranges do not fit."""
    if not 1 <= len(operators) <= MAX_OPERATORS:
        raise ValueError(f"a group must have 1 to {MAX_OPERATORS} operators, got {len(operators)}")
    for operator in operators:
        _check_shapes(x_TK, operator)
        _check_ranges([(use.start, use.end) for use in operator.uses], len(x_TK))
    _check_ranges(list({(use.start, use.end) for operator in operators for use in operator.uses}), len(x_TK))


def _check_shapes(x_TK: torch.Tensor, operator: Operator) -> None:
    weight_KN, bias_N, uses, factors, _ = operator
    width_in, width_out = weight_KN.shape
    if width_in != x_TK.shape[1]:
        raise ValueError(f"weight_KN has {width_in} rows, x_TK {x_TK.shape[1]} columns")
    if bias_N is not None and bias_N.shape != (width_out,):
        raise ValueError(f"bias_N {tuple(bias_N.shape)} does not fit W {tuple(weight_KN.shape)}")
    if len(factors) != len(uses):
        raise ValueError(f"{len(uses)} uses need as many factors, got {len(factors)}")
    for a_RK, b_NR, d_R, g_N in factors:
        if a_RK.shape[1] != width_in or b_NR.shape != (width_out, a_RK.shape[0]):
            raise ValueError(f"A {tuple(a_RK.shape)} and B {tuple(b_NR.shape)} do not fit W {tuple(weight_KN.shape)}")
        for gain, rows in ((d_R, b_NR.T), (g_N, b_NR)):
            if gain is not None and gain.shape != rows.shape[:1]:
                raise ValueError(f"gain {tuple(gain.shape)} does not fit A {tuple(a_RK.shape)}, B {tuple(b_NR.shape)}")


def _check_ranges(ranges: Sequence[tuple[int, int]], num_tokens: int) -> None:
    last = 0
    for start, end in sorted(ranges):
        if not last <= start <= end <= num_tokens:
            raise ValueError(
                f"use [{start}, {end}) exceeds the {num_tokens} tokens, or overlaps another without being equal to it"
            )
        last = end
