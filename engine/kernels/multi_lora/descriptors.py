"""Describes a group's uses and their factors as structs without addresses.

There are two kinds of rows because they change at different times. Uses follow the microbatch's layout and are the same
for all layers of equal widths. Factors belong to one layer and are the same for all microbatches while the same tasks
run. Each is made once.
Legend: U uses.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.kernels.dropout import DropoutMask
from engine.kernels.multi_lora.structs import FACTORS, USE, Ints, Rows, padded
from engine.kernels.multi_lora.types import AdapterSlice, LowRank, Operator

GRADIENTS = ("da", "db", "dd", "dg")
RequiredGradients = tuple[bool, bool, bool, bool]  # of a use: of A, B, d and g


class GroupUse(NamedTuple):
    """One use in a group: the index of its operator, its slice, and its factors."""

    op: int
    use: AdapterSlice
    low_rank: LowRank


def group_uses(operators: Sequence[Operator]) -> list[GroupUse]:
    return [
        GroupUse(index, use, low_rank)
        for index, operator in enumerate(operators)
        for use, low_rank in zip(operator.uses, operator.factors, strict=True)
    ]


def describe_uses(uses: Sequence[GroupUse], width_in: int, widths_out: Sequence[int]) -> Rows:
    """Describe uses, with the places of required gradients in one buffer; dg needs dB too."""
    rows = np.zeros(len(uses), USE)
    for row, (op, use, low_rank) in zip(rows, uses, strict=True):
        row["start"], row["num_tokens"], row["rank"], row["op"] = use.start, use.end - use.start, len(low_rank.a_RK), op
        if isinstance(use.keep_mask, DropoutMask):
            row["threshold"] = use.keep_mask.threshold
    sizes_U = rows["num_tokens"] * padded(rows["rank"])
    rows["shrunk"] = np.cumsum(sizes_U) - sizes_U
    _lay_out(rows, [required_gradients(use.low_rank) for use in uses], width_in, widths_out)
    return rows


def positions_of(uses: Sequence[GroupUse], num_tokens: int) -> Ints:
    """Return the position of each token in its task's own stream [T]; 0 without dropout."""
    positions_T = np.zeros(num_tokens, np.int64)
    for _, use, _ in uses:
        if isinstance(use.keep_mask, DropoutMask):
            positions_T[use.start : use.end] = use.keep_mask.positions_L
    return positions_T


def required_gradients(low_rank: LowRank) -> RequiredGradients:
    a, b, d, g = (factor is not None and factor.requires_grad for factor in low_rank)
    return a, b, d, g


def _lay_out(rows: Rows, flags_U: Sequence[RequiredGradients], width_in: int, widths_out: Sequence[int]) -> None:
    size = 0
    for row, (a, b, d, g) in zip(rows, flags_U, strict=True):
        rank, width_out = int(row["rank"]), widths_out[row["op"]]
        sizes = (rank * width_in, rank * width_out, rank, width_out)
        for name, num_floats, is_needed in zip(GRADIENTS, sizes, (a, b or g, d, g), strict=True):
            row[name] = size if is_needed else -1
            size += num_floats if is_needed else 0


def num_gradients(rows: Rows, width_in: int, widths_out: Sequence[int]) -> int:
    """Return the number of floats of all gradients."""
    widths_U = np.asarray(widths_out, np.int64)[rows["op"]]
    ranks_U = rows["rank"].astype(np.int64)
    sizes = (ranks_U * width_in, ranks_U * widths_U, ranks_U, widths_U)
    return sum(int(size[rows[name] >= 0].sum()) for name, size in zip(GRADIENTS, sizes, strict=True))


def are_laid_out(uses: Rows, factors: Rows) -> list[bool]:
    """Return for each present factor, a use's A, B, d and g in turn, whether its gradient has a place."""
    is_present = np.stack([factors[name] != 0 for name in ("a", "b", "shrink_gain", "expand_gain")], axis=1)
    flags: list[bool] = (np.stack([uses[name] >= 0 for name in GRADIENTS], axis=1)[is_present]).tolist()
    return flags


def layout_of(factors: Rows) -> Rows:
    """Return the part of described factors that tiles depend on."""
    return factors["is_a_rank_major"]


def num_shrunk(rows: Rows) -> int:
    """Return the number of elements of all shrunk rows S."""
    return int((rows["num_tokens"] * padded(rows["rank"])).sum())


def describe_factors(uses: Sequence[GroupUse]) -> Rows:
    """Describe scales, dropout keys and layouts of factors. A present gain is marked by a 1. Raises ValueError."""
    rows = np.zeros(len(uses), FACTORS)
    for row, (_, use, low_rank) in zip(rows, uses, strict=True):
        row["scale"], row["keep_scale"] = use.scale, use.keep_scale
        row["a"] = row["b"] = 1
        row["shrink_gain"] = low_rank.shrink_gain_R is not None
        row["expand_gain"] = low_rank.expand_gain_N is not None
        row["a_stride"], row["is_a_rank_major"] = _layout(low_rank.a_RK)
        row["b_stride"], row["is_b_rank_major"] = _layout(low_rank.b_NR.T)
        if isinstance(use.keep_mask, DropoutMask):
            row["seed"], row["site"], row["step"] = use.keep_mask.seed % 2**64, use.keep_mask.site, 1
    return rows


def _layout(factor_RW: torch.Tensor) -> tuple[int, bool]:
    """Return (elements from one row of memory to the next, whether such a row is one rank). Raises ValueError."""
    rank_stride, column_stride = factor_RW.stride()
    if column_stride == 1 or factor_RW.shape[1] == 1:
        return rank_stride, True
    if rank_stride == 1 or factor_RW.shape[0] == 1:
        return column_stride, False
    raise ValueError(f"a factor must be contiguous along ranks or columns, got strides {factor_RW.stride()}")


def uses_key(uses: Sequence[GroupUse]) -> tuple[Any, ...]:
    """Return a key that is equal for equal results of `describe_uses`."""
    return tuple(
        (op, use.start, use.end, len(low_rank.a_RK), required_gradients(low_rank), _threshold(use))
        for op, use, low_rank in uses
    )


def _threshold(use: AdapterSlice) -> int | None:
    return use.keep_mask.threshold if isinstance(use.keep_mask, DropoutMask) else None


def factors_key(uses: Sequence[GroupUse]) -> tuple[Any, ...]:
    """Return a key that is equal for equal results of `describe_factors` of the same shapes."""
    return tuple(
        (
            op,
            use.scale,
            use.keep_scale,
            (use.keep_mask.seed, use.keep_mask.site) if isinstance(use.keep_mask, DropoutMask) else None,
            *(
                None if factor is None else (factor.shape, factor.stride(), factor.dtype, factor.device)
                for factor in low_rank
            ),
        )
        for op, use, low_rank in uses
    )


def gaps_of(uses: Rows, num_tokens: int) -> Ints:
    """Return the ranges of tokens [n, 2] that none of these uses covers."""
    ends = {int(use["start"]): int(use["start"] + use["num_tokens"]) for use in uses if use["num_tokens"] > 0}
    gaps, last = [], 0
    for start, end in sorted([*ends.items(), (num_tokens, num_tokens)]):
        if start > last:
            gaps.append((last, start))
        last = end
    return np.array(gaps, np.int64).reshape(-1, 2)
