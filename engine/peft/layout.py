"""Where each task's tokens lie in the microbatch being run. One object, owned by the backbone, read by every
mounted operator: there is no module-level state."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from engine.alignment.microbatch import Microbatch, MicrobatchKind, Range
from engine.kernels.transfer import to_device

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
    device_step: torch.Tensor | None = None  # the step where kernels read it
    device_positions_T: torch.Tensor | None = None  # and the places of all the stream's tokens

    @classmethod
    def of(cls, range_: Range, device_step: torch.Tensor, device_positions_T: torch.Tensor) -> "TaskSpan":
        end = range_.start + range_.num_effective_tokens
        lengths = tuple(segment.num_tokens for segment in range_.segments)
        there = device_step, device_positions_T
        return cls(range_.task, range_.step, range_.start, end, positions_of(range_), lengths, *there)


def positions_of(range_: Range) -> NDArray[np.int64]:
    """[L]: the place of each of its effective tokens in the task's own stream."""
    return np.concatenate([np.arange(s.num_tokens) + s.stream_offset_tokens for s in range_.segments])


@dataclass
class Layout:
    """The spans of the current microbatch, and whether it trains (dropout is on)."""

    num_tokens: int = 0  # of the whole stream
    spans: tuple[TaskSpan, ...] = ()
    training: bool = False
    device: torch.device = field(default=torch.device("cpu"))
    _steps: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)

    def uses(self, adapters: Mapping[str, A]) -> list[tuple[TaskSpan, A]]:
        """The spans of the tasks that have an adapter in `adapters`, in the stream's order."""
        return [(span, adapters[span.task]) for span in self.spans if span.task in adapters]

    def set(self, microbatch: Microbatch, resident: frozenset[str]) -> None:
        """Lays out `microbatch`; ranges of tasks that are not resident run through the bare backbone."""
        self._steps = {task: own for task, own in self._steps.items() if task in resident}
        ranges = [r for r in microbatch.ranges if r.task in resident and r.segments]
        positions_T = np.zeros(microbatch.num_tokens, np.int64)
        for r in ranges:
            positions_T[r.start : r.start + r.num_effective_tokens] = positions_of(r)
        there_T = to_device(torch.from_numpy(positions_T), self.device)
        spans = tuple(TaskSpan.of(r, self._device_step(r), there_T) for r in ranges)
        self.lay(spans, microbatch.kind is MicrobatchKind.TRAIN)

    def lay(self, spans: tuple[TaskSpan, ...], training: bool) -> None:
        """The same, of spans as they are."""
        self.spans, self.training = spans, training

    def _device_step(self, range_: Range) -> torch.Tensor:
        """Memory of the task's own for as long as it is resident: a captured graph sees the step change in it.

        Written only where it changes: autograd refuses a backward pass whose forward pass read another step.
        """
        cell, step = self._steps.get(range_.task, (None, None))
        if cell is None:
            cell = torch.empty((), dtype=torch.int64, device=self.device)
        if step != range_.step:
            self._steps[range_.task] = cell.fill_(range_.step), range_.step
        return cell
