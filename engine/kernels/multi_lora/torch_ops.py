"""multi_lora as torch operators, `muxtune::multi_lora` and `muxtune::multi_lora_backward`, with autograd and fakes.

Uses and descriptions of their factors are passed as structs in CPU tensors of bytes (`descriptors`), factors as one
flat list without absent gains. The launcher caches everything that depends on the layout alone.
Legend: T tokens, K inputs, N outputs, B bytes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from engine.kernels import cupy_launcher
from engine.kernels.dropout import DropoutMask
from engine.kernels.launch import DeviceTable, Launcher
from engine.kernels.multi_lora.descriptors import (
    GroupUse,
    are_laid_out,
    describe_factors,
    describe_uses,
    factors_key,
    group_uses,
    layout_of,
    positions_of,
    uses_key,
)
from engine.kernels.multi_lora.device_products import GroupProducts, accumulates_into_base_gemm, add_addresses
from engine.kernels.multi_lora.launch_plan import LaunchPlan
from engine.kernels.multi_lora.structs import FACTORS, USE, Rows
from engine.kernels.multi_lora.types import LowRank, Operator, check
from engine.kernels.transfer import to_device

_NUM_PLANS = 64  # cached on a device; a microbatch of 16384 tokens in a Llama-3-8B has four, of 1 MB each


def run(x_TK: Tensor, operators: Sequence[Operator]) -> tuple[Tensor, ...]:
    """Return Y of each operator, differentiable in x and the factors.

    Raises ValueError if shapes or ranges do not fit, or a tensor is on another device or of another type.
    """
    _check_frozen(x_TK, operators)
    launcher, uses = cupy_launcher.launcher_of(x_TK.device), group_uses(operators)
    widths = (x_TK.shape[1], *(operator.weight_KN.shape[1] for operator in operators))
    factors_B, is_readable = launcher.get_or_create(
        ("described factors", widths, factors_key(uses)), lambda: _describe_factors(x_TK, operators, uses)
    )
    if not is_readable:
        uses = [use._replace(low_rank=_readable_factors(use.low_rank)) for use in uses]
    uses_B = launcher.get_or_create(
        ("described uses", len(x_TK), widths, uses_key(uses)), lambda: _describe_uses(x_TK, operators, uses, widths)
    )
    flat = [factor for use in uses for factor in use.low_rank if factor is not None]
    *results, _ = multi_lora_op(
        x_TK.contiguous(),
        [operator.weight_KN for operator in operators],
        [operator.bias_N for operator in operators],
        flat,
        _steps(uses, launcher, x_TK.device),
        factors_B,
        uses_B,
        _positions(uses, x_TK),
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


def _describe_factors(x_TK: Tensor, operators: Sequence[Operator], uses: Sequence[GroupUse]) -> tuple[Tensor, bool]:
    """Return (rows as bytes, whether the kernels can read the factors as they are)."""
    check(x_TK, operators)
    for _, _, low_rank in uses:
        for factor in low_rank:
            if factor is not None and factor.device != x_TK.device:
                raise ValueError(f"a factor is on {factor.device}, x_TK on {x_TK.device}")
    readable = [use._replace(low_rank=_readable_factors(use.low_rank)) for use in uses]
    is_readable = all(
        before is after
        for a, b in zip(uses, readable, strict=True)
        for before, after in zip(a.low_rank, b.low_rank, strict=True)
    )
    return _bytes(describe_factors(readable)), is_readable


def _describe_uses(
    x_TK: Tensor, operators: Sequence[Operator], uses: Sequence[GroupUse], widths: Sequence[int]
) -> Tensor:
    check(x_TK, operators)
    return _bytes(describe_uses(uses, widths[0], widths[1:]))


def _readable_factors(low_rank: LowRank) -> LowRank:
    """Return factors in float32 and contiguous along one dimension, as nearly all are already."""
    a_RK, b_NR, *gains = low_rank
    return LowRank(_readable(a_RK), _readable(b_NR), *(None if gain is None else _readable(gain) for gain in gains))


def _readable(factor: Tensor) -> Tensor:
    factor = factor.float()
    return factor if 1 in factor.stride() or factor.numel() == 1 else factor.contiguous()


def _steps(uses: Sequence[GroupUse], launcher: Launcher, device: torch.device) -> list[Tensor]:
    """Return the step of each use with dropout: in its owner's device memory, else a cached constant."""
    masks = [use.keep_mask for _, use, _ in uses if isinstance(use.keep_mask, DropoutMask)]
    return [_step_of(mask, launcher, device) if mask.device_step is None else mask.device_step for mask in masks]


def _step_of(mask: DropoutMask, launcher: Launcher, device: torch.device) -> Tensor:
    return launcher.get_or_create(("step", mask.step), lambda: torch.tensor(mask.step, device=device))


def _positions(uses: Sequence[GroupUse], x_TK: Tensor) -> Tensor | None:
    """Return positions [T] if there is dropout: from its owner's device memory, else a new tensor."""
    masks = [use.keep_mask for _, use, _ in uses if isinstance(use.keep_mask, DropoutMask)]
    on_device = [mask.device_positions_T for mask in masks if mask.device_positions_T is not None]
    if len(on_device) == len(masks):
        return on_device[0] if on_device else None
    return to_device(torch.from_numpy(positions_of(uses, len(x_TK))), x_TK.device)


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
    """Return Y of each operator, and S."""
    widths = [x_TK.shape[1], *(weight_KN.shape[1] for weight_KN in weights)]
    products = _products(x_TK, widths, factors, steps, factors_B, uses_B, positions_T)
    shrunk, used = products.shrink(x_TK), products.plan.used_ops
    accumulating = [
        i in used and accumulates_into_base_gemm(widths[0], bias is not None) for i, bias in enumerate(biases)
    ]
    ys = [
        x_TK.new_empty(len(x_TK), weight_KN.shape[1]) if first else _base(x_TK, weight_KN, bias)
        for first, weight_KN, bias in zip(accumulating, weights, biases, strict=True)
    ]
    products.write([y_TN if first else None for first, y_TN in zip(accumulating, ys, strict=True)], biases, shrunk)
    for first, y_TN, weight_KN in zip(accumulating, ys, weights, strict=True):
        if first:
            y_TN.addmm_(x_TK, weight_KN)
    products.add([None if accumulating[i] or i not in used else y_TN for i, y_TN in enumerate(ys)], shrunk)
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
    """Return (dX, empty without weights; all gradients of factors, in the places that the uses describe)."""
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
    """Save x if an A is trained, and nothing for the frozen weights."""
    x_TK, weights, biases, factors, steps, factors_B, uses_B, positions_T = inputs
    ctx.biases_are_one = None in biases  # such a list counts as one argument without a gradient, not as several
    uses = _rows(uses_B, USE)
    ctx.width_in, ctx.wanted = x_TK.shape[1], [factor.requires_grad for factor in factors]
    ctx.lengths = len(weights) if x_TK.requires_grad else 0, len(factors)
    saved_x = x_TK if (uses["da"] >= 0).any() else None
    tensors = [*(weights if x_TK.requires_grad else ()), *factors, *steps]
    ctx.save_for_backward(saved_x, output[-1], factors_B, uses_B, positions_T, *tensors)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x_TK, shrunk, factors_B, uses_B, positions_T, *tensors = ctx.saved_tensors
    num_weights, num_factors = ctx.lengths
    weights, factors = tensors[:num_weights], tensors[num_weights : num_weights + num_factors]
    steps, dys = tensors[num_weights + num_factors :], [dy_TN.contiguous() for dy_TN in grads[:-1]]
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
    """Return a gradient for each of the flat `factors`, None if it is not wanted."""
    laid_out = are_laid_out(uses, rows)
    shaped = [factor for factor, has_place in zip(factors, laid_out, strict=True) if has_place]
    views = iter(_unflatten_dense_tensors(gradients, shaped))  # type: ignore[no-untyped-call]  # one call, not hundreds
    gradients_of_all = [next(views) if has_place else None for has_place in laid_out]
    return [gradient if wants else None for gradient, wants in zip(gradients_of_all, wanted, strict=True)]


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
    plans = launcher.subcache("multi_lora plans", _NUM_PLANS)
    plan = plans.get_or_create(plan_key, lambda: LaunchPlan(uses, rows, len(stream), widths, stream.dtype, launcher))
    pointed = [*factors, *steps]
    addresses = tuple(tensor.data_ptr() for tensor in pointed)
    table: DeviceTable = launcher.get_or_create(
        ("factors", rows.tobytes(), addresses), lambda: launcher.upload(add_addresses(rows, factors, steps))
    )
    return GroupProducts(launcher, plan, table, pointed, stream.dtype, positions_T)


def _bytes(rows: Rows) -> Tensor:
    return torch.from_numpy(np.array(np.frombuffer(rows.tobytes(), np.uint8)))


def _rows(raw_B: Tensor, dtype: np.dtype[Any]) -> Rows:
    return raw_B.numpy().view(dtype)
