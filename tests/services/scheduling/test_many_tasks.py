"""Very many tasks, very large specs and a task that cannot be planned do not stop the scheduler for other tenants."""

from functools import partial
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from engine.methods import Lora
from engine.planning.cost import task_demand
from muxtune.v1 import plan_pb2, scheduling_pb2
from services.scheduling import scheduler as scheduler_module
from services.scheduling.snapshot_planner import SnapshotPlanner
from tests.hostile_messages import answer_of
from tests.oversized_messages import oversized_requests
from tests.services.scheduling.mesh_fakes import SECRET, SPEC_OF_TASKS, SchedulingMesh

COST = plan_pb2.CostProfile(fixed_seconds=0.1, token_seconds=0.01)
MESSAGE_BYTES = 4 << 20  # that gRPC's clients accept by default


async def explanation_of(scheduling: Any, task: str) -> plan_pb2.TaskExplanation:
    return (await scheduling.ExplainPlan(scheduling_pb2.ExplainPlanRequest(task=task))).explanation


async def all_pages(call: Any, request: Any) -> tuple[Any, list[Message]]:
    """Return the whole answer and its pages."""
    pages = [await call(request)]
    whole = type(pages[0])()
    whole.CopyFrom(pages[0])
    while pages[-1].next_page_token:
        pages.append(await call(type(request)(page_token=pages[-1].next_page_token)))
        whole.MergeFrom(pages[-1])
    return whole, pages


@pytest.mark.parametrize("damage", ["an unknown option", "no method", "no spec"])
async def test_a_task_that_cannot_be_read_is_left_out_and_others_run(mesh: SchedulingMesh, damage: str) -> None:
    executor = await mesh.add_executor()
    async with mesh.scheduler() as (_, scheduling):
        bad = await mesh.ledger.put_task(1, tenant="bad")
        spec = mesh.ledger.tasks[bad].task.spec
        await mesh.changes.until(lambda: executor.attempts() == {bad: 1})
        bad = await mesh.ledger.put_task(2, tenant="bad")
        spec = mesh.ledger.tasks[bad].task.spec
        if damage == "an unknown option":
            spec.training.optimizer = 99  # of a newer admission
        elif damage == "no method":
            spec.ClearField("method")
        else:
            spec.Clear()
        good = await mesh.ledger.put_task(3, tenant="good")
        await mesh.changes.until(lambda: executor.attempts().get(good) == 1)
        assert bad not in executor.attempts()
        assert "cannot be planned" in (await explanation_of(scheduling, bad)).reason
        assert (await explanation_of(scheduling, good)).executor == executor.name


async def test_a_task_that_breaks_the_planner_is_left_out_and_others_run(
    mesh: SchedulingMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the planner that one task shows must not become everybody's."""
    real, is_broken = task_demand.footprint, [True]

    def footprint(spec: Any, backbone: Any) -> Any:
        if isinstance(spec.method, Lora) and spec.method.rank == 3 and is_broken:
            raise ZeroDivisionError
        return real(spec, backbone)

    monkeypatch.setattr(task_demand, "footprint", footprint)
    executor = await mesh.add_executor()
    async with mesh.scheduler() as (_, scheduling):
        first = await mesh.ledger.put_task(1, tenant="good")
        await mesh.changes.until(lambda: executor.attempts() == {first: 1})
        bad = await mesh.ledger.put_task(2, tenant="bad")
        mesh.ledger.tasks[bad].task.spec.lora.rank = 3
        second = await mesh.ledger.put_task(3, tenant="good")
        await mesh.changes.until(lambda: executor.attempts() == {first: 1, second: 1})
        reason = (await explanation_of(scheduling, bad)).reason
        assert "cannot be planned" in reason and "ZeroDivisionError" in reason
        is_broken.clear()
        other = await mesh.add_executor("executors/y")  # tasks that were left out are tried again
        await mesh.changes.until(lambda: bad in executor.attempts() or bad in other.attempts())


async def test_a_planner_that_fails_for_all_tasks_takes_none_from_its_executor(
    mesh: SchedulingMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = await mesh.add_executor()
    async with mesh.scheduler():
        tasks = [await mesh.ledger.put_task(i, tenant=f"t{i}") for i in range(2)]
        await mesh.changes.until(lambda: set(executor.attempts()) == set(tasks))
        with monkeypatch.context() as patch:
            patch.setattr(task_demand.DemandEstimator, "estimate", lambda *_: 1 // 0)
            before = mesh.ledger.num_snapshots
            await mesh.ledger.hint()
            await mesh.changes.until(lambda: mesh.ledger.num_snapshots > before + 1)  # the cycle is repeated
            assert set(executor.attempts()) == set(tasks)
        late = await mesh.ledger.put_task(9)
        await mesh.changes.until(lambda: set(executor.attempts()) == {*tasks, late})


async def test_new_tasks_are_estimated_in_turns_of_their_tenants(
    mesh: SchedulingMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 specs that take 30 ms each held up the other tenants' tasks by eight seconds."""
    monkeypatch.setattr(scheduler_module, "SnapshotPlanner", partial(SnapshotPlanner, estimate_seconds=0.0))
    for number in range(6):
        await mesh.ledger.put_task(number, tenant="bad")
    good = await mesh.ledger.put_task(9, tenant="good")
    executor = await mesh.add_executor()
    async with mesh.scheduler() as (_, _scheduling):
        await mesh.changes.until(lambda: len(executor.attempts()) == 7)  # one after another, without further changes
    order = [task.task for plan in executor.plans for task in plan.tasks]
    assert order.index(good) < order.index("tenants/bad/tasks/t2")


async def test_plans_with_specs_from_before_their_limit_reach_the_executor(mesh: SchedulingMesh) -> None:
    executor = await mesh.add_executor()
    async with mesh.scheduler():
        for number in range(80):
            name = await mesh.ledger.put_task(number, tenant="bad")
            mesh.ledger.tasks[name].task.spec.labels["x"] = "y" * (250 << 10)
        good = await mesh.ledger.put_task(99, tenant="good")
        await mesh.changes.until(lambda: len(executor.attempts()) == 81)
        assert good in executor.attempts()
        plan = executor.plans[-1]
        assert plan.ByteSize() > 16 << 20
        assert max(request.ByteSize() for request in executor.requests) < MESSAGE_BYTES
        for task in plan.tasks:
            assert task.spec == mesh.ledger.tasks[task.task].task.spec


async def test_answers_about_2000_tasks_come_in_pages(mesh: SchedulingMesh) -> None:
    """GetPlan had 98,682,230 bytes once, as each explanation named all its neighbours."""
    mesh.ledger.message_tasks = 1000
    executor = await mesh.add_executor(memory_bytes=1 << 40, cost=COST)
    names = [await mesh.ledger.put_task(i, tenant=f"t{i % 7}") for i in range(2000)]
    async with mesh.scheduler() as (_, scheduling):
        await mesh.changes.until(lambda: executor.plans)
        assert len(executor.plans[-1].tasks) == 1024
        plan, pages = await all_pages(scheduling.GetPlan, scheduling_pb2.GetPlanRequest())
        assert {e.task for e in plan.explanations} == set(names) and len(plan.explanations) == 2000
        assert [task.task for sent in plan.executors for task in sent.tasks] == [
            task.task for task in executor.plans[-1].tasks
        ]
        assert max(page.ByteSize() for page in pages) < MESSAGE_BYTES
        assert plan.ByteSize() < 2000 * 2000  # 2 kB a task
        profile, pages = await all_pages(scheduling.GetProfile, scheduling_pb2.GetProfileRequest())
        assert [task.task for task in profile.profile.tasks] == names and len(profile.profile.executors) == 1
        assert profile.profile.limits.max_resident_tasks == 1024
        assert max(page.ByteSize() for page in pages) < MESSAGE_BYTES
        explained = await scheduling.ExplainPlan(scheduling_pb2.ExplainPlanRequest(task=names[0]))
        assert explained.ByteSize() < MESSAGE_BYTES and explained.explanation.num_neighbours == 1023


async def test_pages_of_one_answer_belong_together(mesh: SchedulingMesh) -> None:
    """With tasks that have long reasons an answer has several pages; tasks that come meanwhile are not in it."""
    mesh.ledger.message_tasks = 1000
    await mesh.add_executor(cost=COST)
    for number in range(4000):
        name = await mesh.ledger.put_task(number)
        mesh.ledger.tasks[name].task.spec.backbone = "none" * 300  # the reason quotes it
    async with mesh.scheduler() as (_, scheduling):
        first = await scheduling.GetPlan(scheduling_pb2.GetPlanRequest())
        assert first.next_page_token and first.ByteSize() < MESSAGE_BYTES
        late = await mesh.ledger.put_task(99_999)
        explanations = list(first.explanations)
        while first.next_page_token:
            first = await scheduling.GetPlan(scheduling_pb2.GetPlanRequest(page_token=first.next_page_token))
            explanations += first.explanations
        names = [e.task for e in explanations]
        assert len(names) == len(set(names)) == 4000 and late not in names


async def test_a_hypothetical_spec_has_the_limits_of_a_real_one(mesh: SchedulingMesh) -> None:
    await mesh.add_executor(cost=COST)
    spec = type(SPEC_OF_TASKS)()
    spec.CopyFrom(SPEC_OF_TASKS)
    spec.lora.target_modules.extend(["q_proj"] * 5000)
    new = scheduling_pb2.HypotheticalTask(task="tenants/b/tasks/new", spec=spec, num_train_tokens=100)
    async with mesh.scheduler() as (_, scheduling):
        with pytest.raises(Exception, match=r"tasks\[0\].spec: must have at most"):
            await scheduling.SimulatePlan(scheduling_pb2.SimulatePlanRequest(tasks=[new]))


OPERATORS = ["DrainExecutor", "GetPlan", "ExplainPlan", "SimulatePlan", "GetProfile"]


@pytest.mark.parametrize("name", OPERATORS)
async def test_every_field_of_an_operators_request_has_a_largest_size(mesh: SchedulingMesh, name: str) -> None:
    method = scheduling_pb2.DESCRIPTOR.services_by_name["SchedulingService"].methods_by_name[name]
    async with mesh.scheduler(), grpc.aio.insecure_channel(mesh.address) as channel:
        for path, request in oversized_requests(method.input_type):
            code, text, _ = await answer_of(channel, method, request, SECRET)
            named = "tasks[0].spec" if path.startswith("tasks[0].spec") else path
            assert code is grpc.StatusCode.INVALID_ARGUMENT and named in text and "shorten it" in text, (path, text)
