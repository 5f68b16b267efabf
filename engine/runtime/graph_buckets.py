"""Microbatches brought into few forms: what a graph captured of one serves every other of its form.

A form says who trains and how long the ranges are, all of one length. Each range is filled up by its own sequences over
again, which bear no loss: they compute what the task's own tokens do, so nothing overflows in them that would not have
without them, and their gradients are zero. Tokens of tasks that have left are left out. What else differs between
microbatches of a form is in one array, which becomes one copy to the device.

Legend: U tasks, L tokens of each range, T = U L tokens of the stream, S segments, M rows that the head reads.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.alignment.microbatch import IGNORE, Microbatch, MicrobatchKind, Range
from engine.peft.layout import TaskSpan, positions_of
from engine.runtime.task_state import TaskTrainingState

_LEAST_TOKENS = 16  # of a range
_ALWAYS_TOKENS = 512  # of a stream: so few are launches above all, whatever was filled up
_MOST_TOKENS = 2048  # of a stream: more are bound by arithmetic
_SEGMENT_TOKENS = 8  # of a stream, for each of which it has room for one segment


@dataclass(frozen=True)
class GraphBucket:
    """`runs`: who trains, by name; the same objects, as their parameters lie where a graph has found them."""

    kind: MicrobatchKind
    runs: tuple[TaskTrainingState, ...]
    num_range_tokens: int
    num_segments: int
    num_rows: int

    @property
    def trains(self) -> bool:
        return self.kind is MicrobatchKind.TRAIN

    @property
    def num_tokens(self) -> int:
        return len(self.runs) * self.num_range_tokens

    @property
    def starts(self) -> range:
        """Of the ranges."""
        return range(0, self.num_tokens, self.num_range_tokens)


def form_of(microbatch: Microbatch, tasks: Mapping[str, TaskTrainingState]) -> GraphBucket | None:
    """None where it has none: it is large, or a task computes what no graph can replay."""
    trains = microbatch.kind is MicrobatchKind.TRAIN
    own = [r for r in microbatch.ranges if r.task in tasks and r.num_effective_tokens]
    ranges = {r.task: r for r in sorted(own, key=lambda range_: range_.task)}
    runs = tuple(tasks[name] for name in ranges)
    if not 0 < len(own) == len(runs) or not all(is_replayable(run, trains) for run in runs):
        return None
    size = max(_LEAST_TOKENS, _power_of_two(max(r.num_effective_tokens for r in ranges.values())))
    num_tokens = len(runs) * size
    if num_tokens > min(_MOST_TOKENS, max(_ALWAYS_TOKENS, 2 * microbatch.num_tokens)):
        return None
    num_segments = sum(len(list(_cut(r, size))) for r in ranges.values())
    num_segments = _power_of_two(max(num_segments, num_tokens // _SEGMENT_TOKENS))
    num_targets = sum(int((microbatch.targets_T[_own(r)] != IGNORE).sum()) for r in own)
    num_rows = num_tokens // 2 if num_targets <= num_tokens // 2 else num_tokens
    return GraphBucket(microbatch.kind, runs, size, num_segments, num_rows)


def is_replayable(run: TaskTrainingState, trains: bool) -> bool:
    """Prompts and prefixes depend on where segments begin; some of dropout's masks (DoRA's) are made by the host."""
    method, adapters = run.assignment.spec.method, run.adapters.values()
    if method.num_virtual_tokens or method.num_prefix_tokens:
        return False
    return not (trains and method.dropout and any(adapter.changes_output(trains) for adapter in adapters))


class GraphInputs:
    """What differs between the microbatches of a form, in memory that stays where it is.

    Places [T]: in the task's own stream, for dropout. Rows [M]: those that bear a loss, then others, each once; weights
    [M] float64: 1 / (targets of the task's whole step), 0 where there is no loss. Bounds [S + 1]: of segments, those
    that are not needed empty. Steps [U].
    """

    def __init__(self, form: GraphBucket, device: torch.device) -> None:
        sizes = [form.num_tokens] * 3 + [form.num_rows] * 3 + [form.num_segments + 1, len(form.runs)]
        self._whole = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self.token_ids_T, self.positions_T, places_T, *of_rows, self.bounds_S, steps_U = torch.split(self._whole, sizes)
        self.rows_M, self.targets_M, weights_M = of_rows
        self.weights_M, size, nowhere = weights_M.view(torch.float64), form.num_range_tokens, np.zeros(0, np.int64)
        self.spans = tuple(
            TaskSpan(run.assignment.task, 0, start, start + size, nowhere, (), step, places_T)
            for run, start, step in zip(form.runs, form.starts, steps_U.unbind(), strict=True)
        )

    def write(self, values: NDArray[np.int64]) -> None:
        """`values` as `packed` gives them. The host does not wait."""
        host = torch.from_numpy(values)
        self._whole.copy_(host.pin_memory() if self._whole.device.type == "cuda" else host, non_blocking=True)


def packed(form: GraphBucket, microbatch: Microbatch) -> NDArray[np.int64]:
    """The microbatch in its form: what `GraphInputs` holds, in its order, end to end; weights as their bits."""
    size, ranges = form.num_range_tokens, {r.task: r for r in microbatch.ranges}
    ids_UL, positions_UL, places_UL = np.zeros((3, len(form.runs), size), np.int64)
    lengths, steps, weights = list[int](), list[int](), list[NDArray[np.float64]]()
    for i, range_ in enumerate(ranges[run.assignment.task] for run in form.runs):
        ids_UL[i] = np.resize(microbatch.token_ids_T[_own(range_)], size)
        positions_UL[i] = np.resize(np.concatenate([np.arange(s.num_tokens) for s in range_.segments]), size)
        places_UL[i] = np.resize(positions_of(range_), size)
        lengths += _cut(range_, size)
        steps.append(range_.step)
        weights.append(np.full(len(_targets(microbatch, range_)), 1 / max(1, range_.num_step_target_tokens)))
    theirs_M, rows_M = _rows(form, microbatch)
    others = np.setdiff1d(np.arange(form.num_tokens), rows_M, assume_unique=True)[: form.num_rows - len(rows_M)]
    of_rows_3M = np.zeros((3, form.num_rows), np.int64)
    of_rows_3M[0] = np.concatenate([rows_M, others])
    of_rows_3M[1, : len(rows_M)] = microbatch.targets_T[theirs_M]
    of_rows_3M[2].view(np.float64)[: len(rows_M)] = np.concatenate(weights)
    bounds_S = np.full(form.num_segments + 1, form.num_tokens)
    bounds_S[: len(lengths) + 1] = [0, *itertools.accumulate(lengths)]
    parts = ids_UL.ravel(), positions_UL.ravel(), places_UL.ravel(), of_rows_3M.ravel(), bounds_S, np.array(steps)
    return np.concatenate(parts)


def unpacked(form: GraphBucket, microbatch: Microbatch, loss_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of the microbatch that bear a loss of the form's tasks, their losses), of the losses of the form's rows."""
    rows = torch.from_numpy(_rows(form, microbatch)[0])
    return rows, loss_M[: len(rows)]


def _rows(form: GraphBucket, microbatch: Microbatch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Those that bear a loss: where they are in the microbatch, and in the form."""
    ranges = {r.task: r for r in microbatch.ranges}
    own = [ranges[run.assignment.task] for run in form.runs]
    found = [_targets(microbatch, range_) for range_ in own]
    return (
        np.concatenate([range_.start + places for range_, places in zip(own, found, strict=True)]),
        np.concatenate([start + places for start, places in zip(form.starts, found, strict=True)]),
    )


def _targets(microbatch: Microbatch, range_: Range) -> NDArray[np.int64]:
    """Of a range's tokens, those that bear a loss."""
    return np.flatnonzero(microbatch.targets_T[_own(range_)] != IGNORE)


def _own(range_: Range) -> slice:
    """Its tokens without the tail."""
    return slice(range_.start, range_.start + range_.num_effective_tokens)


def _cut(range_: Range, num_tokens: int) -> Iterator[int]:
    """Lengths of its segments, over again until there are so many tokens."""
    for segment in itertools.cycle(range_.segments):
        if num_tokens <= 0:
            return
        yield min(segment.num_tokens, num_tokens)
        num_tokens -= segment.num_tokens


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
