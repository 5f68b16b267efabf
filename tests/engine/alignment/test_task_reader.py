"""A step may span rounds: it goes on from any microbatch, and each task adds its part to a round."""

import dataclasses
import random
from bisect import insort
from collections import Counter, defaultdict

import numpy as np
import pytest

from engine.alignment.dataset import TokenizedDataset
from engine.alignment.microbatch import Microbatch, MicrobatchKind, Range
from engine.alignment.packing import PackedTask, rounds
from engine.alignment.task_reader import EVALUATION_COST
from engine.task import Interval, Training
from tests.thoroughness import seeds

Key = tuple[str, int, MicrobatchKind]


def dataset(draw: random.Random, num_rows: int, longest: int = 40) -> TokenizedDataset:
    lengths = [draw.randint(2, longest) for _ in range(num_rows)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(offsets[-1], dtype=np.int32) + 1
    bears_loss = np.array([draw.random() < 0.7 for _ in ids])
    bears_loss[offsets[1:] - 1] = True
    return TokenizedDataset(ids, bears_loss, offsets, np.arange(num_rows), np.array(lengths), (), 0)


def member(draw: random.Random, name: str, **fields: float) -> PackedTask:
    values: dict[str, float] = {
        "num_steps": draw.randint(1, 3),
        "global_batch_size": draw.choice([1, 4, 30, 200]),
        "micro_batch_size": draw.randint(1, 8),
        "heldout_fraction": draw.choice([0.0, 0.5]),
        "evaluate_every_steps": draw.choice([0, 1]),
        **fields,
    }
    training = Training(1e-3, seed=draw.randint(0, 9), **values)  # type: ignore[arg-type]
    rows = dataset(draw, draw.choice([2, 40, 90]))
    round_tokens = draw.choice([0, 1, 60, 500])
    extra = draw.choice([(0, 0), (3, 0), (0, 5)])
    return PackedTask(name, rows, training, int(values["num_steps"]), 0, *extra, round_tokens)


def sequences_of(microbatch: Microbatch, range_: Range) -> list[tuple[int, bytes, bytes]]:
    at, sequences = range_.start, []
    for segment in range_.segments:
        part = slice(at, at + segment.num_tokens)
        ids, targets = microbatch.token_ids_T[part].tobytes(), microbatch.targets_T[part].tobytes()
        sequences.append((segment.stream_offset_tokens, ids, targets))
        at += segment.num_tokens
    return sequences


class Trainer:
    """Follows the positions of tasks as an executor does."""

    def __init__(self, members: list[PackedTask]) -> None:
        self.members = {m.task: m for m in members}
        self.done: dict[str, list[Interval]] = defaultdict(list)
        self.trained: dict[Key, list[tuple[int, bytes, bytes]]] = defaultdict(list)
        self.denominators: dict[Key, set[int]] = defaultdict(set)

    def run(self, microbatch: Microbatch) -> None:
        for range_ in microbatch.ranges:
            each, key = self.members[range_.task], (range_.task, range_.step, microbatch.kind)
            assert range_.step == each.step
            self.trained[key] += sequences_of(microbatch, range_)
            self.denominators[key].add(range_.num_step_target_tokens)
            for segment in range_.segments:
                start = segment.stream_offset_tokens
                insort(self.done[range_.task], (start, start + segment.num_tokens))
            if range_.is_last:
                is_step = microbatch.kind is MicrobatchKind.TRAIN
                self.done[range_.task] = []
                self.members[range_.task] = dataclasses.replace(
                    each, step=each.step + is_step, is_evaluated=not is_step
                )

    def positions(self) -> list[PackedTask]:
        return [dataclasses.replace(m, done=tuple(self.done[name])) for name, m in self.members.items()]


def whole(each: PackedTask) -> dict[Key, list[tuple[int, bytes, bytes]]]:
    """Return the sequences of every step and evaluation of a task, whose rounds are whole steps."""
    trainer = Trainer([dataclasses.replace(each, round_tokens=0)])
    for microbatch in rounds(trainer.positions(), 10_000, 1):
        trainer.run(microbatch)
    return {key: sorted(sequences) for key, sequences in trainer.trained.items()}


@pytest.mark.parametrize("seed", seeds(120, 40))
def test_a_stream_may_be_opened_again_anywhere_with_any_layout_and_neighbours(seed: int) -> None:
    draw = random.Random(seed)
    members = [member(draw, f"t{i}") for i in range(draw.randint(1, 4))]
    trainer, is_open = Trainer(members), True
    while is_open:
        is_open, together = False, draw.sample(trainer.positions(), draw.randint(1, len(members)))
        if draw.random() < 0.1:
            together = trainer.positions()  # so that the end is reached
        for _, microbatch in zip(range(draw.randint(1, 9)), _stream(draw, together), strict=False):
            trainer.run(microbatch)
        is_open = next(rounds(trainer.positions(), 100, 1), None) is not None
    expected = {key: sequences for each in members for key, sequences in whole(each).items()}
    assert {key: sorted(sequences) for key, sequences in trainer.trained.items()} == expected
    assert all(len(denominators) == 1 for denominators in trainer.denominators.values())


def _stream(draw: random.Random, members: list[PackedTask]) -> "list[Microbatch]":
    return list(rounds(members, draw.choice([30, 128, 1000]), draw.choice([1, 8])))


def test_each_task_adds_its_tokens_to_a_round_and_a_large_step_spans_many() -> None:
    draw = random.Random(0)
    quanta = {"small": 0, "large": 300, "larger": 900}
    members = [
        dataclasses.replace(
            member(draw, name, num_steps=100, global_batch_size=8 if name == "small" else 4000, heldout_fraction=0.0),
            dataset=dataset(draw, 4100),
            num_virtual_tokens=0,
            num_prefix_tokens=0,
            round_tokens=quanta[name],
        )
        for name in quanta
    ]
    added, steps = Counter[str](), Counter[str]()
    for microbatch in rounds(members, 512, 1):
        if microbatch.round == 60:
            break
        for range_ in microbatch.ranges:
            added[range_.task] += range_.num_effective_tokens
            steps[range_.task] += range_.is_last
    assert steps == {"small": 60, "large": 0, "larger": 0}
    assert added["large"] == pytest.approx(60 * 300, rel=0.02) and added["larger"] == pytest.approx(60 * 900, rel=0.02)


def test_an_evaluation_is_cut_like_training_at_its_own_cost() -> None:
    draw = random.Random(0)
    evaluating = dataclasses.replace(
        member(draw, "e", num_steps=3, global_batch_size=4, heldout_fraction=0.9, evaluate_every_steps=1),
        dataset=dataset(draw, 3000),
        round_tokens=400,
    )
    tokens = defaultdict[int, float](float)
    for microbatch in rounds([evaluating], 512, 1):
        cost = EVALUATION_COST if microbatch.kind is MicrobatchKind.EVALUATE else 1.0
        tokens[microbatch.round] += microbatch.num_tokens * cost
    assert max(tokens.values()) < 400 + 8 * 43 and len(tokens) > 100
