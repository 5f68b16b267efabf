"""Causal attention of all segments of a packed stream on a CPU: one autograd node with one flash attention per segment.

The node saves the whole queries, keys, values and outputs once, the outputs in the layout that the output's projection
reads, and writes gradients in place. A segment's results are those of SDPA on it alone, bit for bit.
Legend: T tokens, H query heads, G key heads, D head width, L tokens of a segment.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def segment_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: Sequence[int], scaling: float | None
) -> torch.Tensor:
    """Computes [1, H, T, D] by [1, G, T, D] -> [1, T, H, D]."""
    result: torch.Tensor = _BySegment.apply(  # type: ignore[no-untyped-call]
        query, key, value, tuple(itertools.pairwise(cu_seqlens)), scaling
    )
    return result


class _BySegment(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        bounds: tuple[tuple[int, int], ...], scaling: float | None,
    ) -> torch.Tensor:  # fmt: skip
        output, normalisers = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format), []
        for start, end in bounds:
            q, k, v = (heads[:, :, start:end] for heads in (query, key, value))
            out, normaliser = _forward(q, k, v, 0.0, True, attn_mask=None, scale=scaling)
            output[:, start:end] = out.transpose(1, 2)
            normalisers.append(normaliser)
        ctx.bounds, ctx.scaling = bounds, scaling
        ctx.save_for_backward(query, key, value, output, *normalisers)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, doutput: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, output, *normalisers = ctx.saved_tensors
        grads = [torch.empty_like(heads) for heads in (query, key, value)]
        for (start, end), normaliser in zip(ctx.bounds, normalisers, strict=True):
            q, k, v = (heads[:, :, start:end] for heads in (query, key, value))
            dout, out = (t[:, start:end].transpose(1, 2) for t in (doutput, output))
            segment_grads = _backward(dout, q, k, v, out, normaliser, 0.0, True, attn_mask=None, scale=ctx.scaling)
            for grad, segment_grad in zip(grads, segment_grads, strict=True):
                grad[:, :, start:end] = segment_grad
        return *grads, None, None
