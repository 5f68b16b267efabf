"""multi_lora as torch operators, `muxtune::multi_lora` and `muxtune::multi_lora_backward`, with autograd and fakes.

Uses and what is known of their factors travel as structs in CPU tensors of bytes (`multi_lora_uses`), factors as one
flat list without the gains that are not there. What depends on the layout alone is made once and remembered by the
launcher. Legend: T tokens, K inputs, N outputs, B bytes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from engine.kernels import cupy_launcher
from engine.kernels.dropout import DropoutMask
from engine.kernels.launch import Launcher, Table
from engine.kernels.multi_lora.descriptors import (
    Pair,
    are_laid_out,
    described_factors,
    described_uses,
    factors_key,
    layout_of,
    pairs_of,
    positions_of,
    uses_key,
)
from engine.kernels.multi_lora.device_products import GroupProducts, accumulates_into_base_gemm, with_addresses
from engine.kernels.multi_lora.launch_plan import LaunchPlan
from engine.kernels.multi_lora.structs import FACTORS, USE, Rows
from engine.kernels.multi_lora.types import LowRank, Operator, check
from engine.kernels.transfer import to_device

_NUM_PLANS = 64  # that a device keeps: of a microbatch of 16384 tokens in a Llama-3-8B four, 1 MB each


def run(x_TK: Tensor, operators: Sequence[Operator]) -> tuple[Tensor, ...]:
    """Y of each operator, differentiable in x and the factors.

    Raises ValueError where shapes and ranges do not fit, or a tensor is on another device or of another type.
    """
    _check_frozen(x_TK, operators)
    launcher, pairs = cupy_launcher.launcher_of(x_TK.device), pairs_of(operators)
    widths = (x_TK.shape[1], *(operator.weight_KN.shape[1] for operator in operators))
    factors_B, is_ready = launcher.get_or_create(
        ("described factors", widths, factors_key(pairs)), lambda: _describe_factors(x_TK, operators, pairs)
    )
    if not is_ready:
        pairs = [pair._replace(low_rank=_ready(pair.low_rank)) for pair in pairs]
    uses_B = launcher.get_or_create(
        ("described uses", len(x_TK), widths, uses_key(pairs)), lambda: _describe_uses(x_TK, operators, pairs, widths)
    )
    flat = [factor for pair in pairs for factor in pair.low_rank if factor is not None]
    *results, _ = multi_lora_op(
        x_TK.contiguous(),
        [operator.weight_KN for operator in operators],
        [operator.bias_N for operator in operators],
        flat,
        _steps(pairs, launcher, x_TK.device),
        factors_B,
        uses_B,
        _positions(pairs, x_TK),
    )
    return tuple(results)


def _check_frozen(x_TK: Tensor, operators: Sequence[Operator]) -> None:
    for operator in operators:
        for name, frozen in (("weight_KN", operator.weight_KN), ("bias_N", operator.bias_N)):
            if frozen is None:
                continue
            if frozen.dtype != x_TK.dtype:
                raise ValueError(f"{name} is {frozen.dtype}, x_TK {x_TK.dtype}")
            if frozen.device != x_TK.device:
                raise ValueError(f"{name} is on {frozen.device}, x_TK on {x_TK.device}")


def _describe_factors(x_TK: Tensor, operators: Sequence[Operator], pairs: Sequence[Pair]) -> tuple[Tensor, bool]:
    """(rows as bytes, whether the factors can be read as they are)."""
    check(x_TK, operators)
    for _, _, low_rank in pairs:
        for factor in low_rank:
            if factor is not None and factor.device != x_TK.device:
                raise ValueError(f"a factor is on {factor.device}, x_TK on {x_TK.device}")
    ready = [pair._replace(low_rank=_ready(pair.low_rank)) for pair in pairs]
    is_ready = all(
        own is theirs
        for a, b in zip(pairs, ready, strict=True)
        for own, theirs in zip(a.low_rank, b.low_rank, strict=True)
    )
    return _bytes(described_factors(ready)), is_ready


def _describe_uses(x_TK: Tensor, operators: Sequence[Operator], pairs: Sequence[Pair], widths: Sequence[int]) -> Tensor:
    check(x_TK, operators)
    return _bytes(described_uses(pairs, widths[0], widths[1:]))


def _ready(low_rank: LowRank) -> LowRank:
    """In float32, and contiguous along one of its dimensions, as nearly all of them are already."""
    a_RK, b_NR, *gains = low_rank
    return LowRank(_readable(a_RK), _readable(b_NR), *(None if gain is None else _readable(gain) for gain in gains))


def _readable(factor: Tensor) -> Tensor:
    factor = factor.float()
    return factor if 1 in factor.stride() or factor.numel() == 1 else factor.contiguous()


def _steps(pairs: Sequence[Pair], launcher: Launcher, where: torch.device) -> list[Tensor]:
    """The step of each use with dropout: in the memory that its owner updates, else in some that stays as it is."""
    masks = [use.keep_mask for _, use, _ in pairs if isinstance(use.keep_mask, DropoutMask)]
    return [_step_of(mask, launcher, where) if mask.device_step is None else mask.device_step for mask in masks]


def _step_of(mask: DropoutMask, launcher: Launcher, where: torch.device) -> Tensor:
    return launcher.get_or_create(("step", mask.step), lambda: torch.tensor(mask.step, device=where))


def _positions(pairs: Sequence[Pair], x_TK: Tensor) -> Tensor | None:
    """[T] where there is dropout: in the memory that its owner updates, else made anew."""
    masks = [use.keep_mask for _, use, _ in pairs if isinstance(use.keep_mask, DropoutMask)]
    there = [mask.device_positions_T for mask in masks if mask.device_positions_T is not None]
    if len(there) == len(masks):
        return there[0] if there else None
    return to_device(torch.from_numpy(positions_of(pairs, len(x_TK))), x_TK.device)


@torch.library.custom_op("muxtune::multi_lora", mutates_args=())
def multi_lora_op(
    x_TK: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    steps: Sequence[Tensor],
    factors_B: Tensor,
    uses_B: Tensor,
    positions_T: Tensor | None,
) -> list[Tensor]:
    """Y of each operator, and S."""
    widths = [x_TK.shape[1], *(weight_KN.shape[1] for weight_KN in weights)]
    products = _products(x_TK, widths, factors, steps, factors_B, uses_B, positions_T)
    shrunk, used = products.shrink(x_TK), products.plan.used_ops
    riding = [i in used and accumulates_into_base_gemm(widths[0], bias is not None) for i, bias in enumerate(biases)]
    ys = [
        x_TK.new_empty(len(x_TK), weight_KN.shape[1]) if first else _base(x_TK, weight_KN, bias)
        for first, weight_KN, bias in zip(riding, weights, biases, strict=True)
    ]
    products.write([y_TN if first else None for first, y_TN in zip(riding, ys, strict=True)], biases, shrunk)
    for first, y_TN, weight_KN in zip(riding, ys, weights, strict=True):
        if first:
            y_TN.addmm_(x_TK, weight_KN)
    products.add([None if riding[i] or i not in used else y_TN for i, y_TN in enumerate(ys)], shrunk)
    return [*ys, shrunk]


def _base(x_TK: Tensor, weight_KN: Tensor, bias_N: Tensor | None) -> Tensor:
    return x_TK @ weight_KN if bias_N is None else torch.addmm(bias_N, x_TK, weight_KN)


@torch.library.custom_op("muxtune::multi_lora_backward", mutates_args=())
def multi_lora_backward_op(
    x_TK: Tensor | None,
    dys: Sequence[Tensor],
    shrunk: Tensor,
    weights: Sequence[Tensor],
    width_in: int,
    factors: Sequence[Tensor],
    steps: Sequence[Tensor],
    factors_B: Tensor,
    uses_B: Tensor,
    positions_T: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dX, empty if no weights are given; all gradients of factors, as the uses say)."""
    products = _products(
        dys[0], [width_in, *(dy.shape[1] for dy in dys)], factors, steps, factors_B, uses_B, positions_T
    )
    dx_TK = dys[0].new_empty(len(dys[0]) if weights else 0, width_in)
    gradients = products.backward(x_TK, dys, shrunk, dx_TK if weights else None)
    for dy_TN, weight_KN in zip(dys, weights, strict=False):
        dx_TK.addmm_(dy_TN, weight_KN.T)
    return dx_TK, gradients


@multi_lora_op.register_fake
def _(x_TK: Tensor, weights: Sequence[Tensor], *_: Any) -> list[Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return [*(x_TK.new_empty(x_TK.shape[0], weight_KN.shape[1]) for weight_KN in weights), x_TK.new_empty(size)]


@multi_lora_backward_op.register_fake
def _(
    x_TK: Tensor | None, dys: Sequence[Tensor], shrunk: Tensor, weights: Sequence[Tensor], width_in: int, *_: Any
) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    dx_TK = dys[0].new_empty(dys[0].shape[0] if weights else 0, width_in)
    return dx_TK, dys[0].new_empty(size, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Nothing is kept for the frozen weights; x where an A is trained."""
    x_TK, weights, biases, factors, steps, factors_B, uses_B, positions_T = inputs
    ctx.biases_are_one = None in biases  # such a list counts as one argument without a gradient, not as several
    uses = _rows(uses_B, USE)
    ctx.width_in, ctx.wanted = x_TK.shape[1], [factor.requires_grad for factor in factors]
    ctx.lengths = len(weights) if x_TK.requires_grad else 0, len(factors)
    kept_x = x_TK if (uses["da"] >= 0).any() else None
    kept = [*(weights if x_TK.requires_grad else ()), *factors, *steps]
    ctx.save_for_backward(kept_x, output[-1], factors_B, uses_B, positions_T, *kept)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x_TK, shrunk, factors_B, uses_B, positions_T, *kept = ctx.saved_tensors
    num_weights, num_factors = ctx.lengths
    weights, factors = kept[:num_weights], kept[num_weights : num_weights + num_factors]
    steps, dys = kept[num_weights + num_factors :], [dy_TN.contiguous() for dy_TN in grads[:-1]]
    dx_TK, gradients = multi_lora_backward_op(
        x_TK, dys, shrunk, weights, ctx.width_in, factors, steps, factors_B, uses_B, positions_T
    )
    views = _views(gradients, factors, _rows(uses_B, USE), _rows(factors_B, FACTORS), ctx.wanted)
    none = [None] * len(dys)
    of_biases = None if ctx.biases_are_one else none
    return dx_TK if num_weights else None, none, of_biases, views, [None] * len(steps), None, None, None


multi_lora_op.register_autograd(_backward, setup_context=_setup_context)


def _views(
    gradients: Tensor, factors: Sequence[Tensor], uses: Rows, rows: Rows, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """A gradient for each of the flat `factors`, None where it is not wanted."""
    laid_out = are_laid_out(uses, rows)
    shaped = [factor for factor, is_there in zip(factors, laid_out, strict=True) if is_there]
    views = iter(_unflatten_dense_tensors(gradients, shaped))  # type: ignore[no-untyped-call]  # one call, not hundreds
    found = [next(views) if is_there else None for is_there in laid_out]
    return [gradient if wants else None for gradient, wants in zip(found, wanted, strict=True)]


def _products(
    stream: Tensor,
    widths: Sequence[int],
    factors: Sequence[Tensor],
    steps: Sequence[Tensor],
    factors_B: Tensor,
    uses_B: Tensor,
    positions_T: Tensor | None,
) -> GroupProducts:
    launcher = cupy_launcher.launcher_of(stream.device)
    rows, uses = _rows(factors_B, FACTORS), _rows(uses_B, USE)
    plan_key = (len(stream), tuple(widths), stream.dtype, uses.tobytes(), layout_of(rows).tobytes())
    plans = launcher.part("multi_lora's plans", _NUM_PLANS)
    plan = plans.get_or_create(plan_key, lambda: LaunchPlan(uses, rows, len(stream), widths, stream.dtype, launcher))
    pointed = [*factors, *steps]
    addresses = tuple(tensor.data_ptr() for tensor in pointed)
    table: Table = launcher.get_or_create(
        ("factors", rows.tobytes(), addresses), lambda: launcher.upload(with_addresses(rows, factors, steps))
    )
    return GroupProducts(launcher, plan, table, pointed, stream.dtype, positions_T)


def _bytes(rows: Rows) -> Tensor:
    return torch.from_numpy(np.array(np.frombuffer(rows.tobytes(), np.uint8)))


def _rows(raw_B: Tensor, dtype: np.dtype[Any]) -> Rows:
    return raw_B.numpy().view(dtype)
