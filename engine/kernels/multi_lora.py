"""Frozen linear operators that read the same X, with the low-rank adapters of many tasks on one packed stream.

For each operator i of the group (q, k and v; gate and up; an operator alone is a group of one):
    Y_i = X W_i + b_i;   for each use u of it:  Y_i[u] += scale_u * g_u o ((d_u o (drop_u(X[u]) A_u^T)) B_u^T)

d [R] and g [N] are learned gains of the two products (VeRA); without them it is LoRA. Backward, with dY_i given and
S = drop(X[u]) A^T:
    E = scale * ((g o dY_i[u]) B);   dX = sum over i of (sum over u of drop'((d o E) A) + dY_i W_i^T);
    dA = (d o E)^T drop(X[u]);   dd = sum(E o S);
    dB = scale * (g o dY_i[u])^T (d o S);   dg = scale * rowsum(B o (dY_i[u]^T (d o S)))
Products are accumulated into dX in place. The backbone's W and b get no gradient, and nothing is saved for one. S is
kept of each use, and X if a use trains its A: where A is frozen (VeRA, MiSS) it is not.

This is the reference and the CPU path; on CUDA, cuda/multi_lora.cu does it (`multi_lora_ops`).
Legend: T tokens, K inputs, N outputs, R rank, L tokens of one use.
Source: LoRA (arXiv 2106.09685), VeRA (arXiv 2310.11454); multi-tenant batching as in Punica (arXiv 2310.18547) and
MuxTune (arXiv 2603.02885).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from engine.kernels.dropout import DropoutMask
from engine.kernels.launch import SUFFIXES
from engine.kernels.packed_weight import PackedWeight


@dataclass(frozen=True)
class LoraUse:
    """One task's adapter on tokens [start, end) of the stream. `mask` makes its dropout mask [L, K], or None."""

    start: int
    end: int
    scale: float
    keep_mask: Callable[[], torch.Tensor] | None = None
    keep_scale: float = 1.0


class LowRank(NamedTuple):
    """What one use multiplies by. Each gets a gradient where it requires one."""

    a_RK: torch.Tensor
    b_NR: torch.Tensor
    shrink_gain_R: torch.Tensor | None = None  # d
    expand_gain_N: torch.Tensor | None = None  # g


class Operator(NamedTuple):
    """One linear operator of a group, and the adapters on it. `factors` holds one LowRank for each use, in order.
    `packed`: W again, for a CPU."""

    weight_KN: torch.Tensor
    bias_N: torch.Tensor | None
    uses: Sequence[LoraUse]
    factors: Sequence[LowRank]
    packed: PackedWeight | None = None

    def base(self, x_TK: torch.Tensor) -> torch.Tensor:
        """X W + b."""
        if self.packed is not None:
            return self.packed.times(x_TK, self.bias_N)
        return x_TK @ self.weight_KN if self.bias_N is None else torch.addmm(self.bias_N, x_TK, self.weight_KN)

    def gradient(self, dy_TN: torch.Tensor, dx_TK: torch.Tensor | None) -> torch.Tensor:
        """dY W^T, added to dX in place if there is one."""
        if self.packed is not None:
            return self.packed.gradient(dy_TN, dx_TK)
        return dy_TN @ self.weight_KN.T if dx_TK is None else dx_TK.addmm_(dy_TN, self.weight_KN.T)


MAX_OPERATORS = 8  # of a group: cuda/multi_lora.cuh
_FIRST_FACTOR = 2  # arguments of _MultiLora.forward before them
_NUM_FACTORS = len(LowRank._fields)


def multi_lora(x_TK: torch.Tensor, operators: Sequence[Operator]) -> tuple[torch.Tensor, ...]:
    """Y_i [T, N_i] of each operator, in order.

    Uses of one operator must not overlap; those of two must lie on the same tokens or have none in common.
    Raises ValueError where shapes or ranges do not fit.
    """
    if _on_device(x_TK, operators):
        from engine.kernels import multi_lora_ops  # a process without a GPU does not load what is for one

        return multi_lora_ops.run(x_TK, operators)
    check(x_TK, operators)
    flat = [tensor for operator in operators for low_rank in operator.factors for tensor in low_rank]
    result: tuple[torch.Tensor, ...] = _MultiLora.apply(  # type: ignore[no-untyped-call]
        x_TK, tuple(operators), *flat
    )
    return result


def _on_device(x_TK: torch.Tensor, operators: Sequence[Operator]) -> bool:
    """Whether the kernels take it: float64, and masks that are not made from a dropout key, go the reference's way."""
    if not (x_TK.is_cuda and x_TK.dtype in SUFFIXES):
        return False
    masks = [use.keep_mask for operator in operators for use in operator.uses]
    return all(mask is None or isinstance(mask, DropoutMask) for mask in masks)


class _MultiLora(torch.autograd.Function):
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
        for operator, dy_TN, own, needs in zip(operators, grad_outputs, factors, needed, strict=True):
            for use, low_rank, needs_of in zip(operator.uses, own, needs, strict=True):
                s_LR = next(shrunk)
                grads += _backward_of(x_TK, dy_TN, dx_TK, s_LR, use, low_rank, needs_of)
        return dx_TK, None, *grads


def _add(x_TK: torch.Tensor, y_TN: torch.Tensor, use: LoraUse, low_rank: LowRank) -> torch.Tensor:
    """Y[u] += the low-rank product. Returns S."""
    a_RK, b_NR, d_R, g_N = _cast(low_rank, x_TK.dtype)
    s_LR: torch.Tensor = _masked(x_TK[use.start : use.end], _mask(use), use) @ a_RK.T
    y_LN, gained_LR = y_TN[use.start : use.end], _gained(s_LR, d_R)
    if g_N is None:
        y_LN.addmm_(gained_LR, b_NR.T, alpha=use.scale)
    else:
        y_LN.addcmul_(gained_LR @ b_NR.T, g_N, value=use.scale)
    return s_LR


def _of_base(operators: Sequence[Operator], dys: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """dX [T, K] of the operators without their adapters."""
    dx_TK: torch.Tensor | None = None
    for operator, dy_TN in zip(operators, dys, strict=True):
        dx_TK = dx_TK if dy_TN is None else operator.gradient(dy_TN, dx_TK)
    return dx_TK


def _backward_of(
    x_TK: torch.Tensor | None,
    dy_TN: torch.Tensor | None,
    dx_TK: torch.Tensor | None,
    s_LR: torch.Tensor,
    use: LoraUse,
    low_rank: LowRank,
    needs: Any,
) -> list[Any]:
    """The gradients of one use's factors; its part of dX is added to it. Nothing where nobody read this Y."""
    if dy_TN is None:
        return [None] * _NUM_FACTORS
    part = slice(use.start, use.end)
    ds_LR, own = _gradients(dy_TN[part], s_LR, low_rank, use, needs)
    mask_LK = _mask(use) if needs.a_RK or dx_TK is not None else None
    if needs.a_RK:
        assert x_TK is not None
        own = own._replace(a_RK=ds_LR.T @ _masked(x_TK[part], mask_LK, use))
    if dx_TK is not None:
        _add_masked_(dx_TK[part], ds_LR, low_rank.a_RK.to(dy_TN.dtype), mask_LK, use)
    return [None if g is None or f is None else g.to(f.dtype) for g, f in zip(own, low_rank, strict=True)]


def _gradients(
    dy_LN: torch.Tensor, s_LR: torch.Tensor, low_rank: LowRank, use: LoraUse, needs: Any
) -> tuple[torch.Tensor, Any]:
    """(gradient of S, those of B, d and g, each if needed, with A's left out)."""
    _, b_NR, d_R, g_N = _cast(low_rank, dy_LN.dtype)
    gained_LN, gained_LR = _gained(dy_LN, g_N), _gained(s_LR, d_R)
    e_LR = (gained_LN @ b_NR).mul_(use.scale)
    db_NR = (gained_LN.T @ gained_LR).mul_(use.scale) if needs.b_NR else None
    dd_R = (e_LR * s_LR).sum(dim=0) if needs.shrink_gain_R else None
    dg_N = (b_NR * (dy_LN.T @ gained_LR)).sum(dim=1).mul_(use.scale) if needs.expand_gain_N else None
    return _gained(e_LR, d_R), LowRank(None, db_NR, dd_R, dg_N)  # type: ignore[arg-type]


def _by_operator(operators: Sequence[Operator], flat: Sequence[Any]) -> list[list[Any]]:
    """LowRanks of what was flattened, a list an operator."""
    each: Iterator[LowRank] = (LowRank(*flat[i : i + _NUM_FACTORS]) for i in range(0, len(flat), _NUM_FACTORS))
    return [[next(each) for _ in operator.uses] for operator in operators]


def _cast(low_rank: LowRank, dtype: torch.dtype) -> list[Any]:
    return [None if factor is None else factor.to(dtype) for factor in low_rank]


def _gained(rows: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    return rows if gain is None else rows * gain


def _mask(use: LoraUse) -> torch.Tensor | None:
    return None if use.keep_mask is None else use.keep_mask()


def _masked(x_LK: torch.Tensor, mask_LK: torch.Tensor | None, use: LoraUse) -> torch.Tensor:
    return x_LK if mask_LK is None else torch.where(mask_LK, x_LK, 0) * use.keep_scale


def _add_masked_(
    dx_LK: torch.Tensor, ds_LR: torch.Tensor, a_RK: torch.Tensor, mask_LK: torch.Tensor | None, use: LoraUse
) -> None:
    if mask_LK is None:
        dx_LK.addmm_(ds_LR, a_RK)
    else:
        dx_LK += _masked(ds_LR @ a_RK, mask_LK, use)


def check(x_TK: torch.Tensor, operators: Sequence[Operator]) -> None:
    """Raises ValueError where the group's shapes and ranges do not fit."""
    if not 1 <= len(operators) <= MAX_OPERATORS:
        raise ValueError(f"a group has 1 to {MAX_OPERATORS} operators, got {len(operators)}")
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
                f"use [{start}, {end}) leaves the {num_tokens} tokens or overlaps another without being equal to it"
            )
        last = end
