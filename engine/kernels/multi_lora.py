"""A frozen linear operator with the LoRA adapters of many tasks on one packed stream.

    Y = X Wt + b;   for each use u:  Y[u] += scale_u * drop_u(X[u]) A_u^T B_u^T

Backward, with dY given:  dX = dY Wt^T;  dS = scale * dY[u] B;  dB = scale * dY[u]^T S;  dA = dS^T drop(X[u]);
dX[u] += drop'(dS A).  The backbone's W and b get no gradient, and nothing is saved for one.

This is the reference and the CPU path. Legend: T tokens, K inputs, N outputs, R rank, L tokens of one use.
Source: LoRA (arXiv 2106.09685); multi-tenant batching as in Punica (arXiv 2310.18547) and MuxTune section 3.2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LoraUse:
    """One task's adapter on tokens [start, end) of the stream. `mask` makes its dropout mask [L, K], or None."""

    start: int
    end: int
    scale: float
    keep_mask: Callable[[], torch.Tensor] | None = None
    keep_scale: float = 1.0


def multi_lora(
    x_TK: torch.Tensor,
    weight_KN: torch.Tensor,
    bias_N: torch.Tensor | None,
    uses: Sequence[LoraUse],
    factors: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Y [T, N]. `factors` is A_1 [R, K], B_1 [N, R], A_2, ...: two for each use, in order. Uses must not overlap.

    Raises ValueError where shapes or ranges do not fit.
    """
    _check(x_TK, weight_KN, uses, factors)
    result: torch.Tensor = _MultiLora.apply(  # type: ignore[no-untyped-call]
        x_TK, weight_KN, bias_N, tuple(uses), *factors
    )
    return result


class _MultiLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        weight_KN: torch.Tensor,
        bias_N: torch.Tensor | None,
        uses: tuple[LoraUse, ...],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        y_TN = x_TK @ weight_KN if bias_N is None else torch.addmm(bias_N, x_TK, weight_KN)
        shrunk = []
        for use, a_RK, b_NR in zip(uses, factors[::2], factors[1::2], strict=True):
            s_LR = _dropped(x_TK[use.start : use.end], use) @ a_RK.T.to(x_TK.dtype)
            y_TN[use.start : use.end].addmm_(s_LR, b_NR.T.to(x_TK.dtype), alpha=use.scale)
            shrunk.append(s_LR)
        ctx.uses = uses
        ctx.save_for_backward(x_TK, weight_KN, *factors, *shrunk)
        return y_TN

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        dy_TN = grad_outputs[0]
        x_TK, weight_KN, *rest = ctx.saved_tensors
        uses: tuple[LoraUse, ...] = ctx.uses
        factors, shrunk = rest[: 2 * len(uses)], rest[2 * len(uses) :]
        dx_TK = dy_TN @ weight_KN.T if ctx.needs_input_grad[0] else None
        grads: list[torch.Tensor] = []
        for use, a_RK, b_NR, s_LR in zip(uses, factors[::2], factors[1::2], shrunk, strict=True):
            dy_LN = dy_TN[use.start : use.end]
            ds_LR = (dy_LN @ b_NR.to(dy_LN.dtype)).mul_(use.scale)
            mask_LK = use.keep_mask() if use.keep_mask else None
            da_RK = ds_LR.T @ _masked(x_TK[use.start : use.end], mask_LK, use.keep_scale)
            grads += [da_RK.to(a_RK.dtype), (dy_LN.T @ s_LR).mul_(use.scale).to(b_NR.dtype)]
            if dx_TK is not None:
                if mask_LK is None:
                    dx_TK[use.start : use.end].addmm_(ds_LR, a_RK.to(dy_LN.dtype))
                else:
                    dx_TK[use.start : use.end] += _masked(ds_LR @ a_RK.to(dy_LN.dtype), mask_LK, use.keep_scale)
        return dx_TK, None, None, None, *grads


def _dropped(x_LK: torch.Tensor, use: LoraUse) -> torch.Tensor:
    return _masked(x_LK, use.keep_mask(), use.keep_scale) if use.keep_mask else x_LK


def _masked(x_LK: torch.Tensor, mask_LK: torch.Tensor | None, keep_scale: float) -> torch.Tensor:
    return x_LK if mask_LK is None else torch.where(mask_LK, x_LK, 0) * keep_scale


def _check(
    x_TK: torch.Tensor, weight_KN: torch.Tensor, uses: Sequence[LoraUse], factors: Sequence[torch.Tensor]
) -> None:
    num_tokens, width_in = x_TK.shape
    if weight_KN.shape[0] != width_in:
        raise ValueError(f"weight_KN has {weight_KN.shape[0]} rows, x_TK {width_in} columns")
    if len(factors) != 2 * len(uses):
        raise ValueError(f"{len(uses)} uses need {2 * len(uses)} factors, got {len(factors)}")
    end = 0
    for use, a_RK, b_NR in sorted(zip(uses, factors[::2], factors[1::2], strict=True), key=lambda item: item[0].start):
        if not end <= use.start <= use.end <= num_tokens:
            raise ValueError(f"use [{use.start}, {use.end}) overlaps another or leaves the {num_tokens} tokens")
        if a_RK.shape[1] != width_in or b_NR.shape != (weight_KN.shape[1], a_RK.shape[0]):
            raise ValueError(f"A {tuple(a_RK.shape)} and B {tuple(b_NR.shape)} do not fit W {tuple(weight_KN.shape)}")
        end = use.end
