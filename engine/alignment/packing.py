"""Packing of rounds: the microbatches in which every member of an hTask advances by one step, or by a part of one.

Each task's global batch is cut into slices of at most `micro_batch_size` sequences that fit the token budget
(engine/alignment/task_reader.py). Slices of all tasks are packed into few microbatches, first-fit decreasing, within
that budget. Only a sequence longer than the budget exceeds it, alone: a microbatch has at most the larger of the budget
and the longest sequence, padded.
In one microbatch a task has one contiguous range, padded at its tail to a multiple of the chunk.
Source: MuxTune's chunk-based alignment (arXiv 2603.02885). Legend: T tokens of the stream.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.alignment.microbatch import IGNORE, Microbatch, MicrobatchKind, Range, Segment
from engine.alignment.task_reader import BatchSlice, PackedTask, Part, PlacedRow, TaskReader

__all__ = ["PackedTask", "one_round", "pack", "rounds"]


def rounds(members: Sequence[PackedTask], token_budget: int, chunk_tokens: int) -> Iterator[Microbatch]:
    """Yield microbatches from each member's position on, until all members have done their last step and evaluation.

    In a round each member advances by its `round_tokens`, at most to the end of its step; an evaluation that is due
    comes first. A round contains at least one slice.
    """
    readers = [TaskReader(member, member.step, token_budget) for member in members]
    number = 0
    while readers := [reader for reader in readers if not reader.is_done]:
        if parts := [part for part in (reader.next_part() for reader in readers) if part.slices]:
            yield from _pack_round(number, parts, token_budget, chunk_tokens)
            number += 1


def one_round(
    number: int, members: Sequence[tuple[PackedTask, int]], token_budget: int, chunk_tokens: int
) -> list[Microbatch]:
    """Return the first round after these members have done these numbers of steps."""
    readers = [TaskReader(member, step, token_budget) for member, step in members]
    parts = [reader.next_part() for reader in readers if not reader.is_done]
    return list(_pack_round(number, parts, token_budget, chunk_tokens))


def _pack_round(number: int, parts: Sequence[Part], token_budget: int, chunk_tokens: int) -> Iterator[Microbatch]:
    """Yield the microbatches of one round: evaluations and training are packed apart, evaluations first."""
    slices = [slice_ for part in parts for slice_ in part.slices]
    plans = [
        (kind, bin_)
        for kind in (MicrobatchKind.EVALUATE, MicrobatchKind.TRAIN)
        for bin_ in pack([slice_ for slice_ in slices if slice_.kind is kind], token_budget, chunk_tokens)
    ]
    ended = {(kind, part.slices[0].member.task) for part in parts for kind in part.ended}
    last = {(kind, s.member.task): i for i, (kind, bin_) in enumerate(plans) for s in bin_}
    for i, (kind, bin_) in enumerate(plans):
        complete = {task for k, task in ended if k is kind and last[k, task] == i}
        yield _build(number, kind, bin_, chunk_tokens, complete, is_last_in_round=i == len(plans) - 1)


def pack(slices: Sequence[BatchSlice], token_budget: int, chunk_tokens: int) -> list[list[BatchSlice]]:
    """Pack slices first-fit decreasing into bins of `token_budget` tokens with tails; a larger slice gets its own bin.

    Slices of one task keep their order inside a bin.
    """
    bins: list[_Bin] = []
    for index in sorted(range(len(slices)), key=lambda i: (-slices[i].num_tokens - slices[i].num_prefix_tokens, i)):
        slice_ = slices[index]
        for bin_ in bins:
            if bin_.num_tokens_with(slice_, chunk_tokens) <= token_budget:
                break
        else:
            bin_ = _Bin()
            bins.append(bin_)
        bin_.add(index, slice_, chunk_tokens)
    return [[slices[index] for index in sorted(bin_.indices)] for bin_ in bins]


class _Bin:
    """A microbatch that is being filled: padded tokens with prefixes, unpadded tokens by task, indices of slices."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_tokens_of: dict[str, int] = {}
        self.indices: list[int] = []

    def num_tokens_with(self, slice_: BatchSlice, chunk_tokens: int) -> int:
        filled = self.num_tokens_of.get(slice_.member.task, 0)
        added = _padded(filled + slice_.num_tokens, chunk_tokens) - _padded(filled, chunk_tokens)
        return self.num_tokens + added + slice_.num_prefix_tokens

    def add(self, index: int, slice_: BatchSlice, chunk_tokens: int) -> None:
        self.num_tokens = self.num_tokens_with(slice_, chunk_tokens)
        task = slice_.member.task
        self.num_tokens_of[task] = self.num_tokens_of.get(task, 0) + slice_.num_tokens
        self.indices.append(index)


def _build(
    number: int,
    kind: MicrobatchKind,
    slices: Sequence[BatchSlice],
    chunk_tokens: int,
    last: set[str],
    is_last_in_round: bool,
) -> Microbatch:
    by_task: dict[str, list[BatchSlice]] = {}
    for slice_ in slices:
        by_task.setdefault(slice_.member.task, []).append(slice_)
    token_ids, targets, ranges, start = [], [], [], 0
    for task, parts in by_task.items():
        sequences = [s for part in parts for s in part.sequences]
        num_tokens = _padded(sum(s.num_tokens for s in sequences), chunk_tokens)
        ids_T, targets_T = _fill(parts[0].member, sequences, num_tokens)
        token_ids.append(ids_T)
        targets.append(targets_T)
        segments = tuple(Segment(s.num_tokens, s.stream_offset_tokens) for s in sequences)
        denominator = parts[0].num_step_target_tokens
        ranges.append(Range(task, parts[0].step, start, num_tokens, segments, denominator, task in last))
        start += num_tokens
    return Microbatch(number, kind, np.concatenate(token_ids), np.concatenate(targets), tuple(ranges), is_last_in_round)


def _fill(
    member: PackedTask, sequences: Sequence[PlacedRow], num_tokens: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the tokens and shifted targets of one range; its tail is token 0 without a target."""
    ids_T, targets_T = np.zeros(num_tokens, np.int32), np.full(num_tokens, IGNORE, np.int32)
    at = 0
    for sequence in sequences:
        ids_L, bears_loss_L = member.dataset.row(sequence.row)
        at += member.num_virtual_tokens
        if member.num_virtual_tokens and bears_loss_L[0]:
            targets_T[at - 1] = ids_L[0]
        ids_T[at : at + len(ids_L)] = ids_L
        targets_T[at : at + len(ids_L) - 1] = np.where(bears_loss_L[1:], ids_L[1:], IGNORE)
        at += len(ids_L)
    return ids_T, targets_T


def _padded(num_tokens: int, chunk_tokens: int) -> int:
    return -(-num_tokens // chunk_tokens) * chunk_tokens
