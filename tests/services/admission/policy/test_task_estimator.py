"""Admission's cached estimates always equal those of a new inspection."""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import task_pb2
from tests.services.admission.admission_mesh import Admission, Alignment, executor, lease, lines, refused, spec


@pytest.fixture
def inspected(alignment: Alignment, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Record the arguments of alignment's inspections."""
    inspections: list[Any] = []
    inspect = alignment.servicer._datasets.inspect

    def note(*arguments: Any) -> Any:
        inspections.append(arguments)
        return inspect(*arguments)

    monkeypatch.setattr(alignment.servicer._datasets, "inspect", note)
    yield inspections


async def estimate(admission: Admission, task_spec: task_pb2.TaskSpec) -> task_pb2.TaskEstimate:
    answer: pb.EstimateTaskResponse = await admission.tenant().EstimateTask(pb.EstimateTaskRequest(spec=task_spec))
    return answer.estimate


async def test_cached_estimates_equal_those_of_a_service_without_a_cache(admission: Admission) -> None:
    """Random variants of a task are estimated by a service with a cache and by one that has just started."""
    draw = random.Random(7)
    datasets = [
        (await admission.upload(lines([{"text": f"row {i} " * (1 + i % 4)} for i in range(n)]))).name for n in (9, 20)
    ]
    optimizers = [task_pb2.OPTIMIZER_ADAMW, task_pb2.OPTIMIZER_SGD]
    task_specs = []
    for _ in range(60):
        sgd = draw.choice(optimizers) == task_pb2.OPTIMIZER_SGD
        task_specs.append(
            spec(
                draw.choice(datasets),
                learning_rate=draw.choice([0.1, 0.01]),
                num_steps=draw.choice([3, 30]),
                seed=draw.choice([0, 1]),
                max_sequence_tokens=draw.choice([8, 64]),
                global_batch_size=draw.choice([2, 4]),
                heldout_fraction=draw.choice([0.0, 0.3]),
                optimizer=task_pb2.OPTIMIZER_SGD if sgd else task_pb2.OPTIMIZER_ADAMW,
                momentum=draw.choice([0.0, 0.9]) if sgd else 0.0,
                weight_decay=draw.choice([0.0, 0.1]),
                lora=task_pb2.Lora(
                    rank=draw.choice([2, 4]), alpha=8, target_modules=[draw.choice(["q_proj", "v_proj"])]
                ),
                labels={"run": str(draw.random())},
                priority=draw.choice([0, 5]),
            )
        )
    warm = [await estimate(admission, one) for one in task_specs]
    assert len({answer.SerializeToString(deterministic=True) for answer in warm}) > 10
    for one, before in zip(task_specs[::4], warm[::4], strict=True):
        await admission.restart()
        assert await estimate(admission, one) == before


async def test_only_the_first_task_of_a_parameter_sweep_is_inspected(
    admission: Admission, inspected: list[Any]
) -> None:
    dataset = (await admission.upload()).name
    tasks = [
        await admission.create(dataset, learning_rate=rate, labels={"rate": str(rate)}) for rate in (0.1, 0.2, 0.3)
    ]
    assert len(inspected) == 1
    assert [task.spec.training.learning_rate for task in tasks] == pytest.approx([0.1, 0.2, 0.3])
    assert [task.estimate for task in tasks] == [tasks[0].estimate] * 3
    await admission.create(dataset, num_steps=7)
    assert len(inspected) == 2


async def test_a_cached_estimate_does_not_skip_validation(admission: Admission) -> None:
    dataset = (await admission.upload()).name
    await admission.create(dataset)
    for wrong, field in (
        ({"learning_rate": -1.0}, "spec.training.learning_rate"),
        ({"warmup_steps": 5}, "spec.training.warmup_steps"),
        ({"priority": 1000}, "spec.priority"),
        ({"labels": {"x": "y" * 100}}, "spec.labels"),
    ):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT") as refusal:
            await admission.create(dataset, **wrong)
        assert field in refusal.fields
    rival = admission.tenant("rival")
    with refused(grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"):
        await rival.CreateTask(pb.CreateTaskRequest(spec=spec(dataset)))


async def test_estimates_follow_a_changed_executor(admission: Admission) -> None:
    dataset = (await admission.upload()).name
    seconds, changed = (await estimate(admission, spec(dataset))).seconds, executor(lease_term=1)
    changed.device.effective_tokens_per_second /= 2
    await admission.ledger().PutLease(lease(changed))
    assert (await estimate(admission, spec(dataset))).seconds == pytest.approx(2 * seconds)
    changed.device.memory_bytes = 1
    await admission.ledger().PutLease(lease(changed))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "WILL_NEVER_FIT"):
        await estimate(admission, spec(dataset))


async def test_a_dataset_that_changes_while_a_task_is_examined_is_seen(
    admission: Admission, alignment: Alignment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dataset is replaced, then deleted, while alignment inspects it."""
    dataset, loop = (await admission.upload(dataset_id="rows")).name, asyncio.get_running_loop()

    async def delete() -> None:
        await admission.tenant().DeleteDataset(pb.DeleteDatasetRequest(name=dataset))

    async def replace() -> None:
        await delete()
        await admission.upload(lines([{"text": "another row"}] * 3), dataset_id="rows")

    inspect, meanwhile = alignment.servicer._datasets.inspect, [replace(), delete()]

    def inspect_slowly(*arguments: Any) -> Any:
        report = inspect(*arguments)
        if meanwhile and report.num_train_rows:
            asyncio.run_coroutine_threadsafe(meanwhile.pop(0), loop).result(timeout=20)
        return report

    monkeypatch.setattr(alignment.servicer._datasets, "inspect", inspect_slowly)
    with refused(grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"):
        await admission.create(dataset)
    assert not meanwhile and admission.num_rows()["tasks"] == 0
    await admission.upload(dataset_id="rows")
    meanwhile.append(replace())
    task = await admission.create(dataset, seed=1)
    assert task.estimate.num_train_rows == 3 and not meanwhile


async def test_a_task_and_its_line_in_the_audit_log_are_one_transaction(admission: Admission) -> None:
    dataset, commits = (await admission.upload()).name, []
    await admission.create(dataset)  # the first is examined between two

    def note(connection: Any) -> None:
        commits.append(connection)

    sa.event.listen(admission.database._engine, "commit", note)
    task = await admission.create(dataset)
    sa.event.remove(admission.database._engine, "commit", note)
    assert len(commits) == 1
    with admission.database.read() as connection:
        assert (
            connection.execute(
                sa.text("SELECT count(*) FROM audit_events WHERE resource = :r"), {"r": task.name}
            ).scalar()
            == 1
        )
