"""A task of any method gets what it gets alone, whoever stands beside it, comes, leaves, or is sick."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.errors import NonFiniteError
from engine.methods import Lora, Method, Miss, Vera
from engine.results import StepResult, TaskFailure
from engine.runtime.executor import Executor
from engine.task import Optimizer
from tests.engine.runtime.test_methods import ALL, IN_PEFT, OWN
from tests.engine.runtime.tiny import CONFIGS, TinyTask, executor_with, model_of, pack_round, task_of, train

MODEL = model_of(CONFIGS["llama-tied"])
DROPPING: dict[str, Method] = {
    "lora-dropout": Lora(4, 8.0, ALL, 0.3),
    "dora-dropout": Lora(4, 8.0, ("q_proj", "down_proj"), 0.2, use_dora=True),
    "vera-dropout": Vera(8, ALL, 0.4),
    "miss-dropout": Miss(4, ALL, 0.1),
    "rank-1": Lora(1, 1.0, ALL),
    "rank-over-width": Lora(100, 8.0, ("q_proj",)),
}
METHODS = IN_PEFT | OWN | DROPPING
STEPS = 4


def tasks_from(names: list[str], lengths: list[list[int]], **training: Any) -> list[TinyTask]:
    return [
        task_of(f"{i}-{name}", seed=i, method=METHODS[name], lengths=rows, num_steps=STEPS, **training)
        for i, (name, rows) in enumerate(zip(names, lengths, strict=True))
    ]


def results_of(executor: Executor, tasks: list[TinyTask], name: str, num_rounds: int) -> list[StepResult]:
    return train(executor, tasks, num_rounds)[name]


names = st.lists(st.sampled_from(sorted(METHODS)), min_size=2, max_size=8)
ragged = st.lists(st.integers(2, 24), min_size=1, max_size=4)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(names, st.data())
@example(["rank-1", "rank-over-width", "prompt", "prefix"], None)
def test_the_same_alone_and_among_neighbours_that_come_and_leave_and_across_a_checkpoint(
    chosen: list[str], data: st.DataObject | None
) -> None:
    hostile = [[2, 9], [8], [2], [200, 3]]
    lengths = [data.draw(ragged) for _ in chosen] if data else hostile[: len(chosen)]
    # Not Adam: it makes whole steps of rounding where a gradient is zero (that of a key's bias always is).
    tasks = tasks_from(chosen, lengths, optimizer=Optimizer.SGD, learning_rate=0.1, momentum=0.9)
    task, *others = tasks
    alone = executor_with(MODEL, [task])
    expected = results_of(alone, [task], task.name, STEPS)
    half = len(others) // 2
    executor = executor_with(MODEL, [task, *others[:half]])
    found = results_of(executor, [task, *others[:half]], task.name, 1)
    for other in others[half:]:  # arrive
        executor.attach(other.assignment)
    found += results_of(executor, tasks, task.name, 1)
    for other in others[:half]:  # leave
        executor.detach(other.name)
    found += results_of(executor, [task, *others[half:]], task.name, 1)
    state = executor.checkpoint(task.name)  # moves
    following = executor_with(MODEL, others[:half])
    following.attach(dataclasses.replace(task.assignment, step=state.step), state)
    found += results_of(following, [*others[:half], task], task.name, 1)
    assert [result.loss for result in found] == pytest.approx([result.loss for result in expected], rel=1e-5)
    difference = following.tasks[task.name].parameters_P - alone.tasks[task.name].parameters_P
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_sick_task_of_any_method_leaves_its_neighbours_bit_for_bit(name: str, value: float) -> None:
    around = [n for n in ("lora-dropout", "prompt", "prefix", "ia3", "dora", "houlsby", "norms") if n != name]
    tasks = tasks_from([*around[:3], name, *around[3:]], [[7, 12, 3, 9]] * (len(around) + 1))
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
        assert torch.equal(run.parameters_P.nan_to_num(1.5), before.nan_to_num(1.5)) and not run.optimizer_state()
    for task in tasks:
        if task.name != ill:
            mine, theirs = results[0][task.name], results[1][task.name]
            assert isinstance(mine, StepResult) and isinstance(theirs, StepResult)
            assert (mine.loss, mine.grad_norm) == (theirs.loss, theirs.grad_norm), task.name
            parameters = [executor.tasks[task.name].parameters_P for executor in (sick, healthy)]
            assert torch.equal(*parameters), task.name


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "prefix", "norms", "houlsby"])
def test_a_learning_rate_of_1e30_harms_no_neighbour(name: str) -> None:
    others = tasks_from(["lora-dropout", "prompt", "vera"], [[7, 12, 3, 9]] * 3)
    wild, tame = (
        task_of("wild", seed=9, method=METHODS[name], num_steps=STEPS, learning_rate=rate) for rate in (1e30, 1e-3)
    )
    executors = []
    for task in (wild, tame):
        executor = executor_with(MODEL, [others[0], task, *others[1:]])
        for step in range(3):
            together = [others[0], task, *others[1:]]
            for microbatch in pack_round(together, [step] * 4):
                results = executor.run(microbatch)
                assert all(isinstance(r, StepResult) or r.task == "wild" for r in results)
        executors.append(executor)
    for other in others:
        assert torch.equal(*(executor.tasks[other.name].parameters_P for executor in executors)), other.name
