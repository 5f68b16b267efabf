"""Allocations fail at random places of a real trainer's work for one task, v: no other task is affected.

Its neighbours (a shares microbatches with it, b does not) are compared bit for bit with a run in which v left at the
same step or no allocation failed.
"""

import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.alignment.microbatch import Microbatch, MicrobatchKind
from engine.errors import NonFiniteError
from engine.runtime import executor as engine
from engine.runtime import export
from engine.runtime.checkpoint import CheckpointState
from engine.runtime.task_state import TaskTrainingState
from muxtune.v1 import errors_pb2
from services.execution.trainer.checkpoint_store import CheckpointStore
from services.execution.trainer.resident_task import ResidentTask
from tests.mesh_chaos import printed_seed
from tests.services.execution.executor_mesh import planned
from tests.services.execution.trainer_thread import TrainerThread, running_trainer

pytestmark = pytest.mark.timeout(300)
LEAVES_AT = 3  # of five steps


@dataclass(frozen=True)
class Point:
    """A function of the trainer's work, and a predicate on its arguments that is true if it works for v."""

    owner: Any
    name: str
    is_turn: Callable[..., bool]
    always: str = "failed"  # how v ends if it fails every time
    without: bool = False  # v never trains then


def is_v(run: TaskTrainingState) -> bool:
    return run.assignment.task.endswith("/v") or "/v-" in run.assignment.task


def evaluates_v(self: Any, microbatch: Microbatch, resident: frozenset[str]) -> bool:
    return microbatch.kind is MicrobatchKind.EVALUATE and "/v-" in microbatch.ranges[0].task


POINTS = {
    "optimizer": Point(engine, "take_steps", lambda runs: any(is_v(r) and r.step == LEAVES_AT - 1 for r in runs)),
    "shadow check": Point(engine.Executor, "_run_alone", lambda self, run, microbatch: is_v(run)),
    "evaluation": Point(engine.Executor, "_forward_backward", evaluates_v, without=True),
    "attach": Point(engine, "TaskTrainingState", lambda assignment, backbone: "/v-" in assignment.task, without=True),
    "restore": Point(CheckpointState, "restore", lambda self, run: is_v(run), without=True),
    "initial adapter": Point(export, "load_initial_adapter", lambda folder, run, backbone: is_v(run), without=True),
    "checkpoint": Point(CheckpointState, "of", is_v, always="released"),
    "export": Point(export, "export", lambda backbone, run, *others: is_v(run)),
    "bytes to the store": Point(CheckpointState, "files", lambda self: "/v-" in self.metadata["task"]),
    "bytes from the store": Point(CheckpointStore, "get_checkpoint", lambda self, task, recorded: "/v-" in task),
}
ALWAYS = [name for name in POINTS if "bytes" not in name]  # those retry without end, as if the store were unavailable


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Iterator[TrainerThread]:
    with running_trainer(tmp_path_factory.mktemp("memory"), tiny_backbone) as running:
        yield running


@pytest.fixture(scope="module")
def chance() -> random.Random:
    return random.Random(printed_seed())


class FailingAllocation(TorchDispatchMode):
    """Fails the allocation with number `at`. `count`: number of allocations before it."""

    def __init__(self, at: float, error: Exception) -> None:
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema, is_nothing = func._schema, func is torch.ops.aten.empty.memory_format and list(args[0]) == [0]
        is_new = any(str(r.type) == "Tensor" and r.alias_info is None for r in schema.returns)
        if is_new and not schema.is_mutable and not is_nothing:
            if self.count == self.at:
                raise self.error
            self.count += 1
        return func(*args, **(kwargs or {}))


class FailingPoint:
    """Replaces a point's function: one allocation fails in each of v's first `num_failing` calls.

    With a `chance` it is drawn among `num_allocations`; without, the allocations are counted.
    """

    def __init__(self, point: Point, chance: random.Random | None, num_failing: float, num_allocations: int) -> None:
        self._point, self._chance, self._left = point, chance, num_failing
        self.num_allocations, self.failures = num_allocations, list[str]()
        self._function = getattr(point.owner, point.name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self._left <= 0 or not self._point.is_turn(*arguments, **named):
            return self._function(*arguments, **named)
        self._left -= 1
        if self._chance is None:
            with FailingAllocation(math.inf, MemoryError()) as counting:
                result = self._function(*arguments, **named)
            self.num_allocations = counting.count
            return result
        error = self._chance.choice([torch.OutOfMemoryError("Tried to allocate 2.00 GiB"), MemoryError()])
        # After its first failure v runs alone, with at least half of the allocations of it and one neighbour.
        reached = (self.num_allocations + 1) // 2 if self.failures else self.num_allocations
        at = self._chance.randrange(max(1, reached))
        self.failures.append(f"allocation {at} of {self.num_allocations}: {type(error).__name__}")
        if not self.num_allocations:  # bytes, which torch does not allocate
            raise error
        with FailingAllocation(at, error):
            return self._function(*arguments, **named)


@contextmanager
def in_place(point: Point, function: Callable[..., Any]) -> Iterator[None]:
    is_class = isinstance(inspect.getattr_static(point.owner, point.name), classmethod)
    with pytest.MonkeyPatch.context() as patched:
        wrapped: Any = lambda *arguments, **named: function(*arguments, **named)  # noqa: E731  # binds like a method
        patched.setattr(point.owner, point.name, staticmethod(wrapped) if is_class else wrapped)
        yield


@dataclass
class Outcome:
    """Steps with their losses and the adapters' bytes of v, a and b, and how v ended."""

    steps: dict[str, list[tuple[int, float]]]
    adapters: dict[str, bytes]
    end: str
    reason: Any = None


class Runs:
    """Runs the same three tasks again and again."""

    def __init__(self, trainer: TrainerThread) -> None:
        self._trainer, self._count = trainer, 0
        self._neighbours = "", ""
        self._undisturbed: dict[str, tuple[Outcome, int]] = {}

    def undisturbed(self, name: str) -> tuple[Outcome, int]:
        """Returns the outcome of a run without failures, and the number of allocations at that point."""
        if name not in self._undisturbed:
            counting = FailingPoint(POINTS[name], None, 1, 0)
            with in_place(POINTS[name], counting):
                self._undisturbed[name] = self.run(name), counting.num_allocations
        return self._undisturbed[name]

    def without(self, name: str) -> Outcome:
        return self.run(name, with_v=False)

    def run(self, name: str, *, with_v: bool = True) -> Outcome:
        self._count += 1
        v, a, b = (f"{letter}-{self._count}" for letter in "vab")
        v_fields = self._fields(name)
        tasks = [planned(v, version="v", num_steps=5, **v_fields)] if with_v else []
        tasks += [planned(a, version="a", num_steps=7), planned(b, version="b", num_steps=9)]
        alone = name == "evaluation"  # its microbatches halve first, and would halve those of its hTask too
        together = [[v], [a], [b]] if alone else [[v, a], [b]]
        self._trainer.plan(*tasks, htasks=[[t for t in g if with_v or t != v] for g in together if with_v or g != [v]])
        names = (v, a, b) if with_v else (a, b)
        self._neighbours = a, b
        self._trainer.until_ended(*names)
        return self._outcome({task.partition("-")[0]: task for task in names})

    def are_neighbours_done(self) -> bool:
        return all(self._trainer.of(task, "finished") for task in self._neighbours)

    def _fields(self, name: str) -> dict[str, Any]:
        if name == "shadow check":
            return {"training": {"verify_every_steps": LEAVES_AT}}
        if name == "evaluation":
            return {"training": {"heldout_fraction": 0.2, "evaluate_every_steps": 2}}
        if name in ("restore", "bytes from the store"):
            return {"resume_from": self._checkpointed(), "attempt": 2}
        if name == "initial adapter":
            return {"initial_adapter_key": self._finished().adapter_key}
        return {}

    def _checkpointed(self) -> Any:
        self._finished()
        return self._trainer.of("before", "checkpoint_committed")[0]

    def _finished(self) -> Any:
        if not self._trainer.of("before", "finished"):
            self._trainer.plan(planned("before", version="v", num_steps=2), htasks=[["before"]])
            self._trainer.until_ended("before")
        return self._trainer.of("before", "finished")[0]

    def _outcome(self, names: dict[str, str]) -> Outcome:
        trainer = self._trainer
        steps = {letter: trainer.steps(task) for letter, task in names.items()}
        adapters = {letter: trainer.adapter(t) for letter, t in names.items() if trainer.of(t, "finished")}
        for kind in ("finished", "failed", "released"):
            if "v" in names and (results := trainer.of(names["v"], kind)):
                return Outcome(steps, adapters, kind, results[0])
        return Outcome(steps, adapters, "")


@pytest.fixture(scope="module")
def runs(trainer: TrainerThread) -> Runs:
    return Runs(trainer)


@pytest.mark.parametrize("name", POINTS)
def test_a_temporary_lack_of_memory_changes_nothing(name: str, runs: Runs, chance: random.Random) -> None:
    undisturbed, num_allocations = runs.undisturbed(name)
    failing = FailingPoint(POINTS[name], chance, 1, num_allocations)
    with in_place(POINTS[name], failing):
        outcome = runs.run(name)
    assert failing.failures, "nothing failed"
    assert outcome.end == undisturbed.end == "finished", (failing.failures, outcome.reason)
    if name == "evaluation":  # its microbatches halve, which shows in the last digits
        assert [loss for _, loss in outcome.steps.pop("v")] == pytest.approx(
            [loss for _, loss in undisturbed.steps["v"]], rel=1e-6
        )
        del outcome.adapters["v"]
    for letter in outcome.adapters:
        assert outcome.steps[letter] == undisturbed.steps[letter], failing.failures
        assert outcome.adapters[letter] == undisturbed.adapters[letter], failing.failures


@pytest.mark.parametrize("name", ALWAYS)
def test_a_permanent_lack_of_memory_ends_one_task_alone(
    name: str, runs: Runs, chance: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """v retries while the others train, and ends when they are done."""
    monkeypatch.setattr(ResidentTask, "has_waited", lambda self, seconds: runs.are_neighbours_done())
    undisturbed, num_allocations = runs.undisturbed(name)
    failing = FailingPoint(POINTS[name], chance, math.inf, num_allocations)
    with in_place(POINTS[name], failing):
        outcome = runs.run(name)
    assert outcome.end == POINTS[name].always, failing.failures
    if outcome.end == "failed":
        assert outcome.reason.reason == errors_pb2.ERROR_REASON_WILL_NEVER_FIT
    assert "memory" in (outcome.reason.message if outcome.end == "failed" else outcome.reason.reason)
    expected = undisturbed
    if POINTS[name].without:
        expected = runs.without(name)
    elif name in ("optimizer", "shadow check"):
        with in_place(POINTS["optimizer"], Leaving(engine.take_steps)):
            expected = runs.run(name)
        assert [step for step, _ in outcome.steps["v"]] == list(range(1, LEAVES_AT))
    for neighbour in "ab":
        assert outcome.steps[neighbour] == expected.steps[neighbour], failing.failures
        assert outcome.adapters[neighbour] == expected.adapters[neighbour], failing.failures


class Leaving:
    """Replaces `take_steps`: v fails at its third step for another reason."""

    def __init__(self, take_steps: Callable[[Sequence[TaskTrainingState]], Any]) -> None:
        self._take_steps = take_steps

    def __call__(self, runs: Sequence[TaskTrainingState]) -> list[Any]:
        leaves = [is_v(run) and run.step == LEAVES_AT - 1 for run in runs]
        steps = iter(self._take_steps([run for run, leaving in zip(runs, leaves, strict=True) if not leaving]))
        return [NonFiniteError("it leaves") if leaving else next(steps) for leaving in leaves]
