"""Where each task's tokens lie in the microbatch being run. One object, owned by the backbone, read by every
mounted operator: there is no module-level state."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.alignment.microbatch import Microbatch, MicrobatchKind, Range

A = TypeVar("A")


@dataclass(frozen=True)
class TaskSpan:
    """One task's effective tokens [start, end) of the stream (its padding tail left out)."""

    task: str
    step: int
    start: int
    end: int
    positions_L: NDArray[np.int64]  # place of each token in the task's own stream
    lengths: tuple[int, ...] = ()  # tokens of each segment

    @classmethod
    def of(cls, range_: Range) -> "TaskSpan":
        positions = [np.arange(s.num_tokens, dtype=np.int64) + s.stream_offset_tokens for s in range_.segments]
        end = range_.start + range_.num_effective_tokens
        lengths = tuple(segment.num_tokens for segment in range_.segments)
        return cls(range_.task, range_.step, range_.start, end, np.concatenate(positions), lengths)


@dataclass
class Layout:
    """The spans of the current microbatch, and whether it trains (dropout is on)."""

    num_tokens: int = 0  # of the whole stream
    spans: tuple[TaskSpan, ...] = ()
    training: bool = False
    tasks: frozenset[str] = field(default=frozenset())

    def uses(self, adapters: Mapping[str, A]) -> list[tuple[TaskSpan, A]]:
        """The spans of the tasks that have an adapter in `adapters`, in the stream's order."""
        return [(span, adapters[span.task]) for span in self.spans if span.task in adapters]

    def set(self, microbatch: Microbatch, resident: frozenset[str]) -> None:
        """Lays out `microbatch`; ranges of tasks that are not resident run through the bare backbone."""
        self.spans = tuple(TaskSpan.of(r) for r in microbatch.ranges if r.task in resident and r.segments)
        self.training = microbatch.kind is MicrobatchKind.TRAIN
        self.tasks = resident
