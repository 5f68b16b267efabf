"""multi_lora as torch operators, `muxtune::multi_lora` and `muxtune::multi_lora_backward`, with autograd and fakes.

Uses travel as structs in CPU tensors of bytes, factors as one flat list without the gains that are not there: what
`multi_lora_device.describe` makes. Legend: T tokens, K inputs, N outputs, B bytes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels import device
from engine.kernels import multi_lora_items as items_of
from engine.kernels.multi_lora import LoraUse, LowRank
from engine.kernels.multi_lora_device import LowRankProducts, Wanted, describe, laid_out


def run(
    x_TK: Tensor, weight_KN: Tensor, bias_N: Tensor | None, uses: Sequence[LoraUse], factors: Sequence[LowRank]
) -> Tensor:
    """Y, differentiable in x and the factors. Raises ValueError where a tensor is on another device or of another type.

    Shapes and ranges have been checked by `multi_lora`.
    """
    _check(x_TK, weight_KN, bias_N, factors)
    rows, runs = describe(uses, factors)
    flat = [_ready(factor) for low_rank in factors for factor in low_rank if factor is not None]
    y_TN: Tensor = multi_lora_op(x_TK.contiguous(), weight_KN, bias_N, flat, _bytes(rows), _bytes(runs))[0]
    return y_TN


def _check(x_TK: Tensor, weight_KN: Tensor, bias_N: Tensor | None, factors: Sequence[LowRank]) -> None:
    for name, frozen in (("weight_KN", weight_KN), ("bias_N", bias_N)):
        if frozen is not None and frozen.dtype != x_TK.dtype:
            raise ValueError(f"{name} is {frozen.dtype}, x_TK {x_TK.dtype}")
    for tensor in (weight_KN, bias_N, *(factor for low_rank in factors for factor in low_rank)):
        if tensor is not None and tensor.device != x_TK.device:
            raise ValueError(f"a tensor is on {tensor.device}, x_TK on {x_TK.device}")


def _ready(factor: Tensor) -> Tensor:
    """In float32, and contiguous along one of its dimensions, as nearly all of them are already."""
    factor = factor.float()
    return factor if 1 in factor.stride() or factor.numel() == 1 else factor.contiguous()


@torch.library.custom_op("muxtune::multi_lora", mutates_args=())
def multi_lora_op(
    x_TK: Tensor, weight_KN: Tensor, bias_N: Tensor | None, factors: Sequence[Tensor], uses_B: Tensor, runs_B: Tensor
) -> tuple[Tensor, Tensor]:
    """(Y, S)."""
    y_TN = x_TK @ weight_KN if bias_N is None else torch.addmm(bias_N, x_TK, weight_KN)
    return y_TN, _products(x_TK, factors, uses_B, runs_B).forward(x_TK, y_TN)


@torch.library.custom_op("muxtune::multi_lora_backward", mutates_args=())
def multi_lora_backward_op(
    x_TK: Tensor | None,
    dy_TN: Tensor,
    shrunk: Tensor,
    weight_KN: Tensor | None,
    factors: Sequence[Tensor],
    uses_B: Tensor,
    runs_B: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """(dX, empty if no weight is given; all gradients of factors, as `laid_out` tells). `wanted`: four flags a use."""
    dx_TK = dy_TN.new_empty(0) if weight_KN is None else dy_TN @ weight_KN.T
    products = _products(dy_TN, factors, uses_B, runs_B)
    flags = [Wanted(*wanted[i : i + 4]) for i in range(0, len(wanted), 4)]
    gradients = products.backward(x_TK, dy_TN, shrunk, None if weight_KN is None else dx_TK, flags)
    return dx_TK, gradients


@multi_lora_op.register_fake
def _(
    x_TK: Tensor, weight_KN: Tensor, bias_N: Tensor | None, factors: Sequence[Tensor], uses_B: Tensor, runs_B: Tensor
) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return x_TK.new_empty(x_TK.shape[0], weight_KN.shape[1]), x_TK.new_empty(size)


@multi_lora_backward_op.register_fake
def _(
    x_TK: Tensor | None,
    dy_TN: Tensor,
    shrunk: Tensor,
    weight_KN: Tensor | None,
    factors: Sequence[Tensor],
    uses_B: Tensor,
    runs_B: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    dx_TK = dy_TN.new_empty(0) if weight_KN is None else dy_TN.new_empty(dy_TN.shape[0], weight_KN.shape[0])
    return dx_TK, dy_TN.new_empty(size, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Nothing is kept for the frozen weight; x where an A is trained."""
    x_TK, weight_KN, _, factors, uses_B, runs_B = inputs
    rows = _rows(uses_B, items_of.USE)
    flags = _grouped([factor.requires_grad for factor in factors], rows, absent=False)
    ctx.wanted, ctx.num_factors = [flag for low_rank in flags for flag in low_rank], len(factors)
    kept_x = x_TK if any(low_rank.a_RK for low_rank in flags) else None
    ctx.save_for_backward(kept_x, weight_KN if x_TK.requires_grad else None, output[1], uses_B, runs_B, *factors)


def _backward(ctx: Any, dy_TN: Tensor, _: Tensor) -> tuple[Any, ...]:
    x_TK, weight_KN, shrunk, uses_B, runs_B, *factors = ctx.saved_tensors
    dx_TK, gradients = multi_lora_backward_op(
        x_TK, dy_TN.contiguous(), shrunk, weight_KN, factors, uses_B, runs_B, ctx.wanted
    )
    views = _views(gradients, factors, _rows(uses_B, items_of.USE), ctx.wanted)
    return None if weight_KN is None else dx_TK, None, None, views, None, None


multi_lora_op.register_autograd(_backward, setup_context=_setup_context)


def _views(
    gradients: Tensor, factors: Sequence[Tensor], rows: NDArray[Any], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """A gradient for each of the flat `factors`, None where it is not wanted."""
    grouped = _grouped(factors, rows, absent=None)
    flags = [Wanted(*wanted[i : i + 4]) for i in range(0, len(wanted), 4)]
    widths = (grouped[0].a_RK.shape[1], len(grouped[0].b_NR))
    placed, _ = laid_out(rows, *widths, flags)
    return [
        gradients[start : start + factor.numel()].view(factor.shape) if wants else None
        for row, low_rank, own in zip(placed, grouped, flags, strict=True)
        for start, factor, wants in zip((int(row[n]) for n in ("da", "db", "dd", "dg")), low_rank, own, strict=True)
        if factor is not None
    ]


def _products(stream: Tensor, factors: Sequence[Tensor], uses_B: Tensor, runs_B: Tensor) -> LowRankProducts:
    rows = _rows(uses_B, items_of.USE)
    grouped = _grouped(factors, rows, absent=None)
    launcher = device.launcher_of(stream.device)
    return LowRankProducts(launcher, rows, _rows(runs_B, items_of.RUN), grouped, stream.dtype)


def _grouped(flat: Sequence[Any], rows: NDArray[Any], absent: Any) -> list[LowRank]:
    """One LowRank a use of what stands flat, `absent` for a gain that is not there."""
    rest, grouped = iter(flat), []
    for row in rows:
        a_RK, b_NR = next(rest), next(rest)
        gains = [next(rest) if row[name] else absent for name in ("shrink_gain", "expand_gain")]
        grouped.append(LowRank(a_RK, b_NR, *gains))
    return grouped


def _bytes(rows: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(np.frombuffer(rows.tobytes(), np.uint8)))


def _rows(raw_B: Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    return raw_B.numpy().view(dtype)
