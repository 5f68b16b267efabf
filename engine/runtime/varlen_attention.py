"""Attention of all segments of a packed stream in one call of flash attention: torch.nn.attention.varlen.varlen_attn.

It reads grouped key heads as they are and takes windows; what it does not do goes by segment (`why_not` says why). Its
sums depend on a segment alone; those of its backward are in no fixed order, so gradients on CUDA are equal beside any
neighbours to rounding, not bit for bit. Legend: T tokens, H query heads, G key heads, D head width, S segments.
"""

import itertools
from dataclasses import dataclass, field

import torch
from torch.nn.attention.varlen import varlen_attn

from engine.kernels.transfer import to_device

Masks = dict[tuple[int, int, int | None], torch.Tensor]  # by length, prefix and window
FLASH = "flash attention"  # the path of a call
_DTYPES = (torch.bfloat16, torch.float16)
_MAX_HEAD_WIDTH = 256


@dataclass
class Shared:
    """What all layers make once of one stream: masks, and the segments' bounds on the device. `paths`: which way they
    took, and why."""

    masks: Masks = field(default_factory=dict)
    bounds: tuple[torch.Tensor, int] | None = None
    paths: set[str] = field(default_factory=set)

    def on_device(self, cu_seqlens: list[int], device: torch.device) -> tuple[torch.Tensor, int]:
        """(bounds [S + 1] int32, tokens of the longest segment), once; the device is not waited for."""
        if self.bounds is None:
            longest = max(end - start for start, end in itertools.pairwise(cu_seqlens))
            self.bounds = to_device(torch.tensor(cu_seqlens, dtype=torch.int32), device), longest
        return self.bounds


def why_not(query: torch.Tensor, softcap: float | None, has_prefixes: bool) -> str | None:
    """Why attention goes by segment; None where it need not."""
    width = query.shape[-1]
    if not query.is_cuda:
        return f"on {query.device.type}"
    if query.dtype not in _DTYPES:
        return f"flash attention takes bfloat16 and float16, not {str(query.dtype).removeprefix('torch.')}"
    if softcap is not None:
        return "flash attention has no soft-capping"
    if has_prefixes:
        return "a task has prefixes of its own"
    if width % 8 or width > _MAX_HEAD_WIDTH:
        return f"flash attention takes heads of a multiple of 8 up to {_MAX_HEAD_WIDTH}, not of {width}"
    if not torch.backends.cuda.is_flash_attention_available():
        return "torch is built without flash attention"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "flash attention needs compute capability 8.0"
    return None


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: tuple[torch.Tensor, int],
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """[1, H, T, D] by [1, G, T, D] -> [1, T, H, D]: causal within each segment, of at most `window` keys."""
    q_THD, k_TGD, v_TGD = (heads[0].transpose(0, 1) for heads in (query, key, value))
    cu_seqlens_S, longest = bounds
    result = varlen_attn(
        q_THD, k_TGD, v_TGD, cu_seqlens_S, cu_seqlens_S, longest, longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # keys before the query's own, and none after
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(result, torch.Tensor)
    return result.unsqueeze(0)
