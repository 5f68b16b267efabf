"""Spans of a stream, each changed by one task's adapter. Legend: T tokens of the stream, L of one span, N its width."""

import itertools
from collections.abc import Callable, Sequence

import torch

from engine.peft.adapter import Adapter
from engine.peft.layout import TaskSpan

Uses = Sequence[tuple[TaskSpan, Adapter]]


def rewrite(
    stream_TN: torch.Tensor, uses: Uses, change: Callable[[torch.Tensor, TaskSpan, Adapter], torch.Tensor]
) -> torch.Tensor:
    """The stream with each use's span changed. Split and cat, whose gradients are views and one copy."""
    if not uses:
        return stream_TN
    bounds = [0, *(bound for span, _ in uses for bound in (span.start, span.end)), len(stream_TN)]
    pieces = list(torch.split(stream_TN, [b - a for a, b in itertools.pairwise(bounds)]))
    for i, (span, adapter) in enumerate(uses):
        own = pieces[2 * i + 1].clone()  # what an adapter keeps of it for backward must not hold the whole stream
        pieces[2 * i + 1] = change(own, span, adapter).to(stream_TN.dtype)
    return torch.cat(pieces)
