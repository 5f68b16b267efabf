"""The digest of a step equals its definition, changes with each of its inputs and with nothing else, and its inputs
determine the dropout masks."""

import dataclasses
import hashlib
import itertools
import struct
from typing import Any

import numpy as np
import pytest

from engine.kernels import dropout
from engine.methods import Lora, Miss, Prompt, Vera
from engine.runtime.executor import Executor
from tests.engine.kernels.test_dropout import expected as reference_bit
from tests.engine.runtime.tiny import CONFIGS, TinyTask, executor_with, model_of, pack_round, task_of, train

MODEL = model_of(CONFIGS["llama"])
LENGTHS = (7, 12, 3, 9, 5)
TARGETS = ("q_proj", "down_proj")


def task(**options: Any) -> TinyTask:
    return task_of("a", **{"lengths": LENGTHS, "num_steps": 3, "dropout": 0.25, "seed": 11, **options})


def digests(subject: TinyTask, *neighbours: TinyTask) -> list[bytes]:
    everyone = [*neighbours[:1], subject, *neighbours[1:]]
    return [result.input_digest for result in train(executor_with(MODEL, everyone), everyone, 3)["a"]]


def from_the_definition(subject: TinyTask, step: int) -> bytes:
    """Computes the digest with plain lists, as a tenant with tokens and targets could."""
    training, place = subject.spec.training, 0
    whole = hashlib.sha256(struct.pack("<QQd", training.seed, step, subject.spec.method.dropout))
    for ids, prompt in subject.batch(step):
        ids = [0] * subject.spec.method.num_virtual_tokens + list(ids)
        first = prompt + subject.spec.method.num_virtual_tokens
        targets = [t if p + 1 >= first else -100 for p, t in enumerate(ids[1:])] + [-100]
        numbers = struct.pack(f"<Q{2 * len(ids)}i", place, *ids, *targets)
        whole.update(hashlib.sha256(numbers).digest())
        place += len(ids)
    return whole.digest()


@pytest.mark.parametrize("method", [Lora(4, 8, ("all-linear",), 0.25), Prompt(3)])
def test_the_digest_equals_its_definition(method: Any) -> None:
    subject = task(method=method)
    assert digests(subject) == [from_the_definition(subject, step) for step in range(3)]


def test_neighbours_and_microbatches_do_not_change_the_digest() -> None:
    alone = digests(task())
    beside = [task_of("b", seed=2, lengths=(30, 4)), task_of("c", seed=11, lengths=LENGTHS, dropout=0.25)]
    for size in (1, 2, 3, 4):
        assert digests(task(micro_batch_size=size), *beside) == alone
    others = task(learning_rate=1e-4, max_grad_norm=0.0, rank=2, targets=("q_proj",))
    assert digests(others) == alone


def test_the_order_of_microbatches_and_a_restarted_step_do_not_change_the_digest() -> None:
    subject = task(micro_batch_size=1)
    executor = executor_with(MODEL, [subject])
    first, *rest = pack_round([subject], [0])
    executor.run(first)
    executor.tasks["a"].restart_step()
    *before, last = reversed([first, *rest])
    for microbatch in before:
        ranges = tuple(dataclasses.replace(range_, is_last=False) for range_ in microbatch.ranges)
        assert executor.run(dataclasses.replace(microbatch, ranges=ranges)) == []
    [done] = executor.run(
        dataclasses.replace(last, ranges=tuple(dataclasses.replace(r, is_last=True) for r in last.ranges))
    )
    assert done.input_digest == from_the_definition(subject, 0)


def changed(subject: TinyTask, row: int, position: int) -> TinyTask:
    """Replaces one token."""
    rows = [list(ids) for ids, _ in subject.rows]
    rows[row][position] = rows[row][position] % 90 + 3
    prompts = [prompt for _, prompt in subject.rows]
    return dataclasses.replace(subject, rows=tuple(zip(map(tuple, rows), prompts, strict=True)))


def test_each_input_changes_the_digest() -> None:
    subject = task()
    swapped = dataclasses.replace(subject, rows=(subject.rows[1], subject.rows[0], *subject.rows[2:]))
    ids, prompt = subject.rows[1]
    masked = dataclasses.replace(subject, rows=(subject.rows[0], (ids, prompt + 1), *subject.rows[2:]))
    cut = (subject.rows[0][0] + ids[:1], subject.rows[0][1]), (ids[1:], prompt)  # the same tokens, split elsewhere
    others = [swapped, masked, dataclasses.replace(subject, rows=(*cut, *subject.rows[2:])), task(dropout=0.26)]
    others += [dataclasses.replace(task(seed=12), rows=subject.rows), changed(subject, 0, 0), changed(subject, 3, 8)]
    first = [digests(other)[0] for other in [subject, *others]]
    assert len(set(first)) == len(first)


@pytest.mark.parametrize(
    "method",
    [
        Lora(4, 8.0, TARGETS, 0.25),
        Lora(4, 8.0, TARGETS, 0.25, use_dora=True),
        Miss(rank=4, target_modules=TARGETS, dropout=0.25),
        Vera(rank=4, target_modules=TARGETS, dropout=0.25),
    ],
)
def test_the_digests_inputs_determine_the_masks(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares the masks of a task with Philox from its paper, computed only from seed, step, rate and the sequences'
    places. Neighbours have the same modules and steps."""
    masks: dict[tuple[int, int, int, int], np.ndarray] = {}

    def record(seed: int, step: int, site: int, positions_L: np.ndarray, width: int, rate: float) -> Any:
        mask_LK = right(seed, step, site, positions_L, width, rate)
        if seed == 11:
            assert rate == 0.25
            masks.update(
                {(step, site, int(p), width): row.numpy() for p, row in zip(positions_L, mask_LK, strict=True)}
            )
        return mask_LK

    right = dropout.keep_mask
    monkeypatch.setattr(dropout, "keep_mask", record)
    subject = task(method=method)
    digests(subject, task_of("b", seed=2, lengths=(30, 4), dropout=0.5))
    places = {step: range(sum(len(ids) for ids, _ in subject.batch(step))) for step in range(3)}
    widths = {site: width for _, site, _, width in masks}
    assert {(step, site, place) for step, site, place, _ in masks} == {
        (step, site, place) for site, step in itertools.product(widths, places) for place in places[step]
    }
    for (step, site, place, width), row in masks.items():
        for column in (0, 1, width // 2, width - 1):
            assert row[column] == reference_bit(11, step, site, place, column, width, 0.25)


def test_resumes_do_not_change_the_digest() -> None:
    """The task resumes on another executor after each step."""
    subject, resumed_digests, state = task(), [], None
    for step in range(3):
        executor = Executor(executor_with(MODEL, []).backbone)
        executor.attach(subject.assignment, state)
        [*_, done] = [result for microbatch in pack_round([subject], [step]) for result in executor.run(microbatch)]
        resumed_digests.append(done.input_digest)
        state = executor.checkpoint("a")
    assert resumed_digests == digests(subject)
