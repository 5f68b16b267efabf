"""Tests on random snapshots that a suspect of a crash runs alone, and other tasks run as planned."""

import random

import pytest

from engine.planning.cost.task_demand import DemandEstimator
from engine.planning.crash_isolation import plan
from engine.planning.planner import plan as make_plan
from engine.planning.types import ExecutorView, Plan, PlannerConfig, Snapshot, TaskView
from services.conversion.plan import backbone_to_view
from services.conversion.task import spec_to_domain
from tests.services.scheduling.mesh_fakes import BACKBONE, SPEC_OF_TASKS

SPEC, VIEW, LIMITS = spec_to_domain(SPEC_OF_TASKS), backbone_to_view(BACKBONE), PlannerConfig(256, 16)


def executors(count: int, num_draining: int = 0) -> tuple[ExecutorView, ...]:
    return tuple(ExecutorView(f"executors/e{i}", VIEW, 1 << 30, is_draining=i < num_draining) for i in range(count))


def task(name: str, age: int, executor: str = "") -> TaskView:
    return TaskView(name, "tenants/a", SPEC, age, 5, num_train_tokens=100, executor=executor)


def residents(result: Plan) -> dict[str, set[str]]:
    return {name: set(result.tasks_of(name)) for name in result.htasks if result.tasks_of(name)}


@pytest.mark.parametrize("seed", range(60))
def test_suspects_run_alone_and_no_task_waits_while_an_executor_is_free(seed: int) -> None:
    draw = random.Random(seed)
    count, num_draining = draw.randint(1, 4), draw.randint(0, 1)
    views = executors(count, num_draining)
    homes = ["", *(view.name for view in views)]
    tasks = tuple(task(f"tenants/a/tasks/t{i}", i, draw.choice(homes)) for i in range(draw.randint(1, 6)))
    suspects = {t.name for t in tasks if draw.random() < 0.5}
    result = plan(Snapshot(tasks, views), suspects, LIMITS, DemandEstimator(LIMITS))
    placed = residents(result)
    assert all(len(residents_there) == 1 for residents_there in placed.values() if residents_there & suspects)
    running = {name for residents_there in placed.values() for name in residents_there}
    innocents, num_ready = {t.name for t in tasks} - suspects, count - num_draining
    num_alone = len(running & suspects)
    if num_ready == 0:
        assert not running
    elif num_ready == 1 and suspects:
        assert num_alone == 1 and running <= suspects
    else:
        assert innocents <= running
        assert num_alone == min(len(suspects), num_ready - bool(innocents))
    assert sorted(e.task for e in result.explanations) == sorted(t.name for t in tasks)
    assert all(e.reason and bool(e.executor) == (e.task in running) for e in result.explanations)


def test_a_suspect_that_runs_stays_where_it_is_and_its_plan_is_stable() -> None:
    views = executors(3)
    tasks = tuple(task(f"tenants/a/tasks/t{i}", i) for i in range(4))
    suspects = {tasks[1].name, tasks[3].name}
    first = plan(Snapshot(tasks, views), suspects, LIMITS, DemandEstimator(LIMITS))
    homes = {name: executor for executor, residents_there in residents(first).items() for name in residents_there}
    settled = tuple(task(t.name, t.age, homes[t.name]) for t in tasks)
    again = plan(Snapshot(settled, views, first.htasks), suspects, LIMITS, DemandEstimator(LIMITS))
    assert residents(again) == residents(first)


def test_without_suspects_it_is_the_planners_plan() -> None:
    snapshot = Snapshot(tuple(task(f"tenants/a/tasks/t{i}", i) for i in range(3)), executors(2))
    assert plan(snapshot, (), LIMITS, DemandEstimator(LIMITS)) == make_plan(snapshot, LIMITS)


def test_a_neighbours_reason_to_wait_does_not_name_the_suspect() -> None:
    tasks = (task("tenants/a/tasks/mine", 0), task("tenants/b/tasks/suspect", 1))
    result = plan(Snapshot(tasks, executors(1)), {tasks[1].name}, LIMITS, DemandEstimator(LIMITS))
    (mine,) = (e for e in result.explanations if e.task == tasks[0].name)
    assert "alone" in mine.reason and "suspect" not in mine.reason
