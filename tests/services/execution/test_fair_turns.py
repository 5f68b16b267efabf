"""The trainer divides device time among tenants, whatever their tasks are, and adopts plans within a turn."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from muxtune.v1 import plan_pb2
from services.execution.trainer import trainer as module
from tests.services.execution.executor_mesh import planned
from tests.services.execution.trainer_thread import TrainerThread, running_trainer

FOREVER = 1_000_000


@pytest.fixture
def trainer(tmp_path: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrainerThread]:
    monkeypatch.setattr(module, "_PROGRESS_SECONDS", 0.1)
    with running_trainer(tmp_path, tiny_backbone) as running:
        yield running


def task_of(tenant: str, name: str = "one", **fields: Any) -> plan_pb2.PlannedTask:
    task = planned(name, **{"num_steps": FOREVER, **fields})
    task.task = f"tenants/{tenant}/tasks/{name}"
    return task


def long_step(tenant: str, name: str = "long", num_rows: int = 4000, **fields: Any) -> plan_pb2.PlannedTask:
    """Returns a task of which each step has thousands of rows."""
    task = task_of(tenant, name, version=f"rows-{num_rows}", **fields)
    task.spec.training.global_batch_size = num_rows
    return task


def evaluating(tenant: str) -> plan_pb2.PlannedTask:
    """Returns a task with a short step, after each of which it evaluates thousands of rows."""
    task = task_of(tenant, "evaluates", version="rows-3000")
    task.spec.training.heldout_fraction, task.spec.training.evaluate_every_steps = 0.9, 1
    return task


def verifying(tenant: str) -> plan_pb2.PlannedTask:
    task = long_step(tenant, "verifies", 2000)
    task.spec.training.verify_every_steps = 1
    return task


APPETITES = {
    "twenty like tasks": [task_of("bad", str(i), version=f"other-{i}") for i in range(20)],
    "a long step": [long_step("bad")],
    "long evaluations": [evaluating("bad")],
    "verified long steps": [verifying("bad")],
}


def device_seconds(trainer: TrainerThread, tenant: str, first: int = 0) -> float:
    """Return the device time of the tenant's tasks in the results from `first` on, with the work in progress."""
    complete, in_progress = 0.0, dict[str, list[float]]()
    for result in trainer.results[first:]:
        if result.task.startswith(f"tenants/{tenant}/"):
            kind = result.WhichOneof("result")
            seconds = getattr(getattr(result, str(kind)), "device_seconds", 0.0)
            if kind == "in_progress":
                in_progress.setdefault(result.task, []).append(seconds)
            else:
                complete += seconds
                in_progress.pop(result.task, None)
    return complete + sum(values[-1] - (values[0] if first else 0.0) for values in in_progress.values())


@pytest.mark.parametrize("appetite", APPETITES)
def test_one_small_task_gets_half_of_the_device_beside_any_other_tenant(trainer: TrainerThread, appetite: str) -> None:
    good, bad = task_of("good"), APPETITES[appetite]
    trainer.plan(good, *bad, htasks=[[good.task], [task.task for task in bad]])
    trainer.until(lambda: device_seconds(trainer, "bad") > 0.3 and device_seconds(trainer, "good") > 0.3)
    first = device_seconds(trainer, "bad")
    trainer.until(lambda: device_seconds(trainer, "bad") > first)  # work in progress is reported now and then
    both = [device_seconds(trainer, tenant) for tenant in ("good", "bad")]
    trainer.until(lambda: device_seconds(trainer, "bad") > both[1] + 1.5)
    good_seconds = device_seconds(trainer, "good") - both[0]
    bad_seconds = device_seconds(trainer, "bad") - both[1]
    assert 0.4 < good_seconds / (good_seconds + bad_seconds) < 0.6, (good_seconds, bad_seconds)


def test_weights_divide_the_device(trainer: TrainerThread) -> None:
    tasks = [task_of(tenant) for tenant in ("light", "heavy")]
    plan = plan_pb2.ExecutorPlan(version=1, tasks=tasks, tenant_weights={"tenants/heavy": 3.0})
    for task in tasks:
        plan.htasks.add(tasks=[task.task], token_budget=128, chunk_tokens=16)
    trainer.tell(module.Tag.PLAN, plan)
    trainer.until(lambda: device_seconds(trainer, "light") > 0.5)
    assert 2.4 < device_seconds(trainer, "heavy") / device_seconds(trainer, "light") < 3.6


def test_a_task_is_cancelled_in_the_middle_of_a_step(trainer: TrainerThread) -> None:
    long, good = long_step("bad", num_rows=6000), task_of("good")
    trainer.plan(long, good, htasks=[[long.task], [good.task]])
    trainer.until(lambda: trainer.of(long.task, "in_progress"))
    long.cancel = True
    trainer.plan(long, good, htasks=[[long.task], [good.task]])
    trainer.until(lambda: trainer.of(long.task, "finished"))
    (finished,) = trainer.of(long.task, "finished")
    assert finished.cancelled and finished.step == 0 and not trainer.of(long.task, "step_done")
    count = len(trainer.of(good.task, "step_done"))
    trainer.until(lambda: len(trainer.of(good.task, "step_done")) > count + 3)


def test_a_newcomer_runs_while_a_step_goes_on_and_the_step_loses_nothing(
    trainer: TrainerThread, tmp_path: Path, tiny_backbone: Path
) -> None:
    """A step spans plans, hTasks and layouts: its input has the digest, and its loss the value, of the task alone."""
    alone = long_step("bad", "alone", 200, num_steps=2)
    trainer.plan(alone, htasks=[[alone.task]])
    trainer.until_ended(alone.task)
    expected = trainer.of(alone.task, "step_done")
    long, second = long_step("bad", "long", 200, num_steps=2), task_of("bad", "second")
    trainer.plan(long, htasks=[[long.task]], round_tokens=64)
    trainer.until(lambda: trainer.of(long.task, "in_progress"))
    trainer.plan(long, second, htasks=[[second.task, long.task]], round_tokens=200)
    trainer.until(lambda: trainer.of(second.task, "step_done"))
    assert not trainer.of(long.task, "step_done")
    newcomer = task_of("good")
    trainer.plan(long, newcomer, htasks=[[newcomer.task], [long.task]], round_tokens=90)
    trainer.until_ended(long.task)
    done = trainer.of(long.task, "step_done")
    assert [step.input_digest for step in done] == [step.input_digest for step in expected]
    assert [step.loss for step in done] == pytest.approx([step.loss for step in expected], rel=1e-5)
    assert [step.grad_norm for step in done] == pytest.approx([step.grad_norm for step in expected], rel=1e-4)
    assert done[0].device_seconds >= trainer.of(long.task, "in_progress")[0].device_seconds


def test_tasks_that_come_and_go_do_not_delay_a_neighbour(trainer: TrainerThread) -> None:
    """A tenant that attaches and exports tasks without end pays for that with its own turns."""
    good = task_of("good")
    trainer.plan(good, htasks=[[good.task]])
    trainer.until(lambda: trainer.of(good.task, "step_done"))
    crowd = [task_of("bad", f"n{i}", num_steps=1) for i in range(60)]
    first = len(trainer.results)
    trainer.plan(good, *crowd, htasks=[[good.task], [task.task for task in crowd]])
    trainer.until(lambda: sum(r.HasField("finished") for r in trainer.results[first:]) >= 30)
    steps = [r.task for r in trainer.results[first:] if r.HasField("step_done") and r.task == good.task]
    assert len(steps) > 30  # attaching or exporting a task takes longer than a step of `good`


def test_no_row_is_trained_twice_where_alignment_does_not_know_positions(trainer: TrainerThread) -> None:
    """An older alignment sends a step from its start again: the step begins anew, with the rows of the task alone."""
    alone, long = (long_step("bad", name, 200, num_steps=1) for name in ("alone", "long"))
    trainer.plan(alone, htasks=[[alone.task]])
    trainer.until_ended(alone.task)
    trainer.alignment.is_old = True
    trainer.plan(long, htasks=[[long.task]], round_tokens=64)
    trainer.until(lambda: trainer.of(long.task, "in_progress"))
    trainer.plan(long, second := task_of("bad", "second"), htasks=[[second.task, long.task]], round_tokens=200)
    trainer.until_ended(long.task)
    (done,), (expected,) = trainer.of(long.task, "step_done"), trainer.of(alone.task, "step_done")
    assert done.input_digest == expected.input_digest and done.loss == pytest.approx(expected.loss, rel=1e-5)
    assert done.effective_tokens == expected.effective_tokens
