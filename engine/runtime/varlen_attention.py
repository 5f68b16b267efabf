"""Attention of all segments of a packed stream in one call of flash attention: torch.nn.attention.varlen.varlen_attn.

It supports grouped key heads and windows; for the rest, attention runs segment by segment (`fallback_reason` says why).
A segment's results depend on that segment alone. The order of sums in backward varies, so gradients on CUDA are the
same beside any neighbours to rounding, not bit for bit. Legend: T tokens, H query heads, G key heads, D head width, S
segments.
"""

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn

from engine.kernels.transfer import to_device

Masks = dict[tuple[int, int, int | None], torch.Tensor]  # by length, prefix and window
FLASH = "flash attention"  # one of `AttentionCache.paths`
_DTYPES = (torch.bfloat16, torch.float16)
_MAX_HEAD_WIDTH = 256


class SegmentBounds(NamedTuple):
    """Bounds [S + 1] int32 of the segments on the device, and the number of tokens of the longest segment."""

    cu_seqlens_S: torch.Tensor
    max_segment_tokens: int


@dataclass
class AttentionCache:
    """Tensors that all layers share for one stream: masks, and the segments' bounds on the device.

    `paths`: the ways in which attention was computed, with the reason.
    """

    masks: Masks = field(default_factory=dict)
    bounds: SegmentBounds | None = None
    paths: set[str] = field(default_factory=set)

    def bounds_on(self, device: torch.device, cu_seqlens: list[int]) -> SegmentBounds:
        """Returns the bounds on the device, copied once; the host does not wait for the device."""
        if self.bounds is None:
            longest = max(end - start for start, end in itertools.pairwise(cu_seqlens))
            self.bounds = SegmentBounds(to_device(torch.tensor(cu_seqlens, dtype=torch.int32), device), longest)
        return self.bounds


def fallback_reason(query: torch.Tensor, softcap: float | None, has_prefixes: bool) -> str | None:
    """Returns why attention must run segment by segment; None if it need not."""
    width = query.shape[-1]
    if not query.is_cuda:
        return f"on {query.device.type}"
    if query.dtype not in _DTYPES:
        return f"flash attention supports bfloat16 and float16, not {str(query.dtype).removeprefix('torch.')}"
    if softcap is not None:
        return "flash attention has no soft-capping"
    if has_prefixes:
        return "a task has prefixes"
    if width % 8 or width > _MAX_HEAD_WIDTH:
        return f"flash attention supports heads of a multiple of 8 up to {_MAX_HEAD_WIDTH}, not of {width}"
    if not torch.backends.cuda.is_flash_attention_available():
        return "torch is built without flash attention"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "flash attention needs compute capability 8.0"
    return None


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: SegmentBounds,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Computes [1, H, T, D] by [1, G, T, D] -> [1, T, H, D].

    Attention is causal within each segment, with at most `window` keys.
    """
    q_THD, k_TGD, v_TGD = (heads[0].transpose(0, 1) for heads in (query, key, value))
    cu_seqlens_S, longest = bounds.cu_seqlens_S, bounds.max_segment_tokens
    result = varlen_attn(
        q_THD, k_TGD, v_TGD, cu_seqlens_S, cu_seqlens_S, longest, longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # keys before the query's, and none after it
        **_grouped_heads_options(varlen_attn, query.shape[1], key.shape[1]),
    )  # fmt: skip
    assert isinstance(result, torch.Tensor)
    return result.unsqueeze(0)


@functools.cache
def _grouped_heads_options(function: Callable[..., Any], num_heads: int, num_key_heads: int) -> dict[str, Any]:
    """Returns the options that let several query heads share a key head.

    torch 2.11 has no option for it and does not compare the numbers of heads; its kernel takes fewer key heads.
    """
    if num_heads == num_key_heads or "enable_gqa" not in inspect.signature(function).parameters:
        return {}
    return {"enable_gqa": True}
