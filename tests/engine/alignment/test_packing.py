"""Rounds contain every sequence once, with targets, order and offsets that do not depend on other tasks."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.alignment.dataset import RowOrder, TokenizedDataset, num_steps, split
from engine.alignment.microbatch import IGNORE, Microbatch, MicrobatchKind
from engine.alignment.packing import PackedTask, rounds
from engine.methods import Lora, Prefix, Prompt
from engine.methods.base import Method
from engine.planning.cost.memory_model import microbatch_tokens
from engine.task import TaskSpec, Training, evaluation_is_due
from tests.thoroughness import examples


def _dataset(lengths: list[int], first_token: int) -> TokenizedDataset:
    """Return rows of unique tokens, so that the first identifies a sequence.

    Odd positions bear loss, and in each third row also the first position.
    """
    num_tokens = sum(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(first_token, first_token + num_tokens, dtype=np.int32)
    bears_loss = np.zeros(num_tokens, np.bool_)
    for row, (start, end) in enumerate(itertools.pairwise(offsets)):
        bears_loss[start + 1 : end : 2] = True
        bears_loss[start] = row % 3 == 0
    lines = np.arange(1, len(lengths) + 1)
    return TokenizedDataset(ids, bears_loss, offsets, lines, np.array(lengths), (), 0)


@st.composite
def members(draw: st.DrawFn) -> list[PackedTask]:
    result = []
    for index in range(draw(st.integers(1, 4))):
        lengths = draw(st.lists(st.integers(2, 40), min_size=2, max_size=14))
        training = Training(
            learning_rate=1e-3,
            num_steps=draw(st.integers(1, 4)),
            micro_batch_size=draw(st.integers(1, 4)),
            global_batch_size=draw(st.integers(1, 8)),
            seed=draw(st.integers(0, 99)),
            shuffle=draw(st.booleans()),
            heldout_fraction=draw(st.sampled_from([0.0, 0.3])),
            evaluate_every_steps=draw(st.integers(0, 2)),
        )
        steps = num_steps(training, len(split(len(lengths), training).train))
        cursor = draw(st.integers(0, steps))
        extra = draw(st.sampled_from([(0, 0), (0, 0), (5, 0), (0, 7)]))  # of prompt tuning, of prefix tuning
        result.append(
            PackedTask(f"task-{index}", _dataset(lengths, 1 + 100_000 * index), training, steps, cursor, *extra)
        )
    return result


layouts = st.tuples(st.integers(16, 256), st.sampled_from([1, 8, 16]))
Sequences = dict[tuple[str, int, MicrobatchKind], list[tuple[int, tuple[int, ...], tuple[int, ...]]]]


def _sequences(microbatches: list[Microbatch], task: str | None = None) -> Sequences:
    """Return sequences as (offset in the task's stream, tokens, targets), sorted, by task, step and kind."""
    sequences_of: Sequences = collections.defaultdict(list)
    for microbatch in microbatches:
        for range_ in microbatch.ranges:
            if task not in (None, range_.task):
                continue
            at = range_.start
            for segment in range_.segments:
                part = slice(at, at + segment.num_tokens)
                sequences_of[range_.task, range_.step, microbatch.kind].append(
                    (
                        segment.stream_offset_tokens,
                        tuple(microbatch.token_ids_T[part].tolist()),
                        tuple(microbatch.targets_T[part].tolist()),
                    )
                )
                at += segment.num_tokens
    return {key: sorted(sequences) for key, sequences in sequences_of.items()}


def _expected(member: PackedTask) -> Sequences:
    """Return the sequences by definition: rows of each batch in order, each at the sum of the lengths before it.

    Virtual tokens precede each row; the last of them predicts the row's first token.
    """
    sequences_of: Sequences = {}
    num_virtual = member.num_virtual_tokens
    parts = split(member.dataset.num_rows, member.training)
    for step in range(member.step, member.num_steps + 1):
        batches = []
        if step < member.num_steps:
            batches.append((MicrobatchKind.TRAIN, RowOrder(member.training, parts.train).batch(step)))
        if evaluation_is_due(member.training, step, member.num_steps):
            batches.append((MicrobatchKind.EVALUATE, parts.heldout))
        for kind, rows in batches:
            offset, sequences = 0, []
            for row in rows:
                ids, bears_loss = member.dataset.row(int(row))
                tokens = [0] * num_virtual + ids.tolist()
                wanted = [IGNORE] * num_virtual + [
                    token if bears else IGNORE for token, bears in zip(ids.tolist(), bears_loss, strict=True)
                ]
                sequences.append((offset, tuple(tokens), (*wanted[1:], IGNORE)))
                offset += len(tokens)
            sequences_of[member.task, step, kind] = sequences
    return sequences_of


@given(members=members(), layout=layouts)
@settings(max_examples=examples(150), deadline=None)
def test_each_sequence_appears_once_and_does_not_depend_on_other_tasks(
    members: list[PackedTask], layout: tuple[int, int]
) -> None:
    microbatches = list(rounds(members, *layout))
    expected = {key: value for member in members for key, value in _expected(member).items()}
    assert _sequences(microbatches) == expected
    for member in members:  # independence: alone, and in another layout
        assert _sequences(list(rounds([member], 64, 4))) == _sequences(microbatches, member.task)


@given(members=members(), layout=layouts)
@settings(max_examples=examples(150), deadline=None)
def test_microbatches_are_well_formed(members: list[PackedTask], layout: tuple[int, int]) -> None:
    token_budget, chunk_tokens = layout
    by_name = {member.task: member for member in members}
    for microbatch in rounds(members, token_budget, chunk_tokens):
        assert microbatch.token_ids_T.dtype == microbatch.targets_T.dtype == np.int32
        assert microbatch.token_ids_T.shape == microbatch.targets_T.shape
        end = 0
        for range_ in microbatch.ranges:
            assert range_.start == end and range_.num_tokens % chunk_tokens == 0
            end += range_.num_tokens
            assert 0 <= range_.num_tokens - range_.num_effective_tokens < chunk_tokens  # padding in the tail only
            tail = slice(range_.start + range_.num_effective_tokens, end)
            assert (microbatch.targets_T[tail] == IGNORE).all() and (microbatch.token_ids_T[tail] == 0).all()
            assert range_.step == by_name[range_.task].step + microbatch.round
        assert end == microbatch.num_tokens
        names = [range_.task for range_ in microbatch.ranges]
        assert len(set(names)) == len(names)
        spent = [s.num_tokens + by_name[r.task].num_prefix_tokens for r in microbatch.ranges for s in r.segments]
        assert end <= max(token_budget, *spent, 0) + chunk_tokens - 1
        assert len(spent) == 1 or sum(spent) <= token_budget


@given(members=members(), layout=layouts)
@settings(max_examples=examples(100), deadline=None)
def test_rounds_end_and_denominators_count_the_whole_batch(members: list[PackedTask], layout: tuple[int, int]) -> None:
    microbatches = list(rounds(members, *layout))
    targets: collections.Counter[tuple[str, int, MicrobatchKind]] = collections.Counter()
    denominators, closed = {}, set()
    for microbatch in microbatches:
        for range_ in microbatch.ranges:
            key = range_.task, range_.step, microbatch.kind
            part = slice(range_.start, range_.start + range_.num_tokens)
            targets[key] += int((microbatch.targets_T[part] != IGNORE).sum())
            assert denominators.setdefault(key, range_.num_step_target_tokens) == range_.num_step_target_tokens
            assert key not in closed, "a range follows one with is_last"
            if range_.is_last:
                closed.add(key)
    assert dict(targets) == denominators
    assert set(denominators) == closed
    numbers = [m.round for m in microbatches]
    assert numbers == sorted(numbers)
    for number in set(numbers):
        kinds = [m.kind for m in microbatches if m.round == number]
        assert kinds == sorted(kinds, key=lambda kind: kind is MicrobatchKind.TRAIN)  # evaluations first
        assert [m.is_last_in_round for m in microbatches if m.round == number] == [False] * (len(kinds) - 1) + [True]


@given(members=members(), layout=layouts, skipped=st.integers(0, 3))
@settings(max_examples=examples(50), deadline=None)
def test_resuming_at_a_step_yields_the_remaining_microbatches(
    members: list[PackedTask], layout: tuple[int, int], skipped: int
) -> None:
    later = [dataclasses.replace(m, step=min(m.step + skipped, m.num_steps)) for m in members]
    whole, rest = _sequences(list(rounds(members, *layout))), _sequences(list(rounds(later, *layout)))
    first = {m.task: m.step for m in later}
    assert rest == {key: value for key, value in whole.items() if key[1] >= first[key[0]]}


def test_small_batches_share_one_microbatch_padded_only_at_tails() -> None:
    training = Training(1e-3, num_steps=1, global_batch_size=4, micro_batch_size=2)
    fused = [PackedTask(f"t{i}", _dataset([10, 10, 10, 10], 1000 * i), training, 1, 0) for i in range(3)]
    (microbatch,) = rounds(fused, token_budget=144, chunk_tokens=16)
    assert microbatch.num_tokens == 3 * 48
    assert [len(range_.segments) for range_ in microbatch.ranges] == [4, 4, 4]


def test_a_sequence_longer_than_the_budget_gets_its_own_microbatch() -> None:
    training = Training(1e-3, num_steps=1, global_batch_size=3, micro_batch_size=3, shuffle=False)
    microbatches = list(
        rounds([PackedTask("t", _dataset([5, 50, 5], 1), training, 1, 0)], token_budget=16, chunk_tokens=8)
    )
    assert sorted(m.num_tokens for m in microbatches) == [16, 56]


def test_finished_members_get_no_microbatch() -> None:
    training = Training(1e-3, num_steps=2, global_batch_size=1)
    assert list(rounds([PackedTask("t", _dataset([5, 5], 1), training, 2, 2)], 64, 8)) == []


@pytest.mark.parametrize("num_rows", [4000])
def test_a_long_evaluation_is_packed_quickly(num_rows: int) -> None:
    training = Training(1e-3, num_steps=1, micro_batch_size=4, heldout_fraction=0.9)
    member = PackedTask("t", _dataset([9] * num_rows, 1), training, 1, 1)
    assert sum(len(m.ranges[0].segments) for m in rounds([member], 128, 16)) == round(0.9 * num_rows)


@given(members=members(), layout=layouts)
@settings(max_examples=examples(100), deadline=None)
def test_no_microbatch_exceeds_the_tokens_that_the_memory_model_counts(
    members: list[PackedTask], layout: tuple[int, int]
) -> None:
    prefixes = {member.task: member.num_prefix_tokens for member in members}
    specs = []
    for member in members:
        method: Method = Lora(4, 4.0, ("q_proj",))
        method = Prompt(member.num_virtual_tokens) if member.num_virtual_tokens else method
        method = Prefix(member.num_prefix_tokens) if member.num_prefix_tokens else method
        specs.append(TaskSpec("b", method, "d", dataclasses.replace(member.training, max_sequence_tokens=40)))
    counted = microbatch_tokens(specs, *layout)
    for microbatch in rounds(members, counted, layout[1]):
        beside = sum(prefixes[range_.task] * len(range_.segments) for range_ in microbatch.ranges)
        assert microbatch.num_tokens + beside <= counted + (layout[1] if beside else 0)


def test_prefixes_of_many_tasks_stay_within_the_budget() -> None:
    """A prefix that is padded together with its task's tail would be counted in part only: a regression test."""
    training = Training(1e-3, num_steps=1, global_batch_size=1, micro_batch_size=1)
    many = [PackedTask(f"t{i}", _dataset([2, 2], 1000 * i), training, 1, 0, 0, 7) for i in range(12)]
    for microbatch in rounds(many, token_budget=64, chunk_tokens=16):
        assert microbatch.num_tokens + 7 * len(microbatch.ranges) <= 64
