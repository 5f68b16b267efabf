"""Maps small microbatches to a few buckets: a graph captured for one microbatch of a bucket serves all others of it.

A bucket names the tasks and the length of the ranges, which is the same for all. Each range is filled up by repeating
its own sequences, without loss: they compute what the task's own tokens do, so they cause no overflow that the task
would not have without them, and their gradients are zero. Tokens of tasks that have left are omitted. What differs
between the microbatches of a bucket is held in one array, so that one copy brings it to the device.

Legend: U tasks, L tokens of each range, T = U L tokens of the stream, S segments, M rows that the head reads.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from engine.alignment.microbatch import IGNORE, Microbatch, MicrobatchKind, Range
from engine.peft.layout import TaskSpan, positions_of
from engine.runtime.task_state import TaskTrainingState

_MIN_RANGE_TOKENS = 16
_SMALL_TOKENS = 512  # a stream of so few tokens is bound by launches, however much is filled up
_MAX_TOKENS = 2048  # a stream of more tokens is bound by arithmetic
_TOKENS_PER_SEGMENT = 8  # a bucket has room for one segment per so many tokens

A = TypeVar("A")


@dataclass(frozen=True)
class GraphBucket:
    """The shapes and tasks for which one graph is captured. `tasks`: the resident tasks of the microbatch, by name.

    Tasks are compared by identity, because a graph holds their parameters' addresses.
    """

    kind: MicrobatchKind
    tasks: tuple[TaskTrainingState, ...]
    num_range_tokens: int
    num_segments: int
    num_rows: int

    @property
    def trains(self) -> bool:
        return self.kind is MicrobatchKind.TRAIN

    @property
    def num_tokens(self) -> int:
        return len(self.tasks) * self.num_range_tokens

    @property
    def range_starts(self) -> range:
        return range(0, self.num_tokens, self.num_range_tokens)


class BucketArrays(NamedTuple, Generic[A]):
    """Arrays that differ between the microbatches of a bucket: their sizes, or their values on the host or the device.

    They lie end to end in one int64 array, which `split` cuts. `stream_positions_T`: positions in the tasks' own
    streams, which key dropout. `rows_M`: rows that bear a loss, then others, each once. `weights_M`: float64 as bits, 1
    / (targets of the task's whole step), 0 without loss. `bounds_S`: [S + 1], unused segments are empty. `steps_U`:
    steps of tasks.
    """

    token_ids_T: A
    positions_T: A
    stream_positions_T: A
    rows_M: A
    targets_M: A
    weights_M: A
    bounds_S: A
    steps_U: A


def bucket_of(microbatch: Microbatch, tasks: Mapping[str, TaskTrainingState]) -> GraphBucket | None:
    """Returns the microbatch's bucket; None if it is large, or a graph cannot replay what one of its tasks computes."""
    trains = microbatch.kind is MicrobatchKind.TRAIN
    task_ranges = [r for r in microbatch.ranges if r.task in tasks and r.num_effective_tokens]
    ranges = {r.task: r for r in sorted(task_ranges, key=lambda range_: range_.task)}
    states = tuple(tasks[name] for name in ranges)
    if not 0 < len(task_ranges) == len(states) or not all(is_replayable(state, trains) for state in states):
        return None
    size = max(_MIN_RANGE_TOKENS, _power_of_two(max(r.num_effective_tokens for r in ranges.values())))
    num_tokens = len(states) * size
    if num_tokens > min(_MAX_TOKENS, max(_SMALL_TOKENS, 2 * microbatch.num_tokens)):
        return None
    num_segments = sum(len(list(_segment_lengths(r, size))) for r in ranges.values())
    num_segments = _power_of_two(max(num_segments, num_tokens // _TOKENS_PER_SEGMENT))
    num_targets = sum(len(_target_offsets(microbatch, r)) for r in task_ranges)
    num_rows = num_tokens // 2 if num_targets <= num_tokens // 2 else num_tokens
    return GraphBucket(microbatch.kind, states, size, num_segments, num_rows)


def is_replayable(state: TaskTrainingState, trains: bool) -> bool:
    """Returns whether a graph can replay the task.

    Prompts and prefixes depend on where segments begin, and the host makes some dropout masks (DoRA's).
    """
    method, adapters = state.assignment.spec.method, state.adapters.values()
    if method.num_virtual_tokens or method.num_prefix_tokens:
        return False
    return not (trains and method.dropout and any(adapter.changes_output(trains) for adapter in adapters))


class GraphInputs:
    """Device memory that holds the `BucketArrays` of one bucket at fixed addresses."""

    def __init__(self, bucket: GraphBucket, device: torch.device) -> None:
        sizes = _sizes(bucket)
        self._whole = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        arrays = BucketArrays(*torch.split(self._whole, list(sizes)))
        self.token_ids_T, self.positions_T = arrays.token_ids_T, arrays.positions_T
        self.rows_M, self.targets_M = arrays.rows_M, arrays.targets_M
        self.weights_M, self.bounds_S = arrays.weights_M.view(torch.float64), arrays.bounds_S
        self.spans = tuple(
            TaskSpan(
                task=state.assignment.task,
                step=0,
                start=start,
                end=start + bucket.num_range_tokens,
                positions_L=np.zeros(0, np.int64),
                device_step=step,
                device_positions_T=arrays.stream_positions_T,
            )
            for state, start, step in zip(bucket.tasks, bucket.range_starts, arrays.steps_U.unbind(), strict=True)
        )

    def write(self, values: NDArray[np.int64]) -> None:
        """Copies the values that `pack_inputs` returns. The host does not wait."""
        host = torch.from_numpy(values)
        self._whole.copy_(host.pin_memory() if self._whole.device.type == "cuda" else host, non_blocking=True)


def pack_inputs(bucket: GraphBucket, microbatch: Microbatch) -> NDArray[np.int64]:
    """Returns the microbatch as the bucket's `BucketArrays`, end to end."""
    sizes = _sizes(bucket)
    whole = np.zeros(sum(sizes), np.int64)
    arrays = BucketArrays(*np.split(whole, np.cumsum(sizes)[:-1]))
    size, ranges = bucket.num_range_tokens, _ranges_of(bucket, microbatch)
    lengths, weights = list[int](), list[NDArray[np.float64]]()
    for start, range_ in zip(bucket.range_starts, ranges, strict=True):
        stop = start + size
        arrays.token_ids_T[start:stop] = np.resize(microbatch.token_ids_T[_effective_tokens(range_)], size)
        positions = np.concatenate([np.arange(segment.num_tokens) for segment in range_.segments])
        arrays.positions_T[start:stop] = np.resize(positions, size)
        arrays.stream_positions_T[start:stop] = np.resize(positions_of(range_), size)
        lengths += _segment_lengths(range_, size)
        weights.append(np.full(len(_target_offsets(microbatch, range_)), 1 / max(1, range_.num_step_target_tokens)))
    rows = _target_rows(bucket, microbatch)
    num_targets = len(rows.in_bucket)
    other_rows = np.setdiff1d(np.arange(bucket.num_tokens), rows.in_bucket, assume_unique=True)
    arrays.rows_M[:] = np.concatenate([rows.in_bucket, other_rows[: bucket.num_rows - num_targets]])
    arrays.targets_M[:num_targets] = microbatch.targets_T[rows.in_microbatch]
    arrays.weights_M.view(np.float64)[:num_targets] = np.concatenate(weights)
    arrays.bounds_S[:] = bucket.num_tokens
    arrays.bounds_S[: len(lengths) + 1] = [0, *itertools.accumulate(lengths)]
    arrays.steps_U[:] = [range_.step for range_ in ranges]
    return whole


class RowLosses(NamedTuple):
    """Losses [M] of the microbatch's rows [M] that bear one, on the host."""

    rows_M: torch.Tensor
    loss_M: torch.Tensor


def unpack_losses(bucket: GraphBucket, microbatch: Microbatch, loss_M: torch.Tensor) -> RowLosses:
    """Returns the losses of the microbatch's rows, from the losses of the bucket's rows."""
    rows_M = torch.from_numpy(_target_rows(bucket, microbatch).in_microbatch)
    return RowLosses(rows_M, loss_M[: len(rows_M)])


class _TargetRows(NamedTuple):
    """Positions of the same rows in the microbatch and in the bucket."""

    in_microbatch: NDArray[np.int64]
    in_bucket: NDArray[np.int64]


def _target_rows(bucket: GraphBucket, microbatch: Microbatch) -> _TargetRows:
    """Returns the rows that bear a loss of one of the bucket's tasks."""
    ranges = _ranges_of(bucket, microbatch)
    offsets = [_target_offsets(microbatch, range_) for range_ in ranges]
    return _TargetRows(
        np.concatenate([range_.start + offset for range_, offset in zip(ranges, offsets, strict=True)]),
        np.concatenate([start + offset for start, offset in zip(bucket.range_starts, offsets, strict=True)]),
    )


def _sizes(bucket: GraphBucket) -> BucketArrays[int]:
    return BucketArrays(
        token_ids_T=bucket.num_tokens,
        positions_T=bucket.num_tokens,
        stream_positions_T=bucket.num_tokens,
        rows_M=bucket.num_rows,
        targets_M=bucket.num_rows,
        weights_M=bucket.num_rows,
        bounds_S=bucket.num_segments + 1,
        steps_U=len(bucket.tasks),
    )


def _ranges_of(bucket: GraphBucket, microbatch: Microbatch) -> list[Range]:
    """Returns the ranges of the bucket's tasks, in the bucket's order."""
    ranges = {range_.task: range_ for range_ in microbatch.ranges}
    return [ranges[state.assignment.task] for state in bucket.tasks]


def _target_offsets(microbatch: Microbatch, range_: Range) -> NDArray[np.int64]:
    """Returns the offsets in the range of the tokens that bear a loss."""
    return np.flatnonzero(microbatch.targets_T[_effective_tokens(range_)] != IGNORE)


def _effective_tokens(range_: Range) -> slice:
    """Returns the slice of the range without its tail."""
    return slice(range_.start, range_.start + range_.num_effective_tokens)


def _segment_lengths(range_: Range, num_tokens: int) -> Iterator[int]:
    """Yields the lengths of the range's segments, repeated until they hold `num_tokens`."""
    for segment in itertools.cycle(range_.segments):
        if num_tokens <= 0:
            return
        yield min(segment.num_tokens, num_tokens)
        num_tokens -= segment.num_tokens


def _power_of_two(minimum: int) -> int:
    return 1 << (minimum - 1).bit_length()
