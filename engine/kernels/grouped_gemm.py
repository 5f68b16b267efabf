"""Linear operators of many tasks, each with its own widths, in one launch: for bottleneck adapters and DoRA.

    C_u = scale_u (A_u W_u^T + b_u)
    dA_u = scale_u dC_u W_u;   dW_u = scale_u dC_u^T A_u;   db_u = scale_u * column sums of dC_u

A use is one task's operator on its own tokens. Flat vectors hold the rows of one use after the other, each use's [L, K]
or [L, N] dense. Sums are float32 along at most 1024 terms; partial sums are then added in a fixed order, so the result
of a use depends on that use alone. Bytes: A and C once if N and K are at most 64, W once for each 64 rows (from the
cache); backward dC twice, A once.
On CUDA, cuda/grouped_gemm.cu. Legend: L tokens of one use, K inputs, N outputs.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.kernels import cupy_launcher
from engine.kernels.grouped_gemm_device import MatrixProduct, launch_products
from engine.kernels.launch import SUFFIXES


def grouped_gemm(
    a: Tensor, num_tokens: Sequence[int], weights: Sequence[Tensor], biases: Sequence[Tensor], scales: Sequence[float]
) -> Tensor:
    """Return flat C of flat A. `weights` [N, K] and `biases` [N] (of all uses, or none) float32; A of any float type.

    Raises ValueError if sizes, types or devices do not fit.
    """
    _check(a, num_tokens, weights, biases, scales)
    if a.is_cuda and a.dtype in SUFFIXES:
        result: Tensor = grouped_gemm_op(a, num_tokens, [_dense(w) for w in weights], biases, scales)
        return result
    return _reference(a, num_tokens, weights, biases, scales)


def _reference(
    a: Tensor, num_tokens: Sequence[int], weights: Sequence[Tensor], biases: Sequence[Tensor], scales: Sequence[float]
) -> Tensor:
    rows = _split_rows(a, num_tokens, [weight.shape[1] for weight in weights])
    products = []
    for i, (a_LK, weight_NK, scale) in enumerate(zip(rows, weights, scales, strict=True)):
        bias_N = biases[i].to(a.dtype) if biases else None
        c_LN = torch.nn.functional.linear(a_LK, weight_NK.to(a.dtype), bias_N)
        products.append((c_LN if scale == 1 else scale * c_LN).flatten())
    return torch.cat(products) if products else a


def _split_rows(flat: Tensor, num_tokens: Sequence[int], widths: Sequence[int]) -> list[Tensor]:
    """Return the rows [L, W] of each use."""
    parts = torch.split(flat, [count * width for count, width in zip(num_tokens, widths, strict=True)])
    return [part.view(count, width) for part, count, width in zip(parts, num_tokens, widths, strict=True)]


def _dense(weight_NK: Tensor) -> Tensor:
    """Return the weight dense along one of its dimensions, as nearly all weights are already."""
    return weight_NK if 1 in weight_NK.stride() else weight_NK.contiguous()


@torch.library.custom_op("muxtune::grouped_gemm", mutates_args=())
def grouped_gemm_op(
    a: Tensor, num_tokens: Sequence[int], weights: Sequence[Tensor], biases: Sequence[Tensor], scales: Sequence[float]
) -> Tensor:
    c = a.new_empty(_num_outputs(num_tokens, weights))
    rows = _split_rows(a, num_tokens, [weight.shape[1] for weight in weights])
    outputs = _split_rows(c, num_tokens, [weight.shape[0] for weight in weights])
    bias_of_use = biases or itertools.repeat(None, len(rows))
    products = [
        MatrixProduct(a_LK, weight_NK.T, c_LN, scale, bias_N)
        for a_LK, weight_NK, c_LN, scale, bias_N in zip(rows, weights, outputs, scales, bias_of_use, strict=True)
    ]
    launch_products(cupy_launcher.launcher_of(a.device), products)
    return c


@torch.library.custom_op("muxtune::grouped_gemm_backward", mutates_args=())
def grouped_gemm_backward_op(
    a: Tensor | None, dc: Tensor, num_tokens: Sequence[int], weights: Sequence[Tensor], scales: Sequence[float],
    wants_a: bool, wanted_weights: Sequence[bool], wanted_biases: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (flat dA, or empty; flat float32 gradients of the wanted weights, then of the wanted biases)."""
    inputs = sum(count * weight.shape[1] for count, weight in zip(num_tokens, weights, strict=True))
    da = dc.new_empty(inputs if wants_a else 0)
    launcher = cupy_launcher.launcher_of(dc.device)
    outputs = _split_rows(dc, num_tokens, [weight.shape[0] for weight in weights])
    if wants_a:
        rows = _split_rows(da, num_tokens, [weight.shape[1] for weight in weights])
        launch_products(launcher, [MatrixProduct(*each) for each in zip(outputs, weights, rows, scales, strict=True)])
    gradients = dc.new_empty(_num_gradients(weights, wanted_weights, wanted_biases), dtype=torch.float32)
    rest, products = gradients, []
    if a is not None:
        rows = _split_rows(a, num_tokens, [weight.shape[1] for weight in weights])
        for a_LK, dc_LN, weight, scale, wants in zip(rows, outputs, weights, scales, wanted_weights, strict=True):
            if wants:
                dw_NK, rest = rest[: weight.numel()].view(weight.shape), rest[weight.numel() :]
                products.append(MatrixProduct(dc_LN.T, a_LK, dw_NK, scale))
    ones = dc.new_ones(1, max(num_tokens, default=0))
    for dc_LN, scale, wants in zip(outputs, scales, wanted_biases or [False] * len(outputs), strict=True):
        if wants:  # the columns' sums, as a product with ones
            width = dc_LN.shape[1]
            products.append(MatrixProduct(ones[:, : len(dc_LN)], dc_LN, rest[:width].view(1, width), scale))
            rest = rest[width:]
    launch_products(launcher, products)
    return da, gradients


@grouped_gemm_op.register_fake
def _(
    a: Tensor, num_tokens: Sequence[int], weights: Sequence[Tensor], biases: Sequence[Tensor], scales: Sequence[float]
) -> Tensor:
    return a.new_empty(_num_outputs(num_tokens, weights))


@grouped_gemm_backward_op.register_fake
def _(
    a: Tensor | None, dc: Tensor, num_tokens: Sequence[int], weights: Sequence[Tensor], scales: Sequence[float],
    wants_a: bool, wanted_weights: Sequence[bool], wanted_biases: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = sum(count * weight.shape[1] for count, weight in zip(num_tokens, weights, strict=True))
    gradients = dc.new_empty(_num_gradients(weights, wanted_weights, wanted_biases), dtype=torch.float32)
    return dc.new_empty(inputs if wants_a else 0), gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, ctx.num_tokens, weights, biases, ctx.scales = inputs
    ctx.wanted_weights = [weight.requires_grad for weight in weights]
    ctx.wanted_biases = [bias.requires_grad for bias in biases]
    ctx.wants_a = a.requires_grad
    ctx.save_for_backward(a if any(ctx.wanted_weights) else None, *weights)


def _backward(ctx: Any, dc: Tensor) -> tuple[Any, ...]:
    a, *weights = ctx.saved_tensors
    da, gradients = grouped_gemm_backward_op(
        a, dc.contiguous(), ctx.num_tokens, weights, ctx.scales, ctx.wants_a, ctx.wanted_weights, ctx.wanted_biases
    )
    shapes = [weight.shape for weight in weights] + [weight.shape[:1] for weight in weights[: len(ctx.wanted_biases)]]
    grads: list[Tensor | None] = []
    for shape, wants in zip(shapes, [*ctx.wanted_weights, *ctx.wanted_biases], strict=True):
        size = shape.numel() if wants else 0
        grads.append(gradients[:size].view(shape) if wants else None)
        gradients = gradients[size:]
    return da if ctx.wants_a else None, None, grads[: len(weights)], grads[len(weights) :], None


grouped_gemm_op.register_autograd(_backward, setup_context=_setup_context)


def _num_outputs(num_tokens: Sequence[int], weights: Sequence[Tensor]) -> int:
    return sum(count * weight.shape[0] for count, weight in zip(num_tokens, weights, strict=True))


def _num_gradients(weights: Sequence[Tensor], wanted_weights: Sequence[bool], wanted_biases: Sequence[bool]) -> int:
    num_of_weights = sum(weight.numel() for weight, wants in zip(weights, wanted_weights, strict=True) if wants)
    return num_of_weights + sum(len(weight) for weight, wants in zip(weights, wanted_biases, strict=False) if wants)


def _check(
    a: Tensor, num_tokens: Sequence[int], weights: Sequence[Tensor], biases: Sequence[Tensor], scales: Sequence[float]
) -> None:
    if not len(num_tokens) == len(weights) == len(scales) or len(biases) not in (0, len(weights)):
        raise ValueError(
            f"each of {len(num_tokens)} uses needs a weight and a scale, and all or none a bias: got {len(weights)} "
            f"weights, {len(scales)} scales and {len(biases)} biases"
        )
    inputs = sum(count * weight.shape[1] for count, weight in zip(num_tokens, weights, strict=True))
    if a.ndim != 1 or not a.is_contiguous() or len(a) != inputs:
        raise ValueError(
            f"A must be flat and contiguous with {inputs} elements by its tokens and weights, got {tuple(a.shape)}"
        )
    for i, bias in enumerate(biases):
        if bias.shape != weights[i].shape[:1] or not bias.is_contiguous():
            raise ValueError(f"bias {tuple(bias.shape)} does not fit a weight of {tuple(weights[i].shape)}")
    for tensor in (*weights, *biases):
        if tensor.device != a.device:
            raise ValueError(f"a weight or bias is on {tensor.device}, A on {a.device}")
        if tensor.dtype != torch.float32 and tensor.dtype != a.dtype:
            raise ValueError(f"weights and biases must be float32, got {tensor.dtype}")
