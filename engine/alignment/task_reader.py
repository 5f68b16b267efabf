"""Reads one task's steps and evaluations in order, in slices, and in parts of a bounded number of tokens.

A step may span several parts: what is read of it is a set of intervals in its stream, so that reading can go on from
any microbatch, in another hTask and with another token budget.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from engine.alignment.dataset import RowOrder, Split, TokenizedDataset, split
from engine.alignment.microbatch import MicrobatchKind
from engine.task import EVALUATION_COST, Interval, Training, evaluation_is_due


@dataclass(frozen=True)
class PackedTask:
    """A task of the hTask with its data; `step` of its `num_steps` steps are done.

    Each of its sequences starts with `num_virtual_tokens` tokens (id 0): the executor replaces their embeddings, and
    the last of them predicts the sequence's first token. `num_prefix_tokens` are not tokens of the stream, but each
    sequence attends to them: they count in the budget.

    `round_tokens`: tokens that it adds to a round on average, of one step at most; 0: each round has a whole step.
    `is_evaluated`: the evaluation before step `step`, if one is due, is done. `done`: intervals of the stream of what
    comes next (that evaluation, else the step) that were read already.
    """

    task: str
    dataset: TokenizedDataset
    training: Training
    num_steps: int
    step: int
    num_virtual_tokens: int = 0
    num_prefix_tokens: int = 0
    round_tokens: int = 0
    is_evaluated: bool = False
    done: tuple[Interval, ...] = ()

    @cached_property
    def split(self) -> Split:
        return split(self.dataset.num_rows, self.training)

    @cached_property
    def order(self) -> RowOrder:
        return RowOrder(self.training, self.split.train)

    def count_targets(self, rows: NDArray[np.int64]) -> int:
        """Count the targets of these rows, with the first token of each where a virtual token predicts it."""
        count = int(self.dataset.num_targets_N[rows].sum())
        if self.num_virtual_tokens:
            count += int(self.dataset.bears_loss_S[self.dataset.offsets[rows]].sum())
        return count


@dataclass(frozen=True)
class PlacedRow:
    """A row of a step's batch: its index in the dataset and the unpadded tokens before it in the same batch."""

    row: int
    num_tokens: int
    stream_offset_tokens: int


@dataclass(frozen=True)
class BatchSlice:
    """At most `micro_batch_size` sequences of one task's step or evaluation, in order."""

    member: PackedTask
    kind: MicrobatchKind
    step: int
    sequences: tuple[PlacedRow, ...]
    num_step_target_tokens: int

    @cached_property
    def num_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self.sequences)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens of the budget that it needs beside those of the stream."""
        return len(self.sequences) * self.member.num_prefix_tokens

    @property
    def cost_tokens(self) -> float:
        """Tokens of training that cost as much."""
        return self.num_tokens * (EVALUATION_COST if self.kind is MicrobatchKind.EVALUATE else 1.0)


@dataclass(frozen=True)
class Part:
    """The slices that a task adds to one round. `ended`: the kinds of batch that have their last slice in it."""

    slices: Sequence[BatchSlice]
    ended: frozenset[MicrobatchKind]


class TaskReader:
    """Reads a task from its position on: the evaluation that is due before a step, then the step, and so on."""

    def __init__(self, member: PackedTask, step: int, token_budget: int) -> None:
        self._member, self._step, self._token_budget = member, step, token_budget
        self._credit_tokens = 0.0
        self._batches = self._batches_of_step(member.is_evaluated, member.done)

    @property
    def is_done(self) -> bool:
        return not self._batches

    def next_part(self) -> Part:
        """Return the slices that the task's credit pays for, none beyond the end of the current step.

        Each round adds `round_tokens` to the credit. A slice is not divided, so a round may be passed over, and the
        credit that is left over is kept (deficit round robin).
        """
        quantum = self._member.round_tokens
        self._credit_tokens += quantum
        slices, ended = list[BatchSlice](), set[MicrobatchKind]()
        while self._batches:
            batch = self._batches[0]
            while (slice_ := batch.peek()) is not None:
                if quantum and slice_.cost_tokens > self._credit_tokens:
                    return Part(slices, frozenset(ended))
                self._credit_tokens -= slice_.cost_tokens
                slices.append(batch.pop())
            ended.add(batch.kind)
            del self._batches[0]
        self._credit_tokens = min(self._credit_tokens, quantum)
        self._step += 1  # the next step begins in another round: it needs the optimizer
        self._batches = self._batches_of_step()
        return Part(slices, frozenset(ended))

    def _batches_of_step(self, is_evaluated: bool = False, done: Sequence[Interval] = ()) -> "list[_Batch]":
        """Return the evaluation and the batch that are left of the current step; `done` is of the first of them."""
        member, step, batches = self._member, self._step, list[tuple[MicrobatchKind, NDArray[np.int64]]]()
        if step <= member.num_steps and not is_evaluated and evaluation_is_due(member.training, step, member.num_steps):
            batches.append((MicrobatchKind.EVALUATE, member.split.heldout))
        if step < member.num_steps:
            batches.append((MicrobatchKind.TRAIN, member.order.batch(step)))
        return [
            _Batch(member, kind, step, rows, self._token_budget, done if index == 0 else ())
            for index, (kind, rows) in enumerate(batches)
        ]


class _Batch:
    """The slices of one step or evaluation that are left, cut one at a time."""

    def __init__(
        self,
        member: PackedTask,
        kind: MicrobatchKind,
        step: int,
        rows_B: NDArray[np.int64],
        token_budget: int,
        done: Sequence[Interval],
    ) -> None:
        self.kind, self._member, self._step, self._token_budget = kind, member, step, token_budget
        offsets = member.dataset.offsets
        lengths_B = offsets[rows_B + 1] - offsets[rows_B] + member.num_virtual_tokens
        starts_B = np.cumsum(lengths_B) - lengths_B
        self._num_targets = member.count_targets(rows_B)
        if done:
            first_D, last_D = np.array(done, np.int64).T
            index_B = np.searchsorted(first_D, starts_B, side="right") - 1
            is_left_B = (index_B < 0) | (starts_B >= last_D[index_B])
            rows_B, lengths_B, starts_B = rows_B[is_left_B], lengths_B[is_left_B], starts_B[is_left_B]
        placed = zip(rows_B.tolist(), lengths_B.tolist(), starts_B.tolist(), strict=True)
        self._slices = self._cut(PlacedRow(*values) for values in placed)
        self._next = next(self._slices, None)

    def peek(self) -> BatchSlice | None:
        return self._next

    def pop(self) -> BatchSlice:
        """Return the slice that `peek` returns, and go on to the next."""
        slice_, self._next = self._next, next(self._slices, None)
        assert slice_ is not None
        return slice_

    def _cut(self, sequences: Iterator[PlacedRow]) -> Iterator[BatchSlice]:
        """Cut into slices of at most `micro_batch_size` sequences within the budget; a longer one gets its own."""
        num_prefix, cut, num_tokens = self._member.num_prefix_tokens, list[PlacedRow](), 0
        for sequence in sequences:
            added = sequence.num_tokens + num_prefix
            if cut and (len(cut) == self._member.training.micro_batch_size or num_tokens + added > self._token_budget):
                yield self._slice(cut)
                cut, num_tokens = [], 0
            cut.append(sequence)
            num_tokens += added
        if cut:
            yield self._slice(cut)

    def _slice(self, cut: Sequence[PlacedRow]) -> BatchSlice:
        return BatchSlice(self._member, self.kind, self._step, tuple(cut), self._num_targets)
