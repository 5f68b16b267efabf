"""Gains and shifts of many tasks on one packed stream, in one launch: for (IA)^3, biases and vectors of norms.

    Y[u] = g_u o X[u] + b_u;    dX[u] = g_u o dY[u];    dg_u = column sums of dY[u] o X[u];    db_u = those of dY[u]

A use is one task's vectors on its own tokens. Sums are float32 along 128 tokens; partial sums are then added in a fixed
order, so the result of a use depends on that use alone. Reads X and writes Y once; backward reads dY, and X if g is
trained, and writes dX. Of X only the tokens of uses with a trained g are saved.
On CUDA, cuda/multi_affine.cu. Legend: T tokens, N columns, L tokens of one use.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.kernels import cupy_launcher
from engine.kernels.launch import SUFFIXES
from engine.kernels.multi_affine_device import AffineRows, backward, forward


@dataclass(frozen=True)
class AffineUse:
    """One task's vectors on tokens [start, end) of the stream: float32 [N], or None."""

    start: int
    end: int
    gain_N: Tensor | None
    shift_N: Tensor | None


def multi_affine(x_TN: Tensor, uses: Sequence[AffineUse]) -> Tensor:
    """Return Y [T, N] of X's type; tokens of no use are unchanged. `uses` are in the stream's order and disjoint.

    Raises ValueError if ranges or vectors do not fit.
    """
    _check(x_TN, uses)
    if not uses:
        return x_TN
    if not (x_TN.is_cuda and x_TN.dtype in SUFFIXES):
        return _reference(x_TN, uses)
    bounds = [bound for use in uses for bound in (use.start, use.end)]
    kinds = [(use.gain_N is not None) + 2 * (use.shift_N is not None) for use in uses]
    vectors = [v.float().contiguous() for use in uses for v in (use.gain_N, use.shift_N) if v is not None]
    saves = torch.is_grad_enabled() and any(use.gain_N is not None and use.gain_N.requires_grad for use in uses)
    y_TN: Tensor = multi_affine_op(x_TN.contiguous(), bounds, kinds, vectors, saves)[0]
    return y_TN


def _reference(x_TN: Tensor, uses: Sequence[AffineUse]) -> Tensor:
    """Compute by split and cat: their gradients are views and one copy."""
    bounds = [0, *(bound for use in uses for bound in (use.start, use.end)), len(x_TN)]
    pieces = list(torch.split(x_TN, [b - a for a, b in itertools.pairwise(bounds)]))
    for place, use in enumerate(uses):
        y_LN = pieces[2 * place + 1]
        if use.gain_N is not None:
            y_LN = y_LN.clone() * use.gain_N  # a copy, so that backward does not hold the whole stream
        if use.shift_N is not None:
            y_LN = y_LN + use.shift_N
        pieces[2 * place + 1] = y_LN.to(x_TN.dtype)
    return torch.cat(pieces)


@torch.library.custom_op("muxtune::multi_affine", mutates_args=())
def multi_affine_op(
    x_TN: Tensor, bounds: Sequence[int], kinds: Sequence[int], vectors: Sequence[Tensor], saves: bool
) -> tuple[Tensor, Tensor]:
    """Return (Y; the tokens of X of all uses with a gain, concatenated, if it `saves` them for backward).

    `bounds`: start and end of each use; `kinds`: 1 for a gain, plus 2 for a shift; `vectors`: all of these, in order.
    """
    y_TN = torch.empty_like(x_TN)
    rows = AffineRows(bounds, kinds, vectors)
    forward(cupy_launcher.launcher_of(x_TN.device), rows, x_TN, y_TN)
    saved = [x_TN[start:end] for start, end in _ranges_with_gain(bounds, kinds)] if saves else []
    return y_TN, torch.cat(saved) if saved else x_TN.new_empty(0, x_TN.shape[1])


@torch.library.custom_op("muxtune::multi_affine_backward", mutates_args=())
def multi_affine_backward_op(
    saved: Tensor, dy_TN: Tensor, bounds: Sequence[int], kinds: Sequence[int], vectors: Sequence[Tensor],
    wanted: Sequence[bool], wants_x: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (dX, empty unless wanted; float32 gradients of the wanted vectors, concatenated)."""
    dx_TN = torch.empty_like(dy_TN) if wants_x else dy_TN.new_empty(0)
    gradients = dy_TN.new_empty(sum(wanted) * dy_TN.shape[1], dtype=torch.float32)
    rows = AffineRows(bounds, kinds, vectors, wanted)
    backward(cupy_launcher.launcher_of(dy_TN.device), rows, saved, dy_TN, dx_TN if wants_x else None, gradients)
    return dx_TN, gradients


@multi_affine_op.register_fake
def _(
    x_TN: Tensor, bounds: Sequence[int], kinds: Sequence[int], vectors: Sequence[Tensor], saves: bool
) -> tuple[Tensor, Tensor]:
    num_saved = sum(end - start for start, end in _ranges_with_gain(bounds, kinds)) if saves else 0
    return torch.empty_like(x_TN), x_TN.new_empty(num_saved, x_TN.shape[1])


@multi_affine_backward_op.register_fake
def _(
    saved: Tensor, dy_TN: Tensor, bounds: Sequence[int], kinds: Sequence[int], vectors: Sequence[Tensor],
    wanted: Sequence[bool], wants_x: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx_TN = torch.empty_like(dy_TN) if wants_x else dy_TN.new_empty(0)
    return dx_TN, dy_TN.new_empty(sum(wanted) * dy_TN.shape[1], dtype=torch.float32)


def _ranges_with_gain(bounds: Sequence[int], kinds: Sequence[int]) -> list[tuple[int, int]]:
    """Return the token ranges of all uses with a gain."""
    return [(bounds[2 * i], bounds[2 * i + 1]) for i, kind in enumerate(kinds) if kind & 1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TN, ctx.bounds, ctx.kinds, vectors, _ = inputs
    ctx.wanted, ctx.wants_x = [vector.requires_grad for vector in vectors], x_TN.requires_grad
    ctx.save_for_backward(output[1], *vectors)


def _backward(ctx: Any, dy_TN: Tensor, _: Tensor) -> tuple[Any, ...]:
    saved, *vectors = ctx.saved_tensors
    dx_TN, gradients = multi_affine_backward_op(
        saved, dy_TN.contiguous(), ctx.bounds, ctx.kinds, vectors, ctx.wanted, ctx.wants_x
    )
    rows = iter(gradients.view(-1, dy_TN.shape[1]))
    grads = [next(rows) if wants else None for wants in ctx.wanted]
    return dx_TN if ctx.wants_x else None, None, None, grads, None


multi_affine_op.register_autograd(_backward, setup_context=_setup_context)


def _check(x_TN: Tensor, uses: Sequence[AffineUse]) -> None:
    end = 0
    for use in uses:
        if not end <= use.start <= use.end <= len(x_TN):
            raise ValueError(f"use [{use.start}, {use.end}) is out of order or exceeds the {len(x_TN)} tokens")
        end = use.end
        for vector in (use.gain_N, use.shift_N):
            if vector is not None and (vector.shape != x_TN.shape[1:] or vector.device != x_TN.device):
                raise ValueError(
                    f"a vector {tuple(vector.shape)} on {vector.device} does not fit a stream {tuple(x_TN.shape)}"
                )
