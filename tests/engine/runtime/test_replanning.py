"""A task gets the same results as alone, through the real alignment, for any neighbours, packing and executor.

Neighbours arrive, leave and come back. Data and dropout masks are equal bit for bit, losses and weights to 1e-5.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.alignment.dataset import TokenizedDataset
from engine.alignment.microbatch import Microbatch
from engine.alignment.packing import PackedTask, rounds
from engine.kernels import dropout
from engine.results import EvaluationResult, StepResult
from engine.runtime.checkpoint import CheckpointState
from engine.runtime.task_state import TaskAssignment
from engine.task import LrSchedule, Optimizer, TaskSpec, Training
from tests.engine.runtime.test_methods import IN_PEFT, MORE, OWN
from tests.engine.runtime.tiny import CONFIGS, VOCAB, executor_with, model_of
from tests.thoroughness import examples

MODEL = model_of(CONFIGS["llama-tied"])  # with biases
METHODS = IN_PEFT | OWN | MORE
STEPS = 5
# If a gradient is zero (a key's bias, a query that sees one token), Adam takes full steps of its rounding, unless
# epsilon is above it.
EPSILON = 1e-4


@dataclass(frozen=True)
class Job:
    assignment: TaskAssignment
    dataset: TokenizedDataset

    @property
    def name(self) -> str:
        return self.assignment.task

    def member(self, step: int) -> PackedTask:
        method, training = self.assignment.spec.method, self.assignment.spec.training
        extra = method.num_virtual_tokens, method.num_prefix_tokens
        return PackedTask(self.name, self.dataset, training, self.assignment.num_steps, step, *extra)


@dataclass(frozen=True)
class Plan:
    """Neighbours of the watched task for a number of steps, their packing, and whether they run on another executor."""

    neighbours: tuple[str, ...]
    num_rounds: int
    token_budget: int
    chunk_tokens: int
    moves: bool


@dataclass
class Seen:
    """Records the watched task: its sequences by (kind, step, place in its batch), tokens and targets; its results; its
    dropout masks by (step, site, place); the digest of each step."""

    rows: dict[tuple[str, int, int], bytes] = field(default_factory=dict)
    results: list[tuple[type, int, float]] = field(default_factory=list)
    masks: dict[tuple[int, int, int], bytes] = field(default_factory=dict)
    digests: list[bytes] = field(default_factory=list)
    parameters_P: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def note(self, microbatch: Microbatch, task: str) -> None:
        for range_ in (r for r in microbatch.ranges if r.task == task):
            at = range_.start
            for segment in range_.segments:
                part = slice(at, at + segment.num_tokens)
                ids, targets = microbatch.token_ids_T[part].tobytes(), microbatch.targets_T[part].tobytes()
                self.rows[microbatch.kind.value, range_.step, segment.stream_offset_tokens] = ids + targets
                at += segment.num_tokens


def job(name: str, seed: int, method: str, lengths: Sequence[int], optimizer: Optimizer) -> Job:
    """Returns rows of these lengths; a third of them bear no loss, as after an empty completion."""
    random = np.random.default_rng(seed)
    ids_S = random.integers(3, VOCAB, sum(lengths)).astype(np.int32)
    bears_loss_S = np.concatenate([random.random(n) < (0.6 if i % 3 != 1 else 0.0) for i, n in enumerate(lengths)])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    lines = np.arange(1, len(lengths) + 1)
    dataset = TokenizedDataset(ids_S, bears_loss_S, offsets, lines, np.array(lengths), (), 0)
    training = Training(
        learning_rate=1e-3 if optimizer is Optimizer.ADAMW else 1e-2,
        num_steps=STEPS,
        optimizer=optimizer,
        epsilon=EPSILON,
        lr_schedule=LrSchedule.COSINE,
        micro_batch_size=2,
        global_batch_size=4,
        heldout_fraction=0.3 if len(lengths) > 3 else 0.0,
        evaluate_every_steps=2,
        seed=seed,
    )
    return Job(TaskAssignment(name, TaskSpec("tiny", METHODS[method], "data", training), STEPS), dataset)


def live(jobs: dict[str, Job], watched: str, plans: Sequence[Plan], monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Runs the watched task from its first step to its last, under one plan after another."""
    seen, executor, left = Seen(), executor_with(MODEL, []), dict[str, CheckpointState]()
    seed = jobs[watched].assignment.spec.training.seed

    def record(task_seed: int, step: int, site: int, positions_L: np.ndarray, *rest: object) -> torch.Tensor:
        mask_LK = right(task_seed, step, site, positions_L, *rest)  # type: ignore[arg-type]
        if task_seed == seed:
            for position, row in zip(positions_L.tolist(), mask_LK, strict=True):
                seen.masks[step, site, position] = row.numpy().tobytes()
        return mask_LK

    right = dropout.keep_mask
    with monkeypatch.context() as patch:
        patch.setattr(dropout, "keep_mask", record)
        for plan in plans:
            names = [*plan.neighbours[::2], watched, *plan.neighbours[1::2]]
            for name in list(executor.tasks):
                if plan.moves or name not in names:
                    left[name] = executor.checkpoint(name)
                    executor.detach(name)
            executor = executor_with(MODEL, []) if plan.moves else executor
            for name in names:
                if name not in executor.tasks:
                    executor.attach(jobs[name].assignment, left.get(name))
            for microbatch in _microbatches([jobs[name].member(executor.tasks[name].step) for name in names], plan):
                seen.note(microbatch, watched)
                for result in executor.run(microbatch):
                    assert isinstance(result, StepResult | EvaluationResult), result
                    if result.task == watched:
                        seen.results.append((type(result), result.step, result.loss))
                        seen.digests += [result.input_digest] if isinstance(result, StepResult) else []
        seen.parameters_P = executor.tasks[watched].parameters_P.detach().clone()
    return seen


def _microbatches(members: list[PackedTask], plan: Plan) -> Iterator[Microbatch]:
    for microbatch in rounds(members, plan.token_budget, plan.chunk_tokens):
        if microbatch.round >= plan.num_rounds:
            return
        yield microbatch


def assert_same(result_seen: Seen, alone: Seen) -> None:
    assert result_seen.rows == alone.rows and result_seen.masks == alone.masks  # bit for bit
    assert result_seen.digests == alone.digests and len(set(alone.digests)) == STEPS
    assert [result[:2] for result in result_seen.results] == [result[:2] for result in alone.results]
    losses = [result[2] for result in alone.results]
    assert [result[2] for result in result_seen.results] == pytest.approx(losses, rel=1e-5, abs=1e-12)
    assert (result_seen.parameters_P - alone.parameters_P).abs().max() < 1e-5


names = st.lists(st.sampled_from(sorted(METHODS)), min_size=1, max_size=15)
rows = st.lists(st.one_of(st.integers(1, 20), st.sampled_from([8, 16, 64])), min_size=1, max_size=7)


@st.composite
def plans_of(draw: st.DrawFn, neighbours: list[str]) -> list[Plan]:
    plans, done = [], 0
    while done < STEPS + 1:  # the last round only evaluates
        count = draw(st.integers(1, STEPS + 1 - done))
        beside = tuple(draw(st.lists(st.sampled_from(neighbours), unique=True))) if neighbours else ()
        budget, chunk = draw(st.sampled_from([16, 64, 256, 1024])), draw(st.sampled_from([1, 8, 64]))
        plans.append(Plan(beside, count, budget, chunk, draw(st.booleans())))
        done += count
    return plans


@settings(max_examples=examples(80), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(names, st.sampled_from(list(Optimizer)), st.data())
def test_a_task_does_not_depend_on_the_plan_around_it(
    method_names: list[str], optimizer: Optimizer, data: st.DataObject
) -> None:
    jobs = {
        f"{i}-{name}": job(f"{i}-{name}", i, name, data.draw(rows), optimizer) for i, name in enumerate(method_names)
    }
    watched, *neighbours = jobs
    plans = data.draw(plans_of(neighbours))
    with pytest.MonkeyPatch.context() as patch:
        alone = live(jobs, watched, [Plan((), STEPS + 1, 512, 16, False)], patch)
        assert_same(live(jobs, watched, plans, patch), alone)


HOSTILE = {
    "all of one length": [[8, 8, 8, 8]] * 16,
    "one a hundred times the others": [[300, 300], *[[3, 2]] * 15],
    "others a hundred times it": [[3, 2], *[[300, 300]] * 2, *[[3, 2]] * 13],
    "rows of one token": [[1, 1, 4, 1, 1]] * 16,
    "exactly a chunk": [[64, 64]] * 16,
}


WATCHED = ("lora-dropout", "prefix", "vera-dropout", "rank-over-width", "houlsby")


@pytest.mark.parametrize(
    ("watched", "lengths"),
    [
        pytest.param(
            watched, lengths, id=f"{watched}-{name}", marks=[] if i in (j, (j + 1) % 5) else pytest.mark.thorough
        )
        for i, watched in enumerate(WATCHED)
        for j, (name, lengths) in enumerate(HOSTILE.items())
    ],
)
def test_a_task_does_not_depend_on_fifteen_others(
    watched: str, lengths: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    neighbours = [name for name in sorted(METHODS) if name != watched][: len(lengths) - 1]
    jobs = {
        name: job(name, seed, name, row_lengths, Optimizer.ADAMW)
        for seed, (name, row_lengths) in enumerate(zip([watched, *neighbours], lengths, strict=True))
    }
    alone = live(jobs, watched, [Plan((), STEPS + 1, 512, 16, False)], monkeypatch)
    one = Plan(tuple(neighbours[:1]), 2, 128, 64, False)
    fifteen = Plan(tuple(neighbours), 2, 2048, 64, False)
    few = Plan(tuple(neighbours[3:7]), STEPS + 1 - 4, 256, 64, True)
    assert_same(live(jobs, watched, [one, fifteen, few], monkeypatch), alone)
