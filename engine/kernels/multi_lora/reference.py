"""multi_lora in torch: the reference of the CUDA kernels, and the path of a CPU.

`dispatch` has the equations. Legend: T tokens, K inputs, N outputs, R rank, L tokens of one adapter slice.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from engine.kernels.multi_lora.types import AdapterSlice, LowRank, Operator

_FIRST_FACTOR = 2  # arguments of MultiLora.forward before them
_NUM_FACTORS = len(LowRank._fields)


class MultiLora(torch.autograd.Function):
    """The autograd function of a group. Backward saves S of each use, and X if an A is trained."""

    @staticmethod
    def forward(
        ctx: Any, x_TK: torch.Tensor, operators: tuple[Operator, ...], *flat: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        results, shrunk = [], []
        for operator, factors in zip(operators, _by_operator(operators, flat), strict=True):
            y_TN = operator.base(x_TK)
            shrunk += [_add(x_TK, y_TN, use, low_rank) for use, low_rank in zip(operator.uses, factors, strict=True)]
            results.append(y_TN)
        ctx.operators = operators
        trains_a = any(ctx.needs_input_grad[_FIRST_FACTOR::_NUM_FACTORS])
        ctx.save_for_backward(x_TK if trains_a else None, *flat, *shrunk)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[Any, ...]:
        operators: tuple[Operator, ...] = ctx.operators
        x_TK, *rest = ctx.saved_tensors
        num_flat = _NUM_FACTORS * sum(len(operator.uses) for operator in operators)
        factors, shrunk = _by_operator(operators, rest[:num_flat]), iter(rest[num_flat:])
        needed = _by_operator(operators, ctx.needs_input_grad[_FIRST_FACTOR:])
        dx_TK = _of_base(operators, grad_outputs) if ctx.needs_input_grad[0] else None
        grads: list[torch.Tensor | None] = []
        for operator, dy_TN, low_ranks, needs in zip(operators, grad_outputs, factors, needed, strict=True):
            for use, low_rank, needs_of in zip(operator.uses, low_ranks, needs, strict=True):
                s_LR = next(shrunk)
                grads += _backward_of(x_TK, dy_TN, dx_TK, s_LR, use, low_rank, needs_of)
        return dx_TK, None, *grads


def _add(x_TK: torch.Tensor, y_TN: torch.Tensor, use: AdapterSlice, low_rank: LowRank) -> torch.Tensor:
    """Add the low-rank product to Y[u]. Return S."""
    a_RK, b_NR, d_R, g_N = _cast(low_rank, x_TK.dtype)
    s_LR: torch.Tensor = _masked(x_TK[use.start : use.end], _mask(use), use) @ a_RK.T
    y_LN, gained_LR = y_TN[use.start : use.end], _gained(s_LR, d_R)
    if g_N is None:
        y_LN.addmm_(gained_LR, b_NR.T, alpha=use.scale)
    else:
        y_LN.addcmul_(gained_LR @ b_NR.T, g_N, value=use.scale)
    return s_LR


def _of_base(operators: Sequence[Operator], dys: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Return dX [T, K] of the operators without their adapters."""
    dx_TK: torch.Tensor | None = None
    for operator, dy_TN in zip(operators, dys, strict=True):
        dx_TK = dx_TK if dy_TN is None else operator.gradient(dy_TN, dx_TK)
    return dx_TK


def _backward_of(
    x_TK: torch.Tensor | None,
    dy_TN: torch.Tensor | None,
    dx_TK: torch.Tensor | None,
    s_LR: torch.Tensor,
    use: AdapterSlice,
    low_rank: LowRank,
    needs: Any,
) -> list[Any]:
    """Return the gradients of one use's factors, and add its part of dX. Without a dY all are None."""
    if dy_TN is None:
        return [None] * _NUM_FACTORS
    part = slice(use.start, use.end)
    ds_LR, grads = _gradients(dy_TN[part], s_LR, low_rank, use, needs)
    mask_LK = _mask(use) if needs.a_RK or dx_TK is not None else None
    if needs.a_RK:
        assert x_TK is not None
        grads = grads._replace(a_RK=ds_LR.T @ _masked(x_TK[part], mask_LK, use))
    if dx_TK is not None:
        _add_masked_(dx_TK[part], ds_LR, low_rank.a_RK.to(dy_TN.dtype), mask_LK, use)
    return [None if g is None or f is None else g.to(f.dtype) for g, f in zip(grads, low_rank, strict=True)]


def _gradients(
    dy_LN: torch.Tensor, s_LR: torch.Tensor, low_rank: LowRank, use: AdapterSlice, needs: Any
) -> tuple[torch.Tensor, Any]:
    """Return (gradient of S, gradients of B, d and g if needed, without that of A)."""
    _, b_NR, d_R, g_N = _cast(low_rank, dy_LN.dtype)
    gained_LN, gained_LR = _gained(dy_LN, g_N), _gained(s_LR, d_R)
    e_LR = (gained_LN @ b_NR).mul_(use.scale)
    db_NR = (gained_LN.T @ gained_LR).mul_(use.scale) if needs.b_NR else None
    dd_R = (e_LR * s_LR).sum(dim=0) if needs.shrink_gain_R else None
    dg_N = (b_NR * (dy_LN.T @ gained_LR)).sum(dim=1).mul_(use.scale) if needs.expand_gain_N else None
    return _gained(e_LR, d_R), LowRank(None, db_NR, dd_R, dg_N)  # type: ignore[arg-type]


def _by_operator(operators: Sequence[Operator], flat: Sequence[Any]) -> list[list[Any]]:
    """Return the flat factors as LowRanks, one list for each operator."""
    each: Iterator[LowRank] = (LowRank(*flat[i : i + _NUM_FACTORS]) for i in range(0, len(flat), _NUM_FACTORS))
    return [[next(each) for _ in operator.uses] for operator in operators]


def _cast(low_rank: LowRank, dtype: torch.dtype) -> list[Any]:
    return [None if factor is None else factor.to(dtype) for factor in low_rank]


def _gained(rows: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    return rows if gain is None else rows * gain


def _mask(use: AdapterSlice) -> torch.Tensor | None:
    return None if use.keep_mask is None else use.keep_mask()


def _masked(x_LK: torch.Tensor, mask_LK: torch.Tensor | None, use: AdapterSlice) -> torch.Tensor:
    return x_LK if mask_LK is None else torch.where(mask_LK, x_LK, 0) * use.keep_scale


def _add_masked_(
    dx_LK: torch.Tensor, ds_LR: torch.Tensor, a_RK: torch.Tensor, mask_LK: torch.Tensor | None, use: AdapterSlice
) -> None:
    if mask_LK is None:
        dx_LK.addmm_(ds_LR, a_RK)
    else:
        dx_LK += _masked(ds_LR @ a_RK, mask_LK, use)
