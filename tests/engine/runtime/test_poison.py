"""A task with NaN or Inf, of any method, changes no bit of its neighbours and is stopped before its optimizer
writes."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from engine.alignment.packing import rounds
from engine.errors import NonFiniteError
from engine.results import StepResult, TaskFailure
from engine.runtime.executor import Executor
from engine.task import Optimizer
from tests.engine.runtime.test_methods import IN_PEFT, MORE, OWN
from tests.engine.runtime.test_replanning import Job, job
from tests.engine.runtime.tiny import CONFIGS, TinyTask, executor_with, model_of, pack_round, task_of

MODEL = model_of(CONFIGS["llama-tied"])
METHODS = IN_PEFT | OWN | MORE
STEPS = 5


def tasks_from(names: list[str], lengths: list[list[int]], **training: Any) -> list[TinyTask]:
    return [
        task_of(f"{i}-{name}", seed=i, method=METHODS[name], lengths=rows, num_steps=STEPS, **training)
        for i, (name, rows) in enumerate(zip(names, lengths, strict=True))
    ]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_task_that_is_not_finite_changes_no_bit_of_its_neighbours(name: str, value: float) -> None:
    neighbours = [n for n in ("lora-dropout", "prompt", "prefix", "ia3", "dora", "houlsby", "norms") if n != name]
    tasks = tasks_from([*neighbours[:3], name, *neighbours[3:]], [[7, 12, 3, 9]] * (len(neighbours) + 1))
    sick, healthy = executor_with(MODEL, tasks), executor_with(MODEL, tasks)
    ill = tasks[3].name
    with torch.no_grad():
        sick.tasks[ill].parameters_P.fill_(value)
    before = sick.tasks[ill].parameters_P.detach().clone()
    run = sick.tasks[ill]
    results = [
        {r.task: r for m in pack_round(tasks, [0] * len(tasks)) for r in executor.run(m)}
        for executor in (sick, healthy)
    ]
    failure = results[0].pop(ill)
    if value != 1e30:  # finite weights may give a finite loss
        assert isinstance(failure, TaskFailure) and isinstance(failure.error, NonFiniteError)
    if isinstance(failure, TaskFailure):
        assert torch.equal(run.parameters_P.nan_to_num(1.5), before.nan_to_num(1.5)) and not run.optimizer.state()
    for task in tasks:
        if task.name != ill:
            mine, theirs = results[0][task.name], results[1][task.name]
            assert isinstance(mine, StepResult) and isinstance(theirs, StepResult)
            assert (mine.loss, mine.grad_norm) == (theirs.loss, theirs.grad_norm), task.name
            parameters = [executor.tasks[task.name].parameters_P for executor in (sick, healthy)]
            assert torch.equal(*parameters), task.name


KINDS = ["lora", "dora", "vera", "ia3", "miss", "prefix", "prompt", "norms", "bitfit", "houlsby"]


POISONS = ["learning rate", "NaN from the start", "one token"]


@pytest.mark.parametrize(
    ("name", "poison"),
    [
        pytest.param(name, poison, marks=[] if i % 3 == j else pytest.mark.thorough)
        for i, name in enumerate(KINDS)
        for j, poison in enumerate(POISONS)
    ],
)
def test_neighbours_continue_as_beside_a_healthy_task_that_leaves_at_the_same_step(name: str, poison: str) -> None:
    """Uses the real alignment: rounds continue without the failed task, packed anew."""
    well = job("ill", 9, name, [7, 12, 3, 9, 30], Optimizer.ADAMW)
    ill = {"learning rate": with_rate(well, 1e30), "one token": of_one_token(well)}.get(poison, well)
    optimizers = dict(zip(("lora-dropout", "prefix", "vera", "norms"), [*Optimizer, *Optimizer], strict=True))
    others = [
        job(other, seed, other, [11, 4, 20, 6, 6, 9], kind) for seed, (other, kind) in enumerate(optimizers.items())
    ]
    sick = course([*others[:2], ill, *others[2:]], poison == "NaN from the start")
    healthy = course([*others[:2], well, *others[2:]], False, leaves_after=sick.failed_after)
    assert poison != "one token" or sick.failed_after is None
    assert poison != "NaN from the start" or sick.failed_after == 0
    assert poison != "learning rate" or sick.failed_after in (1, None)  # a norm may hide a large vector
    assert sick.results == healthy.results
    for other in others:
        assert torch.equal(*(run.executor.tasks[other.name].parameters_P for run in (sick, healthy))), other.name


@dataclass
class Course:
    executor: Executor
    results: list[tuple[str, int, float]] = field(default_factory=list)  # of all tasks but "ill"
    failed_after: int | None = None  # steps that it has done


def course(jobs: list[Job], starts_as_nan: bool, leaves_after: int | None = None) -> Course:
    """Runs all steps of all jobs. The task "ill" leaves when it fails, or after step `leaves_after`."""
    run = Course(executor_with(MODEL, []))
    for each in jobs:
        run.executor.attach(each.assignment)
    if starts_as_nan:
        run.executor.tasks["ill"].parameters_P.data.fill_(float("nan"))
    left = jobs
    while any(run.executor.tasks[each.name].step < STEPS for each in left):
        left = [each for each in left if each.name in run.executor.tasks]
        members = [each.member(run.executor.tasks[each.name].step) for each in left]
        for microbatch in rounds(members, token_budget=64, chunk_tokens=8):
            for result in run.executor.run(microbatch):
                if isinstance(result, TaskFailure):
                    assert result.task == "ill" and isinstance(result.error, NonFiniteError)
                    run.failed_after = result.step
                elif result.task != "ill":
                    run.results.append((result.task, result.step, result.loss))
                elif isinstance(result, StepResult) and leaves_after == result.step - 1:
                    run.executor.detach("ill")
            if microbatch.is_last_in_round and set(run.executor.tasks) != {each.name for each in left}:
                break
        left = [each for each in left if each.name in run.executor.tasks]
    return run


def with_rate(well: Job, rate: float) -> Job:
    spec = well.assignment.spec
    spec = dataclasses.replace(spec, training=dataclasses.replace(spec.training, learning_rate=rate))
    return dataclasses.replace(well, assignment=dataclasses.replace(well.assignment, spec=spec))


def of_one_token(well: Job) -> Job:
    ids_S = np.full_like(well.dataset.token_ids_S, 5)
    return dataclasses.replace(well, dataset=dataclasses.replace(well.dataset, token_ids_S=ids_S))
