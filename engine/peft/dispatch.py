"""Spans of a stream, each changed by one task's adapter; what many tasks can do in one launch goes in one.

Legend: T tokens of the stream, L of one span, N its width.
"""

import itertools
from collections.abc import Sequence

import torch

from engine.kernels.multi_affine import AffineUse, multi_affine
from engine.peft.adapter import Adapter, Affine
from engine.peft.layout import TaskSpan

Uses = Sequence[tuple[TaskSpan, Adapter]]


def rewrite_input(x_TK: torch.Tensor, uses: Uses) -> torch.Tensor:
    """What the operator reads."""
    return _affine(x_TK, [(span, adapter.input_affine()) for span, adapter in uses])


def rewrite_output(y_TN: torch.Tensor, x_TK: torch.Tensor, uses: Uses, training: bool) -> torch.Tensor:
    """What the module answers: `after` where it is needed, then factors and offsets. Of any dimensions, T first."""
    y_TN = _after(y_TN, x_TK, [use for use in uses if use[1].changes_output(training)], training)
    found: list[tuple[TaskSpan, Affine | None]] = []
    for kind, own in _by_method(uses):
        affines = kind.output_affines([adapter for _, adapter in own], training)
        found += zip([span for span, _ in own], affines, strict=True)
    return _affine(y_TN, sorted(found, key=lambda pair: pair[0].start))


def _affine(stream_TN: torch.Tensor, found: Sequence[tuple[TaskSpan, Affine | None]]) -> torch.Tensor:
    """In the stream's order. A token may have several rows (heads, of a norm within an attention)."""
    if all(affine is None for _, affine in found):
        return stream_TN
    rows_N = stream_TN.reshape(-1, stream_TN.shape[-1])
    count = len(rows_N) // len(stream_TN)
    uses = [AffineUse(span.start * count, span.end * count, *affine) for span, affine in found if affine is not None]
    return multi_affine(rows_N, uses).view(stream_TN.shape)


def _after(stream_TN: torch.Tensor, x_TK: torch.Tensor, uses: Uses, training: bool) -> torch.Tensor:
    """Split and cat, whose gradients are views and one copy."""
    if not uses:
        return stream_TN
    bounds = [0, *(bound for span, _ in uses for bound in (span.start, span.end)), len(stream_TN)]
    pieces = list(torch.split(stream_TN, [b - a for a, b in itertools.pairwise(bounds)]))
    places = {span.start: 2 * i + 1 for i, (span, _) in enumerate(uses)}
    for kind, own in _by_method(uses):
        before = [pieces[places[span.start]] for span, _ in own]
        for (span, _), piece in zip(own, kind.after_all(own, x_TK, before, training), strict=True):
            pieces[places[span.start]] = piece.to(stream_TN.dtype)
    return torch.cat(pieces)


def _by_method(uses: Uses) -> list[tuple[type[Adapter], Uses]]:
    kinds = dict.fromkeys(type(adapter) for _, adapter in uses)
    return [(kind, [use for use in uses if type(use[1]) is kind]) for kind in kinds]
