"""Adapters applied to the spans of a stream, with one launch for many tasks where the method allows it.

Legend: T tokens of the stream, L of one span, N its width.
"""

import itertools
from collections.abc import Sequence

import torch

from engine.kernels.multi_affine import AffineUse, multi_affine
from engine.peft.adapter import Adapter, Affine
from engine.peft.layout import TaskSpan

Uses = Sequence[tuple[TaskSpan, Adapter]]  # a module's adapters on the spans of their tasks


def rewrite_input(x_TK: torch.Tensor, uses: Uses) -> torch.Tensor:
    """Return what the operator reads."""
    return _apply_affines(x_TK, [(span, adapter.input_affine()) for span, adapter in uses])


def rewrite_output(y_TN: torch.Tensor, x_TK: torch.Tensor, uses: Uses, training: bool) -> torch.Tensor:
    """Apply `change_outputs`, then factors and offsets, to a module's output of any shape with T first."""
    y_TN = _change_spans(y_TN, x_TK, [use for use in uses if use[1].changes_output(training)], training)
    affines: list[tuple[TaskSpan, Affine | None]] = []
    for kind, uses_of_kind in _by_method(uses):
        changes = kind.output_affines([adapter for _, adapter in uses_of_kind], training)
        affines += zip([span for span, _ in uses_of_kind], changes, strict=True)
    return _apply_affines(y_TN, sorted(affines, key=lambda pair: pair[0].start))


def _apply_affines(stream_TN: torch.Tensor, affines: Sequence[tuple[TaskSpan, Affine | None]]) -> torch.Tensor:
    """Apply changes given in the stream's order. A token may have several rows (heads, in a norm of an attention)."""
    if all(affine is None for _, affine in affines):
        return stream_TN
    rows_N = stream_TN.reshape(-1, stream_TN.shape[-1])
    rows_per_token = len(rows_N) // len(stream_TN)
    uses = [
        AffineUse(span.start * rows_per_token, span.end * rows_per_token, *affine)
        for span, affine in affines
        if affine is not None
    ]
    return multi_affine(rows_N, uses).view(stream_TN.shape)


def _change_spans(stream_TN: torch.Tensor, x_TK: torch.Tensor, uses: Uses, training: bool) -> torch.Tensor:
    """Replace the spans by their adapters' outputs, with split and cat: their gradients are views and one copy."""
    if not uses:
        return stream_TN
    bounds = [0, *(bound for span, _ in uses for bound in (span.start, span.end)), len(stream_TN)]
    pieces = list(torch.split(stream_TN, [b - a for a, b in itertools.pairwise(bounds)]))
    piece_of = {span.start: 2 * i + 1 for i, (span, _) in enumerate(uses)}
    for kind, uses_of_kind in _by_method(uses):
        ys = [pieces[piece_of[span.start]] for span, _ in uses_of_kind]
        outputs = kind.change_outputs(uses_of_kind, x_TK, ys, training)
        for (span, _), output_LN in zip(uses_of_kind, outputs, strict=True):
            pieces[piece_of[span.start]] = output_LN.to(stream_TN.dtype)
    return torch.cat(pieces)


def _by_method(uses: Uses) -> list[tuple[type[Adapter], Uses]]:
    kinds = dict.fromkeys(type(adapter) for _, adapter in uses)
    return [(kind, [use for use in uses if type(use[1]) is kind]) for kind in kinds]
