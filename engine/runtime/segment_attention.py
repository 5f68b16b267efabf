"""Causal attention of all segments of a packed stream on a CPU, as one node of autograd: torch's flash attention, a
segment at a time.

Queries, keys and values are kept whole, and what is given, once, in the order in which the output's projection reads
it; gradients are written in their places. A segment's values are those of SDPA on it alone, bit for bit.
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
    """[1, H, T, D] by [1, G, T, D] -> [1, T, H, D]."""
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
        given, normalisers = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format), []
        for start, end in bounds:
            q, k, v = (heads[:, :, start:end] for heads in (query, key, value))
            out, normaliser = _forward(q, k, v, 0.0, True, attn_mask=None, scale=scaling)
            given[:, start:end] = out.transpose(1, 2)
            normalisers.append(normaliser)
        ctx.bounds, ctx.scaling = bounds, scaling
        ctx.save_for_backward(query, key, value, given, *normalisers)
        return given

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dgiven: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, given, *normalisers = ctx.saved_tensors
        grads = [torch.empty_like(heads) for heads in (query, key, value)]
        for (start, end), normaliser in zip(ctx.bounds, normalisers, strict=True):
            q, k, v = (heads[:, :, start:end] for heads in (query, key, value))
            dout, out = (t[:, start:end].transpose(1, 2) for t in (dgiven, given))
            own = _backward(dout, q, k, v, out, normaliser, 0.0, True, attn_mask=None, scale=ctx.scaling)
            for grad, part in zip(grads, own, strict=True):
                grad[:, :, start:end] = part
        return *grads, None, None
