"""Random lives of tasks are compared with a model of the API's specification."""

import asyncio
import itertools
import random
from dataclasses import dataclass, field

import grpc
import pytest

from engine.task import LEGAL_TRANSITIONS, TaskState
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import errors_pb2, ledger_pb2, plan_pb2, task_pb2
from tests.services.admission.admission_mesh import (
    BOTH_DATABASES,
    Admission,
    checkpoint,
    executor,
    finished,
    lease,
    refused,
    step,
)
from tests.thoroughness import seeds

FINAL = {"SUCCEEDED", "FAILED", "CANCELLED"}
EXECUTORS = ("executors/one", "executors/two")
# task.proto: "QUEUED -> RUNNING -> SUCCEEDED | FAILED; QUEUED -> CANCELLED; RUNNING -> CANCELLING -> CANCELLED;
# RUNNING -> QUEUED when preempted or when its executor is lost."
ALLOWED = {(a.name, b.name) for a, following in LEGAL_TRANSITIONS.items() for b in following}


def test_final_states_are_final_and_the_rest_can_end() -> None:
    assert {state.name for state in TaskState if state.is_final} == FINAL
    for state in TaskState:
        reached, border = {state}, {state}
        while border:
            border = {after for before in border for after in LEGAL_TRANSITIONS[before]} - reached
            reached |= border
        assert any(other.name in FINAL for other in reached)


@dataclass
class Model:
    """Models a task by the API's specification."""

    state: str = "QUEUED"
    attempt: int = 0
    executor: str = ""
    step: int = 0
    checkpoint: int = 0
    history: list[str] = field(default_factory=lambda: ["QUEUED"])

    def become(self, state: str) -> None:
        self.state = state
        self.history.append(state)
        if state in FINAL:
            self.executor = ""

    def lose_executor(self) -> None:
        self.executor, self.attempt = "", self.attempt + 1
        if self.state == "RUNNING":
            self.become("QUEUED")
        elif not self.checkpoint:
            self.become("CANCELLED")


class Life:
    """Draws the next action, applies it to the service and to the model, and compares them."""

    def __init__(self, admission: Admission, seed: int) -> None:
        self.admission, self.draw = admission, random.Random(seed)
        self.models: dict[str, Model] = {}
        self.leases = dict.fromkeys(EXECUTORS, 1)

    async def begin(self, count: int) -> None:
        dataset = (await self.admission.upload()).name
        for i in range(count):
            self.models[(await self.admission.create(dataset, f"t{i}")).name] = Model()
        await self.admission.register(EXECUTORS[1], "i1")

    async def act(self) -> None:
        name, model = self.draw.choice(list(self.models.items()))
        acts = {
            self.start: 4,
            self.work: 6,
            self.stale: 2,
            self.end: 1,
            self.cancel: 1,
            self.release: 1,
            self.revoke: 1,
        }
        act = self.draw.choices([*acts, self.lose], [*acts.values(), 0.5])[0]
        await act(name, model)
        await self.compare(name)

    async def start(self, name: str, model: Model) -> None:
        holder = self.draw.choice(EXECUTORS)
        seen = await self.admission.ledger().GetSnapshot(ledger_pb2.GetSnapshotRequest())
        request = ledger_pb2.CommitPlanRequest(
            executor=holder, lease_term=self.leases[holder], version=seen.plan_version + 1,
            starts=[ledger_pb2.AttemptStart(task=name, expected_attempt=model.attempt)],
        )  # fmt: skip
        if model.state in FINAL:
            with refused(grpc.StatusCode.ABORTED, "SUPERSEDED"):
                await self.admission.ledger().CommitPlan(request)
            return
        assert list((await self.admission.ledger().CommitPlan(request)).attempts) == [model.attempt + 1]
        model.attempt, model.executor = model.attempt + 1, holder
        if model.state == "QUEUED":
            model.become("RUNNING")

    async def report(self, model: Model, result: plan_pb2.TaskResult) -> str:
        holder = model.executor or EXECUTORS[0]
        (verdict,) = await self.admission.commit(result, lease_term=self.leases[holder], executor=holder)
        return verdict

    async def work(self, name: str, model: Model) -> None:
        number = model.step + self.draw.choice((0, 1, 1))
        is_checkpoint = self.draw.random() < 0.3
        verdict = await self.report(model, (checkpoint if is_checkpoint else step)(name, model.attempt, number))
        if not model.executor:
            assert verdict == ("DUPLICATE" if model.state in FINAL else "STALE")
            return
        is_new = number > (model.checkpoint if is_checkpoint else model.step)
        assert verdict == ("COMMITTED" if is_new else "DUPLICATE") or (is_checkpoint and number == 0)
        if is_checkpoint:
            model.checkpoint = max(model.checkpoint, number)
        else:
            model.step = number

    async def stale(self, name: str, model: Model) -> None:
        results = (step(name, model.attempt - 1, model.step + 1), finished(name, model.attempt - 1, "old"))
        assert await self.report(model, self.draw.choice(results)) == "STALE"

    async def end(self, name: str, model: Model) -> None:
        if not model.executor:
            return
        fails = self.draw.random() < 0.4
        failure = errors_pb2.TaskFailure(reason=errors_pb2.ERROR_REASON_NON_FINITE)
        done = finished(name, model.attempt, "k" if model.step else "", cancelled=model.state == "CANCELLING")
        result = plan_pb2.TaskResult(task=name, attempt=model.attempt, failed=failure) if fails else done
        holder = model.executor
        assert await self.report(model, result) == "COMMITTED"
        model.become("FAILED" if fails else "CANCELLED" if model.state == "CANCELLING" else "SUCCEEDED")
        again = await self.admission.commit(result, lease_term=self.leases[holder], executor=holder)
        assert again == ["DUPLICATE"]

    async def cancel(self, name: str, model: Model) -> None:
        request = pb.CancelTaskRequest(name=name)
        if model.state in ("SUCCEEDED", "FAILED"):
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "ILLEGAL_TRANSITION"):
                await self.admission.tenant().CancelTask(request)
            return
        await self.admission.tenant().CancelTask(request)
        if model.state in ("QUEUED", "RUNNING"):
            model.become("CANCELLED" if model.state == "QUEUED" and not model.checkpoint else "CANCELLING")

    async def release(self, name: str, model: Model) -> None:
        if not model.executor:
            return
        result = plan_pb2.TaskResult(task=name, attempt=model.attempt, released=plan_pb2.TaskReleased())
        assert await self.report(model, result) == "COMMITTED"
        model.executor = ""
        if model.state == "RUNNING":
            model.become("QUEUED")

    async def revoke(self, name: str, model: Model) -> None:
        request = ledger_pb2.RevokeAttemptsRequest(executor=self.draw.choice(EXECUTORS), tasks=[name])
        held = bool(model.executor) and model.executor == request.executor
        assert (await self.admission.ledger().RevokeAttempts(request)).num_revoked == int(held)
        if held:
            model.lose_executor()

    async def lose(self, name: str, model: Model) -> None:
        """Restart an executor, let its lease expire, or restart admission."""
        how = self.draw.choice(("anew", "expired", "restart"))
        if how == "restart":
            await self.admission.restart()
            return
        lost = (self.draw.choice(EXECUTORS),) if how == "anew" else EXECUTORS
        if how == "expired":
            self.admission.clock.seconds += 31
            await self.admission.ledger().GetSnapshot(ledger_pb2.GetSnapshotRequest())
        for holder in lost:
            self.leases[holder] += 1
            incarnation = f"i{self.leases[holder]}"
            answer = await self.admission.ledger().PutLease(lease(executor(holder, incarnation)))
            assert answer.lease_term == self.leases[holder]
        for held in self.models.values():
            if held.executor in lost:
                held.lose_executor()

    async def compare(self, name: str) -> None:
        model, task = self.models[name], (await self.admission.tenant().GetTask(pb.GetTaskRequest(name=name))).task
        assert task_pb2.TaskState.Name(task.state) == f"TASK_STATE_{model.state}"
        assert (task.attempt, task.progress.step) == (model.attempt, model.step)
        assert task.HasField("end_time") == (model.state in FINAL)

    async def finish(self) -> None:
        """Finish every task and compare its history with the model's."""
        for name, model in self.models.items():
            if model.state not in FINAL and not model.executor:
                await self.start(name, model)
            if model.state not in FINAL:
                await self.end(name, model)
            await self.compare(name)
            events = await self.admission.events(name)
            assert [event.sequence for event in events] == list(range(1, len(events) + 1))
            changes = [event.state_changed for event in events if event.HasField("state_changed")]
            names = [task_pb2.TaskState.Name(change.state).removeprefix("TASK_STATE_") for change in changes]
            assert names == model.history
            assert set(itertools.pairwise(names)) <= ALLOWED
            assert sum(state in FINAL for state in names) == 1 and names[-1] in FINAL
            steps = [event.step_done.step for event in events if event.HasField("step_done")]
            assert steps == sorted(set(steps))


@pytest.mark.parametrize("database_url", BOTH_DATABASES, indirect=True)
@pytest.mark.parametrize("seed", seeds(3, 1))
async def test_random_lives_match_the_model(admission: Admission, seed: int) -> None:
    life = Life(admission, seed)
    await life.begin(4)
    for _ in range(120):
        await life.act()
    await life.finish()


async def call_something(admission: Admission, draw: random.Random, task: str) -> None:
    attempt, number = draw.randint(1, 5), draw.randint(1, 9)
    match draw.choices(("run", "step", "checkpoint", "finish", "cancel", "revoke"), (4, 4, 4, 1, 0.5, 3))[0]:
        case "run":
            await admission.run(task)
        case "step":
            await admission.commit(step(task, attempt, number))
        case "checkpoint":
            await admission.commit(checkpoint(task, attempt, number))
        case "finish":
            await admission.commit(finished(task, attempt, "k"))
        case "cancel":
            await admission.tenant().CancelTask(pb.CancelTaskRequest(name=task))
        case "revoke":
            request = ledger_pb2.RevokeAttemptsRequest(executor=EXECUTORS[0], tasks=[task])
            await admission.ledger().RevokeAttempts(request)


async def test_random_lives_at_once_stay_legal(admission: Admission) -> None:
    """Actions run concurrently: the test checks only what must hold in any order."""
    draw, dataset = random.Random(11), (await admission.upload()).name
    tasks = [(await admission.create(dataset, f"t{i}")).name for i in range(5)]

    async def somebody(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(25):
            try:
                await call_something(admission, chance, chance.choice(tasks))
            except grpc.RpcError as error:
                assert error.code() in (grpc.StatusCode.ABORTED, grpc.StatusCode.FAILED_PRECONDITION), error
            except KeyError:  # `run` looks the task up in the snapshot, which leaves ended tasks out
                pass

    await asyncio.gather(*(somebody(draw.randrange(1 << 30)) for _ in range(4)))
    for task in tasks:
        seen = (await admission.tenant().GetTask(pb.GetTaskRequest(name=task))).task
        if task_pb2.TaskState.Name(seen.state).removeprefix("TASK_STATE_") not in FINAL:
            (attempt,) = await admission.run(task)
            is_cancelling = seen.state == task_pb2.TASK_STATE_CANCELLING
            assert await admission.commit(finished(task, attempt, "k", cancelled=is_cancelling)) == ["COMMITTED"]
        events = await admission.events(task)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        names = [
            task_pb2.TaskState.Name(event.state_changed.state).removeprefix("TASK_STATE_")
            for event in events
            if event.HasField("state_changed")
        ]
        assert set(itertools.pairwise(names)) <= ALLOWED and names[-1] in FINAL
        steps = [event.step_done.step for event in events if event.HasField("step_done")]
        assert steps == sorted(set(steps))
    assert admission.num_rows()["adapters"] <= len(tasks)
