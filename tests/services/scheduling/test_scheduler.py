"""A real scheduler with a fake ledger and fake executors."""

import asyncio
import random

import grpc
import pytest
from google.protobuf.json_format import MessageToDict

from engine.errors import (
    InvalidInputError,
    LeaseLostError,
    NotFoundError,
    SupersededError,
    UnauthenticatedError,
    UnavailableError,
)
from engine.planning.cost.memory_model import total_bytes
from muxtune.v1 import plan_pb2, scheduling_pb2, scheduling_pb2_grpc
from services.conversion.plan import backbone_to_view
from services.conversion.task import spec_to_domain
from services.rpc.client_channel import open_channel
from services.scheduling.__main__ import SchedulingSettings
from tests.services.scheduling.mesh_fakes import BACKBONE, CANCELLING, QUEUED, SPEC_OF_TASKS, SchedulingMesh, step_done


async def test_admitted_tasks_run_and_each_change_makes_a_new_plan(mesh: SchedulingMesh) -> None:
    executor = await mesh.add_executor()
    async with mesh.scheduler() as (_, scheduling):
        first = await mesh.ledger.put_task(1)
        await mesh.changes.until(lambda: executor.attempts() == {first: 1})
        second = await mesh.ledger.put_task(2)
        await mesh.changes.until(lambda: executor.attempts() == {first: 1, second: 1})
        shown = await scheduling.GetPlan(scheduling_pb2.GetPlanRequest())
        assert {explanation.task for explanation in shown.explanations} == {first, second}
        assert shown.executors[0] == executor.plans[-1]
        assert all(explanation.reason for explanation in shown.explanations)
        del mesh.ledger.tasks[first]
        await mesh.ledger.hint()
        await mesh.changes.until(lambda: executor.attempts() == {second: 1})
    versions = [plan.version for plan in executor.plans]
    assert versions == sorted(set(versions))
    assert executor.plans[-1].htasks[0].tasks == [second]


async def test_an_unchanged_plan_is_not_sent_again(mesh: SchedulingMesh) -> None:
    executor = await mesh.add_executor()
    async with mesh.scheduler():
        await mesh.ledger.put_task(1)
        await mesh.changes.until(lambda: executor.plans)
        before = mesh.ledger.num_snapshots
        for _ in range(3):
            await mesh.ledger.hint()
            wanted = mesh.ledger.num_snapshots + 1
            await mesh.changes.until(lambda wanted=wanted: mesh.ledger.num_snapshots >= wanted)
        assert mesh.ledger.num_snapshots > before
    assert len(mesh.ledger.plans) == len(executor.plans)


async def test_a_task_handed_back_gets_a_new_attempt_on_the_same_executor(mesh: SchedulingMesh) -> None:
    """The new plan equals the running one: it was once not sent, and the task waited forever."""
    executor = await mesh.add_executor()
    async with mesh.scheduler():
        task = await mesh.ledger.put_task(1)
        for attempt in (1, 2, 3):
            await mesh.changes.until(lambda attempt=attempt: executor.attempts() == {task: attempt})
            await mesh.ledger.hand_back(task)


async def test_a_cancellation_reaches_the_executor(mesh: SchedulingMesh) -> None:
    executor = await mesh.add_executor()
    async with mesh.scheduler():
        task = await mesh.ledger.put_task(1)
        await mesh.changes.until(lambda: executor.plans)
        mesh.ledger.tasks[task].task.state = CANCELLING
        await mesh.ledger.hint()
        await mesh.changes.until(lambda: executor.plans[-1].tasks[0].cancel)
        assert executor.attempts() == {task: 1}


async def test_results_are_committed_before_they_are_acknowledged_and_in_order(mesh: SchedulingMesh) -> None:
    executor = await mesh.add_executor()
    async with mesh.scheduler():
        task = await mesh.ledger.put_task(1)
        await mesh.changes.until(lambda: executor.plans)
        mesh.ledger.refusals["CommitResults"] = [UnavailableError("away")] * 8  # more than the channel retries
        sent = [step_done(task, 1, step) for step in range(1, 6)]
        last = [executor.send(result) for result in sent][-1]
        await mesh.changes.until(lambda: executor.acknowledged == last)
    assert mesh.ledger.committed == sent
    assert executor.num_streams > 1
    for request in executor.requests:
        assert request.acknowledged_sequence <= len(sent)


async def test_stale_attempts_are_named_to_the_executor(mesh: SchedulingMesh) -> None:
    executor = await mesh.add_executor()
    async with mesh.scheduler():
        task = await mesh.ledger.put_task(1)
        await mesh.changes.until(lambda: executor.plans)
        executor.send(step_done(task, 0, 1), step_done("tenants/a/tasks/gone", 7, 1), step_done(task, 1, 1))
        await mesh.changes.until(lambda: executor.acknowledged == 1)
    stale = [list(request.stale_tasks) for request in executor.requests if request.stale_tasks]
    assert stale == [sorted([task, "tenants/a/tasks/gone"])]
    assert mesh.ledger.committed == [step_done(task, 1, 1)]


async def test_a_broken_stream_gets_the_newest_plan_again(mesh: SchedulingMesh) -> None:
    executor = await mesh.add_executor()
    async with mesh.scheduler():
        task = await mesh.ledger.put_task(1)
        await mesh.changes.until(lambda: executor.plans)
        sequence = executor.send(step_done(task, 1, 1))
        await mesh.changes.until(lambda: executor.acknowledged == sequence)
        executor.requests.clear()
        executor.cut()
        await mesh.changes.until(lambda: executor.plans)
        assert executor.attempts() == {task: 1}
        assert executor.requests[0].lease_term == 1
        assert executor.requests[0].acknowledged_sequence == sequence


async def test_the_stream_is_retried_until_the_executor_knows_its_lease(mesh: SchedulingMesh) -> None:
    executor = await mesh.add_executor()
    executor.refusals = [LeaseLostError("mine is 0, not 1")] * 2
    async with mesh.scheduler():
        task = await mesh.ledger.put_task(1)
        await mesh.changes.until(lambda: executor.attempts() == {task: 1})
    assert executor.num_streams == 3


async def test_a_lost_executors_stream_ends_and_a_new_lease_opens_one(mesh: SchedulingMesh) -> None:
    executor = await mesh.add_executor()
    async with mesh.scheduler():
        task = await mesh.ledger.put_task(1)
        await mesh.changes.until(lambda: executor.plans)
        renewed = plan_pb2.Executor()
        renewed.CopyFrom(mesh.ledger.executors.pop(executor.name))
        await mesh.ledger.hand_back(task)
        await mesh.changes.until(lambda: executor.num_open == 0)
        executor.requests.clear()
        renewed.lease_term, renewed.incarnation = 2, "i2"
        mesh.ledger.executors[executor.name] = renewed
        await mesh.ledger.hint()
        await mesh.changes.until(lambda: executor.attempts() == {task: 2})
        assert executor.requests[0].lease_term == 2
        assert executor.requests[0].acknowledged_sequence == 0


async def test_a_draining_executor_gets_nothing_new(mesh: SchedulingMesh) -> None:
    draining, other = await mesh.add_executor("executors/x"), await mesh.add_executor("executors/y")
    mesh.ledger.executors["executors/x"].draining = True
    async with mesh.scheduler():
        task = await mesh.ledger.put_task(1)
        await mesh.changes.until(lambda: other.attempts() == {task: 1})
    assert draining.attempts() == {}


async def test_the_scheduler_waits_for_an_unavailable_ledger(mesh: SchedulingMesh) -> None:
    executor = await mesh.add_executor()
    # gRPC itself tries calls again, five times; a stream is opened again by us, with pauses that grow.
    for method, times in {"GetSnapshot": 7, "WatchChanges": 3, "CommitPlan": 7}.items():
        mesh.ledger.refusals[method] = [UnavailableError("away")] * times
    async with mesh.scheduler():
        task = await mesh.ledger.put_task(1)
        await mesh.changes.until(lambda: executor.attempts() == {task: 1})


async def test_a_restarted_scheduler_continues_from_the_ledger(mesh: SchedulingMesh) -> None:
    executor = await mesh.add_executor()
    async with mesh.scheduler():
        task = await mesh.ledger.put_task(1)
        await mesh.changes.until(lambda: executor.plans)
    executor.requests.clear()
    async with mesh.scheduler():
        await mesh.changes.until(lambda: executor.plans)
        assert executor.attempts() == {task: 1}  # the same attempt: nothing is started twice
    assert [len(plan.starts) for plan in mesh.ledger.plans] == [1, 0]


async def test_two_schedulers_start_nothing_twice(mesh: SchedulingMesh) -> None:
    await mesh.add_executor("executors/x")
    await mesh.add_executor("executors/y")
    async with mesh.scheduler(), mesh.scheduler():
        names = [await mesh.ledger.put_task(number) for number in range(12)]
        await mesh.changes.until(lambda: all(entry.executor for entry in mesh.ledger.tasks.values()))
    started = [start.task for plan in mesh.ledger.plans for start in plan.starts]
    assert sorted(started) == sorted(names)


async def test_a_stale_cycle_is_repeated(mesh: SchedulingMesh) -> None:
    executor = await mesh.add_executor()
    mesh.ledger.refusals["CommitPlan"] = [SupersededError("another was faster")] * 2
    async with mesh.scheduler():
        task = await mesh.ledger.put_task(1)
        await mesh.changes.until(lambda: executor.attempts() == {task: 1})


async def test_a_task_that_fits_nowhere_waits_with_a_reason(mesh: SchedulingMesh) -> None:
    await mesh.add_executor(memory_bytes=5000)
    async with mesh.scheduler() as (_, scheduling):
        task = await mesh.ledger.put_task(1)
        shown = scheduling_pb2.GetPlanResponse()
        while not shown.explanations:
            shown = await scheduling.GetPlan(scheduling_pb2.GetPlanRequest())
        assert [(e.task, e.executor) for e in shown.explanations] == [(task, "")]
        assert shown.explanations[0].reason
    assert mesh.ledger.tasks[task].task.state == QUEUED


async def test_any_sequence_of_events_keeps_the_rules(mesh: SchedulingMesh) -> None:
    """No task runs on two executors, every start has a new attempt, versions only grow."""
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    executors = [await mesh.add_executor(f"executors/{name}") for name in "xyz"]
    async with mesh.scheduler():
        for number in range(40):
            running = [name for name, entry in mesh.ledger.tasks.items() if entry.executor]
            match draw.choice(("arrive", "arrive", "leave", "back", "cut")):
                case "arrive":
                    await mesh.ledger.put_task(number)
                case "leave" if running:
                    del mesh.ledger.tasks[draw.choice(running)]
                    await mesh.ledger.hint()
                case "back" if running:
                    await mesh.ledger.hand_back(draw.choice(running))
                case "cut":
                    draw.choice(executors).cut()
            await asyncio.sleep(0)  # lets what was begun go on, for as long or short as it likes

        def settled() -> bool:
            entries = mesh.ledger.tasks
            wanted = {name: {} for name in mesh.executors}
            for name, entry in entries.items():
                wanted.get(entry.executor, {})[name] = entry.task.attempt
            return all(entry.executor for entry in entries.values()) and all(
                executor.attempts() == wanted[executor.name] for executor in executors
            )

        await mesh.changes.until(settled)
    for executor in executors:
        versions = [plan.version for plan in executor.plans]
        assert versions == sorted(versions), f"seed {seed}"
    attempts = [(start.task, start.expected_attempt) for plan in mesh.ledger.plans for start in plan.starts]
    assert len(attempts) == len(set(attempts)), f"seed {seed}"


async def test_leases_through_the_stubs(mesh: SchedulingMesh) -> None:
    async with mesh.scheduler() as (_, scheduling):
        executor = plan_pb2.Executor(name="executors/x", address="127.0.0.1:1", incarnation="i1", backbone=BACKBONE)
        register = scheduling_pb2.RegisterExecutorRequest(executor=executor)
        answer = await scheduling.RegisterExecutor(register)
        assert answer.lease_term == 1
        assert answer.lease_duration.seconds == 15
        keep = scheduling_pb2.KeepLeaseRequest(executor="executors/x", incarnation="i1", lease_term=1, draining=True)
        assert (await scheduling.KeepLease(keep)).lease_duration.seconds == 15
        assert mesh.ledger.executors["executors/x"].draining
        keep.lease_term = 9
        with pytest.raises(LeaseLostError):
            await scheduling.KeepLease(keep)
        keep.lease_term = 0
        with pytest.raises(InvalidInputError):
            await scheduling.KeepLease(keep)
        end = scheduling_pb2.SchedulingServiceEndLeaseRequest(executor="executors/x", incarnation="i1")
        for _ in range(2):
            await scheduling.EndLease(end)
        assert mesh.ledger.executors == {}


@pytest.mark.parametrize("field", ["name", "address", "incarnation", "backbone"])
async def test_missing_fields_of_an_executor_are_named(mesh: SchedulingMesh, field: str) -> None:
    executor = plan_pb2.Executor(name="executors/x", address="127.0.0.1:1", incarnation="i1", backbone=BACKBONE)
    executor.ClearField(field)  # type: ignore[arg-type]
    async with mesh.scheduler() as (_, scheduling):
        with pytest.raises(InvalidInputError) as refused:
            await scheduling.RegisterExecutor(scheduling_pb2.RegisterExecutorRequest(executor=executor))
    assert [violation.field.split(".")[1] for violation in refused.value.violations] == [field]


async def test_every_rpc_wants_the_mesh_secret(mesh: SchedulingMesh) -> None:
    async with mesh.scheduler():
        async with open_channel(mesh.address, "mesh_wrong") as channel:
            stub = scheduling_pb2_grpc.SchedulingServiceStub(channel)
            for method, request in (
                (stub.GetPlan, scheduling_pb2.GetPlanRequest()),
                (stub.KeepLease, scheduling_pb2.KeepLeaseRequest()),
                (stub.EndLease, scheduling_pb2.SchedulingServiceEndLeaseRequest()),
                (stub.RegisterExecutor, scheduling_pb2.RegisterExecutorRequest()),
            ):
                with pytest.raises(UnauthenticatedError):
                    await method(request)
        async with grpc.aio.insecure_channel(mesh.address) as bare:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await scheduling_pb2_grpc.SchedulingServiceStub(bare).GetPlan(scheduling_pb2.GetPlanRequest())
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert MessageToDict(scheduling_pb2.GetPlanResponse()) == {}


COST = plan_pb2.CostProfile(fixed_seconds=0.5, token_seconds=0.1)
SPEC = spec_to_domain(SPEC_OF_TASKS)
ROOM_FOR_THREE = total_bytes([SPEC] * 3, backbone_to_view(BACKBONE), 256)


async def test_a_task_that_is_moved_starts_only_when_it_was_handed_back(mesh: SchedulingMesh) -> None:
    """The old executor gets its new plan first and may still commit its results: nothing is lost."""
    crowded = await mesh.add_executor("executors/a", cost=COST)
    async with mesh.scheduler():
        tasks = [await mesh.ledger.put_task(i) for i in range(4)]
        await mesh.changes.until(lambda: len(crowded.attempts()) == 4)
        idle = await mesh.add_executor("executors/b", cost=COST)
        await mesh.changes.until(lambda: len(crowded.attempts()) == 2)
        moved = set(tasks) - set(crowded.attempts())
        assert moved == set(tasks[2:])
        assert all(not plan.tasks for plan in idle.plans)
        attempts = {task: mesh.ledger.tasks[task].task.attempt for task in moved}
        assert set(attempts.values()) == {1}
        for task in moved:
            await mesh.ledger.hand_back(task)
        await mesh.changes.until(lambda: idle.attempts() == dict.fromkeys(moved, 2))


async def test_a_late_tenant_gets_a_place_of_a_tenant_with_many(mesh: SchedulingMesh) -> None:
    executor = await mesh.add_executor(memory_bytes=ROOM_FOR_THREE, cost=COST)
    async with mesh.scheduler():
        flood = [await mesh.ledger.put_task(i) for i in range(4)]
        await mesh.changes.until(lambda: set(executor.attempts()) == set(flood[:3]))
        late = await mesh.ledger.put_task(9, tenant="b")
        await mesh.changes.until(lambda: set(executor.attempts()) == {*flood[:2], late})


async def test_a_plan_is_explained_task_by_task(mesh: SchedulingMesh) -> None:
    await mesh.add_executor(memory_bytes=ROOM_FOR_THREE, cost=COST, num_stages=2)
    async with mesh.scheduler() as (scheduler, scheduling):
        tasks = [await mesh.ledger.put_task(i) for i in range(4)]
        await mesh.changes.until(lambda: len(scheduler.plan.explanations) == 4)
        answer = await scheduling.ExplainPlan(scheduling_pb2.ExplainPlanRequest(task=tasks[0]))
        assert answer.explanation.executor == "executors/x" and tasks[0] in answer.htask.tasks
        assert answer.explanation.round_seconds >= answer.explanation.alone_round_seconds > 0
        assert answer.explanation.alone_bytes > answer.explanation.predicted_bytes > 0
        assert answer.cost == COST
        assert answer.timeline_svg.startswith("<svg") and "stage 1" in answer.timeline_svg
        waits = await scheduling.ExplainPlan(scheduling_pb2.ExplainPlanRequest(task=tasks[3]))
        assert waits.explanation.reason and not waits.explanation.executor and not waits.timeline_svg
        with pytest.raises(NotFoundError):
            await scheduling.ExplainPlan(scheduling_pb2.ExplainPlanRequest(task="tenants/a/tasks/none"))


async def test_a_simulated_plan_changes_nothing(mesh: SchedulingMesh) -> None:
    executor = await mesh.add_executor(cost=COST)
    async with mesh.scheduler() as (scheduler, scheduling):
        task = await mesh.ledger.put_task(1)
        await mesh.changes.until(lambda: executor.plans and len(scheduler.plan.explanations) == 1)
        spec = mesh.ledger.tasks[task].task.spec
        new = scheduling_pb2.HypotheticalTask(task="tenants/b/tasks/new", spec=spec, num_train_tokens=100)
        answer = await scheduling.SimulatePlan(scheduling_pb2.SimulatePlanRequest(tasks=[new]))
        by_name = {forecast.task: forecast for forecast in answer.forecasts}
        assert by_name[task].seconds_left_with > by_name[task].seconds_left > 0
        assert by_name[new.task].seconds_left_with > 0 and not by_name[new.task].HasField("seconds_left")
        assert {explanation.task for explanation in answer.explanations} == {task, new.task}
        assert [e.task for e in scheduler.plan.explanations] == [task] and len(executor.plans) == 1
        for wrong in (
            scheduling_pb2.HypotheticalTask(task=task, spec=spec, num_train_tokens=100),
            scheduling_pb2.HypotheticalTask(task="nobody", spec=spec, num_train_tokens=100),
            scheduling_pb2.HypotheticalTask(task=new.task, spec=spec),
            scheduling_pb2.HypotheticalTask(task=new.task, num_train_tokens=100),
        ):
            with pytest.raises(InvalidInputError):
                await scheduling.SimulatePlan(scheduling_pb2.SimulatePlanRequest(tasks=[wrong]))


@pytest.mark.parametrize(
    ("text", "weights"), [("", {}), ("tenants/a=2, tenants/b=0.5", {"tenants/a": 2.0, "tenants/b": 0.5})]
)
def test_tenants_weights_are_a_setting(text: str, weights: dict[str, float]) -> None:
    settings = SchedulingSettings(mesh_secret="s", admission_address="a:1", tenant_weights=text)
    assert settings.weights() == weights


@pytest.mark.parametrize("text", ["tenants/a", "tenants/a=", "tenants/a=-1", "tenants/a=inf", "tenants/a=nan"])
def test_an_invalid_weight_ends_the_service(text: str) -> None:
    with pytest.raises(SystemExit, match="MUXTUNE_TENANT_WEIGHTS"):
        SchedulingSettings(mesh_secret="s", admission_address="a:1", tenant_weights=text).weights()


def test_several_admissions_are_addresses_not_names() -> None:
    SchedulingSettings(mesh_secret="s", admission_address="10.0.0.1:7411,10.0.0.2:7411")
    with pytest.raises(SystemExit, match=r'MUXTUNE_ADMISSION_ADDRESS: .*"a:1,b:1".*one name that resolves to all'):
        SchedulingSettings(mesh_secret="s", admission_address="a:1,b:1")
