"""Attention over a packed stream: each segment attends to itself, causally.

On CUDA it is one call of flash attention where that is possible (`varlen_attention`), on a CPU one autograd node
(`segment_attention`), and otherwise one call of SDPA per segment. It is registered with transformers'
AttentionInterface, so that every architecture that uses this interface works unchanged; the model's keyword argument
`cu_seqlens` has the segments' bounds. Grouped heads, sliding windows, soft-capping and scaling are supported; anything
else is refused.

Legend: T tokens, H query heads, G key heads, D head width, L tokens of a segment.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from engine.errors import BackboneUnsupportedError
from engine.peft.mounted import AttentionCall
from engine.runtime.segment_attention import segment_attention
from engine.runtime.varlen_attention import FLASH, AttentionCache, Masks, fallback_reason, varlen_attention

NAME = "muxtune_packed"


def register() -> None:
    """Registers `attn_implementation="muxtune_packed"` with transformers. Idempotent.

    No mask is registered: cu_seqlens bounds the segments. With a mask, transformers would look for packed sequences in
    the position ids, and so wait for the device in every forward pass.
    """
    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seqlens: list[int] | None = None,
    prefixes: Mapping[int, Mapping[int, tuple[torch.Tensor, torch.Tensor]]] | None = None,
    calls: list[AttentionCall] | None = None,
    attention_cache: AttentionCache | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Computes [1, H, T, D] by [1, G, T, D] -> [1, T, H, D]. Source: transformers' attention interface.

    `prefixes`: by id of the module and first token of a segment, the keys and values [1, G, P, D] that the segment also
    sees. `calls`: every call is recorded in this list. `attention_cache`: tensors that all layers of this stream share.
    """
    if cu_seqlens is None:
        raise BackboneUnsupportedError(f"{type(module).__name__} does not pass cu_seqlens to its attention")
    if dropout or s_aux is not None or attention_mask is not None or is_causal is False:
        raise BackboneUnsupportedError(
            f"{type(module).__name__} needs attention dropout, sinks, a mask or bidirectional attention: not supported"
        )
    if calls is not None:
        group_size = query.shape[1] // key.shape[1]
        calls.append(AttentionCall(module, key.shape[1], key.shape[3], group_size, sliding_window is not None))
    module_prefixes, cache = (prefixes or {}).get(id(module), {}), attention_cache or AttentionCache()
    reason = fallback_reason(query, softcap, bool(module_prefixes))
    cache.paths.add(FLASH if reason is None else f"by segment: {reason}")
    if reason is None:
        bounds = cache.bounds_on(query.device, cu_seqlens)
        return varlen_attention(query, key, value, bounds, scaling, sliding_window), None
    longest = max(end - start for start, end in itertools.pairwise(cu_seqlens))
    sees_all = softcap is None and not module_prefixes and (sliding_window is None or longest <= sliding_window)
    if sees_all and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        return segment_attention(query, key, value, cu_seqlens, scaling), None
    outputs = []
    for start, end in itertools.pairwise(cu_seqlens):
        q, k, v = (t[:, :, start:end] for t in (query, key, value))
        if start in module_prefixes:
            prefix = module_prefixes[start]
            k, v = (torch.cat([p.to(t.dtype), t], dim=2) for p, t in zip(prefix, (k, v), strict=True))
        outputs.append(_segment(q, k, v, scaling, sliding_window, softcap, cache.masks).transpose(1, 2))
    return torch.cat(outputs, dim=1), None  # the layout that the output's projection reads


def _segment(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    masks: Masks,
) -> torch.Tensor:
    """Attends [1, H, L, D] to [1, G, P + L, D]: to all P keys before the segment, and to its own up to the query."""
    length, num_prefix, repeats = q.shape[2], k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    is_grouped = repeats > 1 and softcap is None and q.device.type == "cpu"  # that kernel needs no copy for each head
    if repeats > 1 and not is_grouped:
        k, v = (heads.repeat_interleave(repeats, dim=1) for heads in (k, v))
    sdpa = functools.partial(nn.functional.scaled_dot_product_attention, q, k, v, scale=scaling, enable_gqa=is_grouped)
    if softcap is None and not num_prefix and (window is None or length <= window):
        return sdpa(is_causal=True)
    shape = length, num_prefix, window
    if shape not in masks:
        masks[shape] = _mask(*shape, q)
    if softcap is None:
        return sdpa(attn_mask=masks[shape])
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    scores = (scores + masks[shape]).to(torch.promote_types(q.dtype, torch.float32))
    return torch.softmax(scores, dim=-1).to(q.dtype) @ v


def _mask(length: int, num_prefix: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """Returns [L, P + L], 0 where a query may look and -inf elsewhere.

    Its type is `like`'s: SDPA would hold a bool mask twice.
    """
    keys = torch.arange(-num_prefix, length, device=like.device)
    distance_LL = torch.arange(length, device=like.device)[:, None] - keys[None, :]
    allowed_LL = (distance_LL >= 0) & (distance_LL < (window or num_prefix + length))
    return torch.zeros_like(distance_LL, dtype=like.dtype).masked_fill_(~allowed_LL, float("-inf"))
