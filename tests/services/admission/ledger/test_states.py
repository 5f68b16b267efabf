"""After any sequence of actions a task's state equals that of a model of the API: hypothesis searches for a sequence
after which it does not. The tests call the ledger directly; time is virtual, and the wall clock jumps."""

import json
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from engine.errors import IllegalTransitionError, LeaseLostError, SupersededError
from muxtune.v1 import errors_pb2, event_pb2, ledger_pb2, plan_pb2, task_pb2
from muxtune.v1.executor_history_pb2 import ExecutorHistory
from services.admission.ledger.ledger import Ledger
from services.admission.store import tasks
from services.admission.store.database import Database
from tests.services.admission.admission_mesh import checkpoint, executor, finished, spec, step
from tests.services.admission.work_reports import in_progress
from tests.thoroughness import examples

FINAL = {"SUCCEEDED", "FAILED", "CANCELLED"}
EXECUTORS = ("executors/one", "executors/two")
LEASE_SECONDS, MAX_CRASHES, HOUR = 10.0, 3, 3600
KINDS = [
    "step",
    "same step",
    "in progress",
    "checkpoint",
    "finished",
    "failed",
    "released",
    "died alone",
    "died with others",
]


@dataclass
class Task:
    """Models what the task should be."""

    state: str = "QUEUED"
    attempt: int = 0
    executor: str = ""
    step: int = 0
    checkpoint: int = 0
    crashes: int = 0
    losses: dict[str, int] = field(
        default_factory=dict
    )  # tasks beside it and itself, by executor that was lost with it
    num_events: int = 1

    def become(self, state: str) -> None:
        self.state, self.num_events = state, self.num_events + 1
        if state in FINAL:
            self.executor, self.losses = "", {}

    def die(self, num_suspects: int) -> bool:
        """Record a crash; return whether the task fails."""
        if num_suspects == 1 and self.crashes + len(self.losses) + 1 >= MAX_CRASHES:
            self.crashes += len(self.losses) + 1
            self.become("FAILED")
            return True
        self.crashes += 1
        return False

    def be_lost(self, num_tasks: int) -> bool:
        """Record the loss of its executor; return whether the task fails because of those lost before."""
        earlier = list(self.losses.values())
        if earlier and earlier[-1] == 1 and self.crashes + len(earlier) >= MAX_CRASHES:
            self.crashes += len(earlier)
            self.become("FAILED")
            return True
        self.losses[self.executor] = num_tasks
        return False


@dataclass
class Executor:
    lease_term: int = 0
    deadline: float = 0.0
    num_starts: int = 0
    has_left: bool = True


@dataclass(frozen=True)
class Attempt:
    task: str
    number: int
    executor: str
    lease_term: int


class Store(RuleBasedStateMachine):
    """Applies the same actions to the store and to the model; invariants compare them."""

    names, attempts = Bundle("names"), Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="states-"))
        self.now, self.wall_offset, self.num_reports = 1000.0, 0, 0
        self.tasks: dict[str, Task] = {}
        self.executors = {name: Executor() for name in EXECUTORS}
        real = time.time_ns
        self.wall = mock.patch("time.time_ns", lambda: real() + self.wall_offset * 10**9)
        self.wall.start()
        self.database = Database(f"sqlite:///{self.folder / 'a.db'}")
        self.database.migrate()
        self.ledger = Ledger(self.database, lambda: self.now, max_crashes=MAX_CRASHES)

    def teardown(self) -> None:
        self.wall.stop()
        self.database.close()
        shutil.rmtree(self.folder)

    @initialize()
    def start(self) -> None:
        for name in EXECUTORS:
            self.start_executor(name)

    def is_live(self, name: str, lease_term: int) -> bool:
        lease = self.executors[name]
        return not lease.has_left and lease.lease_term == lease_term and lease.deadline > self.now

    def lose(self, name: str, *, may_have_died: bool) -> None:
        """Revoke the executor's attempts in the model."""
        held = [task for task in self.tasks.values() if task.executor == name]
        for task in held:
            if may_have_died and task.be_lost(len(held)):
                continue
            task.executor, task.attempt = "", task.attempt + 1
            if task.state == "RUNNING":
                task.become("QUEUED")
            elif not task.checkpoint:
                task.become("CANCELLED")

    @rule(target=names)
    def create(self) -> str:
        name = f"tenants/acme/tasks/t{len(self.tasks)}"
        with self.database.write() as connection:
            tasks.insert(connection, name, spec("tenants/acme/datasets/d"), task_pb2.TaskEstimate(num_steps=4), "", "")
        self.tasks[name] = Task()
        return name

    @rule(name=names)
    def cancel(self, name: str) -> None:
        task = self.tasks[name]
        may = task.state not in ("SUCCEEDED", "FAILED")
        try:
            with self.database.write() as connection:
                tasks.cancel(connection, name)
        except IllegalTransitionError:
            assert not may
            return
        assert may
        if task.state == "QUEUED" and not task.checkpoint:
            task.become("CANCELLED")
        elif task.state in ("QUEUED", "RUNNING"):
            task.become("CANCELLING")

    @rule(target=attempts, name=names, where=st.sampled_from(EXECUTORS), is_late=st.booleans())
    def plan(self, name: str, where: str, is_late: bool):  # type: ignore[no-untyped-def]
        """Commit a plan; a plan from an older snapshot starts nothing."""
        task, host = self.tasks[name], self.executors[where]
        version = self.ledger.snapshot_pages()[0].plan_version + 1
        start = ledger_pb2.AttemptStart(task=name, expected_attempt=task.attempt - is_late)
        request = ledger_pb2.CommitPlanRequest(
            executor=where, lease_term=host.lease_term, version=version, starts=[start]
        )
        try:
            (number,) = self.ledger.commit_plan(request)
        except LeaseLostError:
            assert not self.is_live(where, host.lease_term)
            return multiple()
        except SupersededError:
            assert is_late or task.state in FINAL
            return multiple()
        assert self.is_live(where, host.lease_term) and not is_late and task.state not in FINAL
        task.attempt, task.executor = task.attempt + 1, where
        if task.state == "QUEUED":
            task.become("RUNNING")
        assert number == task.attempt
        return Attempt(name, number, where, host.lease_term)

    @rule(attempt=attempts, kind=st.sampled_from(KINDS))
    def report(self, attempt: Attempt, kind: str) -> None:
        """Commit a result of any attempt, superseded ones included."""
        task = self.tasks[attempt.task]
        assume(kind != "checkpoint" or task.step > 0)  # nothing trained, nothing to write
        result = self.result(attempt, kind)
        try:
            ((verdict,), _) = self.ledger.commit_results(attempt.executor, attempt.lease_term, [result])
        except LeaseLostError:
            assert not self.is_live(attempt.executor, attempt.lease_term)
            return
        assert self.is_live(attempt.executor, attempt.lease_term)
        verdict_name = ledger_pb2.ResultVerdict.Name(verdict).removeprefix("RESULT_VERDICT_")
        if task.state in FINAL and task.attempt == attempt.number:
            assert verdict_name == "DUPLICATE"
        elif (task.attempt, task.executor) != (attempt.number, attempt.executor):
            assert verdict_name == "STALE"
        else:
            assert verdict_name == ("COMMITTED" if self.apply(task, kind) else "DUPLICATE")

    def result(self, attempt: Attempt, kind: str) -> plan_pb2.TaskResult:
        name, number, task = attempt.task, attempt.number, self.tasks[attempt.task]
        if kind in ("step", "same step"):
            return step(name, number, task.step + (kind == "step"))
        if kind == "in progress":
            self.num_reports += 1
            return in_progress(name, number, task.step, (0, 0, float(self.num_reports)))  # more than all before
        if kind == "checkpoint":
            return checkpoint(name, number, task.step)
        if kind == "finished":
            return finished(name, number, "k" if task.step else "", cancelled=task.state == "CANCELLING")
        if kind == "failed":
            return plan_pb2.TaskResult(task=name, attempt=number, failed=errors_pb2.TaskFailure(message="NaN"))
        count = {"released": 0, "died alone": 1, "died with others": 2}[kind]
        released = plan_pb2.TaskReleased(reason=kind, num_suspects=count)
        return plan_pb2.TaskResult(task=name, attempt=number, released=released)

    def apply(self, task: Task, kind: str) -> bool:
        """Apply the result to the model; return whether it is new."""
        if kind == "step":
            task.step, task.crashes, task.losses, task.num_events = task.step + 1, 0, {}, task.num_events + 1
        elif kind == "same step" or (kind == "checkpoint" and task.checkpoint and task.checkpoint >= task.step):
            return False
        elif kind == "checkpoint":
            task.checkpoint, task.num_events = task.step, task.num_events + 1
        elif kind in ("finished", "failed"):
            ends = {"failed": "FAILED", "finished": "CANCELLED" if task.state == "CANCELLING" else "SUCCEEDED"}
            task.become(ends[kind])
        elif kind == "released" or not task.die(1 if kind == "died alone" else 2):
            task.executor = ""
            if task.state == "RUNNING":
                task.become("QUEUED")
        return True

    @rule(name=st.sampled_from(EXECUTORS), was_stopped=st.booleans())
    def start_executor(self, name: str, was_stopped: bool = False) -> None:
        """Restart the executor: attempts of its earlier start are revoked, and it died unless it was stopped."""
        host = self.executors[name]
        host.num_starts += 1
        history = ExecutorHistory(stopped_incarnation=f"i{host.num_starts - 1}" if was_stopped else "")
        self.register(name, history, is_same=False, has_died=not was_stopped)

    @rule(name=st.sampled_from(EXECUTORS), died_with=st.booleans())
    def return_executor(self, name: str, died_with: bool) -> None:
        """The executor registers again, as it has lost its lease; its trainer may have died of the tasks."""
        released = plan_pb2.TaskReleased(reason="its trainer died", num_suspects=1)
        deaths = [
            plan_pb2.TaskResult(task=task, attempt=number, released=released)
            for task, model in self.tasks.items()
            for number in range(1, model.attempt + 1)
        ]
        history = ExecutorHistory(trainer_deaths=deaths if died_with else [])
        self.register(name, history, is_same=True, has_died=died_with)

    def register(self, name: str, history: ExecutorHistory, *, is_same: bool, has_died: bool) -> None:
        host = self.executors[name]
        attempt, _ = self.ledger.put_lease(executor(name, f"i{host.num_starts}"), LEASE_SECONDS, history)
        if is_same and has_died:
            for task in [task for task in self.tasks.values() if task.executor == name]:
                task.die(1)
        self.lose(name, may_have_died=not is_same)
        for task in self.tasks.values():
            num_tasks = task.losses.pop(name, None)
            if num_tasks is not None and has_died:
                task.die(1 if is_same else num_tasks)
        host.lease_term, host.has_left, host.deadline = host.lease_term + 1, False, self.now + LEASE_SECONDS
        assert attempt == host.lease_term

    @rule(name=st.sampled_from(EXECUTORS))
    def renew(self, name: str) -> None:
        host = self.executors[name]
        holder = executor(name, f"i{host.num_starts}", lease_term=host.lease_term)
        try:
            self.ledger.put_lease(holder, LEASE_SECONDS)
        except LeaseLostError:
            assert not self.is_live(name, host.lease_term)
            return
        assert self.is_live(name, host.lease_term)
        host.deadline = self.now + LEASE_SECONDS

    @rule(name=st.sampled_from(EXECUTORS))
    def leave(self, name: str) -> None:
        host = self.executors[name]
        self.ledger.end_lease(name, f"i{host.num_starts}")
        if not host.has_left:
            self.lose(name, may_have_died=False)
            host.has_left = True

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.ledger.end_expired_leases()
        for name, host in self.executors.items():
            if not host.has_left and host.deadline <= self.now:
                self.lose(name, may_have_died=True)
                host.has_left = True

    @rule(jump=st.sampled_from([-HOUR, HOUR]))
    def jump(self, jump: int) -> None:
        """Move the wall clock, on which no lease and no order depends."""
        self.wall_offset += jump

    @rule()
    def restart_admission(self) -> None:
        """Restart admission: leases last their whole duration again."""
        self.database.close()
        self.database = Database(f"sqlite:///{self.folder / 'a.db'}")
        self.ledger = Ledger(self.database, lambda: self.now, max_crashes=MAX_CRASHES)
        for host in self.executors.values():
            host.deadline = self.now + LEASE_SECONDS

    @invariant()
    def every_task_is_what_it_should_be(self) -> None:
        with self.database.read() as connection:
            for row in connection.execute(sa.select(tasks.tasks)):
                task = tasks.to_proto(row)
                checkpoint_step = event_pb2.CheckpointCommitted.FromString(row.checkpoint or b"").step
                seen = Task(row.state, row.attempt, row.executor, task.progress.step, checkpoint_step, row.crashes)
                seen.num_events = row.last_sequence
                if row.state not in FINAL:
                    seen.losses = {name: num for name, (_, num) in json.loads(row.losses or "{}").items()}
                assert seen == self.tasks[row.name], row.name
                events = tasks.list_events(connection, row.name, 0, 1000)
                assert [event.sequence for event in events] == list(range(1, row.last_sequence + 1))
                states = [event.state_changed.state for event in events if event.HasField("state_changed")]
                names = [task_pb2.TaskState.Name(state).removeprefix("TASK_STATE_") for state in states]
                assert names[-1] == row.state and not FINAL & set(names[:-1])


Store.TestCase.settings = settings(
    max_examples=examples(25), stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestStore = pytest.mark.timeout(300)(Store.TestCase)
