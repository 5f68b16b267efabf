"""Packing of rounds: the microbatches in which every member of an hTask takes one optimizer step.

Each task's global batch is cut into slices of at most `micro_batch_size` sequences that fit the token budget. Slices of
all tasks are packed into few microbatches, first-fit decreasing, within that budget. Only a sequence longer than the
budget exceeds it, alone: a microbatch has at most the larger of the budget and the longest sequence, padded.
In one microbatch a task has one contiguous range, padded at its tail to a multiple of the chunk.
Source: MuxTune's chunk-based alignment (arXiv 2603.02885). Legend: T tokens of the stream.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from engine.alignment.dataset import RowOrder, Split, TokenizedDataset, split
from engine.alignment.microbatch import IGNORE, Microbatch, MicrobatchKind, Range, Segment
from engine.task import Training, evaluation_is_due


@dataclass(frozen=True)
class PackedTask:
    """A task of the hTask with its data; `step` of its `num_steps` steps are done.

    Each of its sequences starts with `num_virtual_tokens` tokens (id 0): the executor replaces their embeddings, and
    the last of them predicts the sequence's first token. `num_prefix_tokens` are not tokens of the stream, but each
    sequence attends to them: they count in the budget.
    """

    task: str
    dataset: TokenizedDataset
    training: Training
    num_steps: int
    step: int
    num_virtual_tokens: int = 0
    num_prefix_tokens: int = 0

    @cached_property
    def split(self) -> Split:
        return split(self.dataset.num_rows, self.training)

    @cached_property
    def order(self) -> RowOrder:
        return RowOrder(self.training, self.split.train)

    def num_targets(self, row: int) -> int:
        first_bears_loss = bool(self.dataset.row(row)[1][0])
        return self.dataset.num_targets(row) + int(self.num_virtual_tokens > 0 and first_bears_loss)


@dataclass(frozen=True)
class PlacedRow:
    """A row of a step's batch: its index in the dataset and the unpadded tokens before it in the same batch."""

    row: int
    num_tokens: int
    stream_offset_tokens: int


@dataclass(frozen=True)
class BatchSlice:
    """At most `micro_batch_size` consecutive sequences of one task's batch."""

    member: PackedTask
    step: int
    sequences: tuple[PlacedRow, ...]
    num_step_target_tokens: int

    @property
    def num_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self.sequences)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens of the budget that it needs beside those of the stream."""
        return len(self.sequences) * self.member.num_prefix_tokens


def rounds(members: Sequence[PackedTask], token_budget: int, chunk_tokens: int) -> Iterator[Microbatch]:
    """Yield microbatches from each member's step on, until all members have done their last step and evaluation."""
    number = 0
    while True:
        unfinished = [(m, m.step + number) for m in members if m.step + number <= m.num_steps]
        if not unfinished:
            return
        yield from one_round(number, unfinished, token_budget, chunk_tokens)
        number += 1


def one_round(
    number: int, members: Sequence[tuple[PackedTask, int]], token_budget: int, chunk_tokens: int
) -> list[Microbatch]:
    """Return the evaluations that are due at the members' steps, then one training step of each unfinished member."""
    evaluate = [
        slice_
        for m, step in members
        if evaluation_is_due(m.training, step, m.num_steps)
        for slice_ in _slices(m, step, m.split.heldout, token_budget)
    ]
    train = [
        slice_
        for m, step in members
        if step < m.num_steps
        for slice_ in _slices(m, step, m.order.batch(step), token_budget)
    ]
    plans = [(MicrobatchKind.EVALUATE, bins) for bins in pack(evaluate, token_budget, chunk_tokens)]
    plans += [(MicrobatchKind.TRAIN, bins) for bins in pack(train, token_budget, chunk_tokens)]
    last = {(kind, s.member.task): i for i, (kind, slices) in enumerate(plans) for s in slices}
    return [
        _build(number, kind, slices, chunk_tokens, {t for (k, t), at in last.items() if k is kind and at == i},
               is_last_in_round=i == len(plans) - 1)
        for i, (kind, slices) in enumerate(plans)
    ]  # fmt: skip


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


def _slices(member: PackedTask, step: int, rows: NDArray[np.int64], token_budget: int) -> list[BatchSlice]:
    """Cut a batch into slices of at most `micro_batch_size` sequences within the budget; a longer one gets its own."""
    offsets, num_virtual, num_prefix = member.dataset.offsets, member.num_virtual_tokens, member.num_prefix_tokens
    lengths = [int(offsets[r + 1] - offsets[r]) + num_virtual for r in rows]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
    sequences = [PlacedRow(int(r), n, int(s)) for r, n, s in zip(rows, lengths, starts[:-1], strict=True)]
    targets = sum(member.num_targets(int(r)) for r in rows)
    cuts: list[list[PlacedRow]] = [[]]
    for sequence in sequences:
        filled = sum(placed.num_tokens + num_prefix for placed in [*cuts[-1], sequence])
        is_full = len(cuts[-1]) == member.training.micro_batch_size or filled > token_budget
        if cuts[-1] and is_full:
            cuts.append([])
        cuts[-1].append(sequence)
    return [BatchSlice(member, step, tuple(cut), targets) for cut in cuts if cut]


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
