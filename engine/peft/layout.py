"""The place of each task's tokens in the microbatch that is running. One object, owned by the backbone, read by every
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
    """One task's effective tokens [start, end) of the stream, without its padding tail."""

    task: str
    step: int
    start: int
    end: int
    positions_L: NDArray[np.int64]  # of each token in the task's own stream
    lengths: tuple[int, ...] = ()  # tokens of each segment
    device_step: torch.Tensor | None = None  # the step in device memory, where kernels read it
    device_positions_T: torch.Tensor | None = None  # the positions of all tokens of the stream, in device memory

    @classmethod
    def of(cls, range_: Range, device_step: torch.Tensor, device_positions_T: torch.Tensor) -> "TaskSpan":
        end = range_.start + range_.num_effective_tokens
        lengths = tuple(segment.num_tokens for segment in range_.segments)
        positions_L = positions_of(range_)
        return cls(range_.task, range_.step, range_.start, end, positions_L, lengths, device_step, device_positions_T)


def positions_of(range_: Range) -> NDArray[np.int64]:
    """Return the positions [L] of the range's effective tokens in the task's own stream."""
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
        """Return the spans of tasks that have an adapter in `adapters`, each with it, in the stream's order."""
        return [(span, adapters[span.task]) for span in self.spans if span.task in adapters]

    def lay_out(self, microbatch: Microbatch, resident: frozenset[str]) -> None:
        """Lay out `microbatch`; ranges of tasks that are not resident run through the bare backbone."""
        self._steps = {task: cell for task, cell in self._steps.items() if task in resident}
        ranges = [r for r in microbatch.ranges if r.task in resident and r.segments]
        positions_T = np.zeros(microbatch.num_tokens, np.int64)
        for r in ranges:
            positions_T[r.start : r.start + r.num_effective_tokens] = positions_of(r)
        device_positions_T = to_device(torch.from_numpy(positions_T), self.device)
        spans = tuple(TaskSpan.of(r, self._device_step(r), device_positions_T) for r in ranges)
        self.lay_out_spans(spans, microbatch.kind is MicrobatchKind.TRAIN)

    def lay_out_spans(self, spans: tuple[TaskSpan, ...], training: bool) -> None:
        """Lay out these spans."""
        self.spans, self.training = spans, training

    def _device_step(self, range_: Range) -> torch.Tensor:
        """Return the device memory of the task's step, the same while the task is resident: captured graphs read it.

        It is written only when the step changes: autograd refuses a backward pass after a write to a saved tensor.
        """
        cell, step = self._steps.get(range_.task, (None, None))
        if cell is None:
            cell = torch.empty((), dtype=torch.int64, device=self.device)
        if step != range_.step:
            self._steps[range_.task] = cell.fill_(range_.step), range_.step
        return cell
