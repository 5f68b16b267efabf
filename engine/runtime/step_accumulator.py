"""Totals over the microbatches of a task's current step or evaluation, which is not complete yet.

Legend: P parameters of the task.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from engine.alignment.microbatch import MicrobatchKind, Range
from engine.alignment.step_digest import StepDigest
from engine.results import ShadowCheck
from engine.task import Interval


@dataclass
class AloneStep:
    """The gradient and loss of a step that is run again for its task alone."""

    gradient_P: torch.Tensor
    loss: float = 0.0

    def compare(self, fused_loss: float, fused_P: torch.Tensor) -> ShadowCheck:
        """Returns the relative differences of the fused step. Overwrites the gradient."""
        norm = torch.linalg.vector_norm(self.gradient_P).item()
        difference = torch.linalg.vector_norm(self.gradient_P.neg_().add_(fused_P)).item()
        return ShadowCheck(_relative(fused_loss - self.loss, self.loss), _relative(difference, norm))


@dataclass
class StepAccumulator:
    """Totals of a step, or of the evaluation before it. `done`: intervals of its stream, sorted and apart."""

    is_evaluation: bool = False
    loss: float = 0.0
    num_effective_tokens: int = 0
    num_target_tokens: int = 0
    num_padding_tokens: int = 0
    seconds: float = 0.0
    neighbours: set[str] = field(default_factory=set)
    digest: StepDigest = field(default_factory=StepDigest)
    done: list[Interval] = field(default_factory=list)
    alone: AloneStep | None = None  # if the step is to be verified
    shadow_check: ShadowCheck | None = None

    def continues_with(self, range_: Range, kind: MicrobatchKind) -> bool:
        """Returns whether the range repeats no sequence of the step and, if it is the last one, leaves none out."""
        if self.done and self.is_evaluation != (kind is MicrobatchKind.EVALUATE):
            return False
        after = _with_range(self.done, range_)
        is_apart = all(before[1] <= following[0] for before, following in pairwise(after))
        return is_apart and (not range_.is_last or (len(after) == 1 and after[0][0] == 0))

    def add_done(self, range_: Range) -> None:
        """Adds the range's sequences to `done`."""
        self.done = _with_range(self.done, range_)


def _with_range(done: Sequence[Interval], range_: Range) -> list[Interval]:
    """Returns the intervals with those of the range's sequences; intervals that touch are one."""
    after = list(done)
    for segment in range_.segments:
        start = segment.stream_offset_tokens
        end = start + segment.num_tokens
        at = bisect_right(after, (start, end))
        if at < len(after) and after[at][0] == end:
            end = after.pop(at)[1]
        if at > 0 and after[at - 1][1] == start:
            start = after.pop(at - 1)[0]
            at -= 1
        after.insert(at, (start, end))
    return after


def _relative(difference: float, value: float) -> float:
    """Returns |difference| / |value|; 0 if both are 0."""
    return abs(difference) / abs(value) if value else float(difference != 0)
