"""A frozen linear operator with the low-rank adapters of many tasks on one packed stream.

    Y = X Wt + b;   for each use u:  Y[u] += scale_u * g_u o ((d_u o (drop_u(X[u]) A_u^T)) B_u^T)

d [R] and g [N] are learned gains of the two products (VeRA); without them it is LoRA. Backward, with dY given and
S = drop(X[u]) A^T:
    dX = dY Wt^T;   E = scale * ((g o dY[u]) B);   dX[u] += drop'((d o E) A);   dA = (d o E)^T drop(X[u]);
    dd = sum(E o S);   dB = scale * (g o dY[u])^T (d o S);   dg = scale * rowsum(B o (dY[u]^T (d o S)))
The backbone's W and b get no gradient, and nothing is saved for one. S is kept of each use, and X if a use trains its
A: where A is frozen (VeRA, MiSS) it is not.

This is the reference and the CPU path; on CUDA, cuda/multi_lora.cu does it (`multi_lora_ops`).
Legend: T tokens, K inputs, N outputs, R rank, L tokens of one use.
Source: LoRA (arXiv 2106.09685), VeRA (arXiv 2310.11454); multi-tenant batching as in Punica (arXiv 2310.18547) and
MuxTune (arXiv 2603.02885).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from engine.kernels.dropout import DropoutMask
from engine.kernels.launch import SUFFIXES


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


_FIRST_FACTOR = 4  # arguments of _MultiLora.forward before them
_NUM_FACTORS = len(LowRank._fields)


def multi_lora(
    x_TK: torch.Tensor,
    weight_KN: torch.Tensor,
    bias_N: torch.Tensor | None,
    uses: Sequence[LoraUse],
    factors: Sequence[LowRank],
) -> torch.Tensor:
    """Y [T, N]. `factors` holds one LowRank for each use, in order. Uses must not overlap.

    Raises ValueError where shapes or ranges do not fit.
    """
    _check(x_TK, weight_KN, uses, factors)
    if _on_device(x_TK, uses):
        from engine.kernels import multi_lora_ops  # a process without a GPU does not load what is for one

        return multi_lora_ops.run(x_TK, weight_KN, bias_N, uses, factors)
    flat = [tensor for low_rank in factors for tensor in low_rank]
    result: torch.Tensor = _MultiLora.apply(  # type: ignore[no-untyped-call]
        x_TK, weight_KN, bias_N, tuple(uses), *flat
    )
    return result


def _on_device(x_TK: torch.Tensor, uses: Sequence[LoraUse]) -> bool:
    """Whether the kernels take it: float64, and masks that are not made from a dropout key, go the reference's way."""
    keyed = all(use.keep_mask is None or isinstance(use.keep_mask, DropoutMask) for use in uses)
    return x_TK.is_cuda and x_TK.dtype in SUFFIXES and len(uses) > 0 and keyed


class _MultiLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        weight_KN: torch.Tensor,
        bias_N: torch.Tensor | None,
        uses: tuple[LoraUse, ...],
        *flat: torch.Tensor | None,
    ) -> torch.Tensor:
        y_TN = x_TK @ weight_KN if bias_N is None else torch.addmm(bias_N, x_TK, weight_KN)
        shrunk = []
        for use, low_rank in zip(uses, _grouped(flat), strict=True):
            a_RK, b_NR, d_R, g_N = _cast(low_rank, x_TK.dtype)
            s_LR = _masked(x_TK[use.start : use.end], _mask(use), use) @ a_RK.T
            y_LN, gained_LR = y_TN[use.start : use.end], _gained(s_LR, d_R)
            if g_N is None:
                y_LN.addmm_(gained_LR, b_NR.T, alpha=use.scale)
            else:
                y_LN.addcmul_(gained_LR @ b_NR.T, g_N, value=use.scale)
            shrunk.append(s_LR)
        ctx.uses = uses
        trains_a = any(ctx.needs_input_grad[_FIRST_FACTOR::_NUM_FACTORS])
        ctx.save_for_backward(x_TK if trains_a else None, weight_KN, *flat, *shrunk)
        return y_TN

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        dy_TN = grad_outputs[0]
        x_TK, weight_KN, *rest = ctx.saved_tensors
        uses: tuple[LoraUse, ...] = ctx.uses
        flat, shrunk = rest[: _NUM_FACTORS * len(uses)], rest[_NUM_FACTORS * len(uses) :]
        needed = _grouped(ctx.needs_input_grad[_FIRST_FACTOR:])
        dx_TK = dy_TN @ weight_KN.T if ctx.needs_input_grad[0] else None
        grads: list[torch.Tensor | None] = []
        for use, low_rank, s_LR, needs in zip(uses, _grouped(flat), shrunk, needed, strict=True):
            part = slice(use.start, use.end)
            ds_LR, own = _gradients(dy_TN[part], s_LR, low_rank, use, needs)
            mask_LK = _mask(use) if needs.a_RK or dx_TK is not None else None
            if needs.a_RK:
                own = own._replace(a_RK=ds_LR.T @ _masked(x_TK[part], mask_LK, use))
            if dx_TK is not None:
                dx_TK[part] += _masked(ds_LR @ low_rank.a_RK.to(dy_TN.dtype), mask_LK, use)
            grads += [g if g is None else g.to(factor.dtype) for g, factor in zip(own, low_rank, strict=True)]
        return dx_TK, None, None, None, *grads


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


def _grouped(flat: Sequence[Any]) -> list[Any]:
    """LowRanks of what was flattened."""
    return [LowRank(*flat[i : i + _NUM_FACTORS]) for i in range(0, len(flat), _NUM_FACTORS)]


def _cast(low_rank: LowRank, dtype: torch.dtype) -> list[Any]:
    return [None if factor is None else factor.to(dtype) for factor in low_rank]


def _gained(rows: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    return rows if gain is None else rows * gain


def _mask(use: LoraUse) -> torch.Tensor | None:
    return None if use.keep_mask is None else use.keep_mask()


def _masked(x_LK: torch.Tensor, mask_LK: torch.Tensor | None, use: LoraUse) -> torch.Tensor:
    return x_LK if mask_LK is None else torch.where(mask_LK, x_LK, 0) * use.keep_scale


def _check(x_TK: torch.Tensor, weight_KN: torch.Tensor, uses: Sequence[LoraUse], factors: Sequence[LowRank]) -> None:
    num_tokens, width_in = x_TK.shape
    if weight_KN.shape[0] != width_in:
        raise ValueError(f"weight_KN has {weight_KN.shape[0]} rows, x_TK {width_in} columns")
    if len(factors) != len(uses):
        raise ValueError(f"{len(uses)} uses need as many factors, got {len(factors)}")
    end = 0
    for use, (a_RK, b_NR, d_R, g_N) in sorted(zip(uses, factors, strict=True), key=lambda item: item[0].start):
        if not end <= use.start <= use.end <= num_tokens:
            raise ValueError(f"use [{use.start}, {use.end}) overlaps another or leaves the {num_tokens} tokens")
        if a_RK.shape[1] != width_in or b_NR.shape != (weight_KN.shape[1], a_RK.shape[0]):
            raise ValueError(f"A {tuple(a_RK.shape)} and B {tuple(b_NR.shape)} do not fit W {tuple(weight_KN.shape)}")
        for gain, rows in ((d_R, b_NR.T), (g_N, b_NR)):
            if gain is not None and gain.shape != rows.shape[:1]:
                raise ValueError(f"gain {tuple(gain.shape)} does not fit A {tuple(a_RK.shape)}, B {tuple(b_NR.shape)}")
        end = use.end
