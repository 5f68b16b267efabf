"""The ledger: durable records of leases, attempts and results. Synchronous, no gRPC.

Every commit compares what it is based on with what is recorded: the executor's lease term; task, attempt and step; the
plan's version. Lease deadlines run on this process's monotonic clock, so that a jump of the wall clock changes none.
After a restart, or with another leader, every lease lasts its whole duration again.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa

from engine.errors import InvalidInputError, LeaseLostError, SupersededError
from engine.task import TaskState
from muxtune.v1 import ledger_pb2 as pb
from muxtune.v1 import operator_pb2, plan_pb2
from muxtune.v1.executor_history_pb2 import ExecutorHistory
from services.admission.ledger import charges, crash_tracker, result_commit, snapshot
from services.admission.ledger.crash_tracker import Loss
from services.admission.ledger.fencing import FencedDatabase
from services.admission.ledger.scheduler_lease import SchedulerLease, check_leader_term
from services.admission.store import audit_log, tasks
from services.admission.store.clock import now
from services.admission.store.database import Database
from services.admission.store.tables import executors, incarnations, plans
from services.admission.store.tables import tasks as tasks_table
from services.conversion.results import ATTEMPT_ENDS
from services.rpc.audit import AuditEntry
from services.rpc.authorization import Principal, Role


class Ledger:
    """Creating a Ledger acquires it: commits of earlier Ledgers raise UnavailableError from then on.

    `monotonic` is the clock of leases. `quota` applies to tenants that have none set. A task fails when `max_crashes`
    of its executors died in a row before it completed a step, and it ran alone on the last one.
    """

    def __init__(
        self,
        database: Database,
        monotonic: Callable[[], float] = time.monotonic,
        *,
        quota: operator_pb2.Quota | None = None,
        max_crashes: int = 3,
    ) -> None:
        self.fence = self._database = FencedDatabase(database)
        self.scheduler_lease = SchedulerLease(self.fence, monotonic)
        self._quota, self._max_crashes = quota or operator_pb2.Quota(), max_crashes
        self._monotonic = monotonic
        self._deadlines: dict[str, float] = {}
        self._guard = threading.Lock()
        with self.fence.read() as connection:
            for row in connection.execute(sa.select(executors).where(executors.c.is_ended.is_(False))):
                self._deadlines[row.name] = monotonic() + row.lease_seconds

    def snapshot_pages(self) -> list[pb.GetSnapshotResponse]:
        """Return the pages of a snapshot of unfinished tasks and live executors; the caller runs `end_expired_leases`
        before."""
        with self.fence.read_consistently() as connection:
            executors = [self._executor(row) for row in self._live_rows(connection)]
            return snapshot.read_pages(connection, executors, self._quota)

    def read_specs(self, names: Sequence[str]) -> tuple[list[pb.StoredTaskSpec], int]:
        """Return what `services.admission.ledger.snapshot.read_specs` does."""
        with self.fence.read() as connection:
            return snapshot.read_specs(connection, names)

    def next_deadline(self) -> float | None:
        """Return the monotonic time at which the next lease expires, or None without leases."""
        with self._guard:
            return min(self._deadlines.values(), default=None)

    def end_expired_leases(self) -> list[str]:
        """End expired leases; return the tasks whose attempts were revoked."""
        if not self._list_expired():
            return []
        with self._database.write() as connection:
            expired = self._list_expired()  # no lease can be renewed now: there is one writer at a time
            revoked = [
                task
                for name in expired
                for task in self._end(connection, name, "its executor's lease expired", is_lost=True)
            ]
        with self._guard:
            for name in expired:
                if self._deadlines.get(name, math.inf) <= self._monotonic():
                    del self._deadlines[name]
        return revoked

    def put_lease(
        self, executor: plan_pb2.Executor, seconds: float, history: ExecutorHistory | None = None
    ) -> tuple[int, list[str]]:
        """Register an incarnation (lease term 0) or renew its lease. Return the term, and the tasks that a registration
        changed: `history` says which of them an earlier process or trainer died with. Raises LeaseLostError; see
        PutLease."""
        with self._database.write() as connection:
            row, term = self._row(connection, executor.name), executor.lease_term
            revoked: list[str] = []
            if term == 0:
                term, revoked = self._register(connection, row, executor, history or ExecutorHistory())
            else:
                self._check_lease(row, executor.name, executor.lease_term, executor.incarnation)
                registered = plan_pb2.Executor.FromString(row.executor)
                registered.device.CopyFrom(executor.device)
                registered.draining = executor.draining
                executor = registered
            values = {"executor": executor.SerializeToString(), "lease_term": term, "lease_seconds": seconds}
            connection.execute(sa.update(executors).where(executors.c.name == executor.name).values(values))
            with self._guard:
                self._deadlines[executor.name] = self._monotonic() + seconds
        return term, revoked

    def end_lease(self, name: str, incarnation: str) -> list[str]:
        """End the lease of an executor that leaves; return the tasks whose attempts were revoked."""
        with self._database.write() as connection:
            row = self._row(connection, name)
            if row is None or row.incarnation != incarnation or row.is_ended:
                return []
            revoked = self._end(connection, name, "the executor left")
        with self._guard:
            self._deadlines.pop(name, None)
        return revoked

    def commit_plan(self, request: pb.CommitPlanRequest) -> list[int]:
        """Commit a plan and start its attempts; return their numbers. Stores nothing if it raises SupersededError or
        LeaseLostError."""
        with self._database.write() as connection:
            self._check_lease(self._row(connection, request.executor), request.executor, request.lease_term)
            check_leader_term(connection, request.leader_term)
            newest = connection.execute(sa.select(sa.func.max(plans.c.version))).scalar() or 0
            if request.version <= newest:
                raise SupersededError(
                    f"plan {request.version} is not newer than plan {newest}: plan again from a new snapshot"
                )
            connection.execute(
                sa.insert(plans).values(version=request.version, executor=request.executor, created=now())
            )
            return [self._start(connection, request.executor, start) for start in request.starts]

    def commit_results(
        self, executor: str, lease_term: int, batch: Sequence[plan_pb2.TaskResult]
    ) -> tuple[list[pb.ResultVerdict.ValueType], bool]:
        """Commit results in one transaction; return a verdict for each, in order, and whether the plan may have to
        change. Stores nothing if it raises LeaseLostError."""
        with self._database.write() as connection:
            self._check_lease(self._row(connection, executor), executor, lease_term)
            suspects_before = crash_tracker.list_suspects(connection, executor)
            verdicts = [
                result_commit.commit_result(connection, executor, result, self._max_crashes) for result in batch
            ]
            is_cleared = suspects_before != crash_tracker.list_suspects(connection, executor)
        return verdicts, is_cleared or any(result.WhichOneof("result") in ATTEMPT_ENDS for result in batch)

    def record_audit_event(self, event: operator_pb2.AuditEvent) -> None:
        """Store an audit event of scheduling. Raises InvalidInputError for one without a subject or a method."""
        for field in ("subject", "method"):
            if not getattr(event, field):
                raise InvalidInputError.of_field(f"event.{field}", "must not be empty")
        principal = Principal(event.tenant or None, Role.ANYONE, event.subject)
        with self._database.write() as connection:
            audit_log.insert(connection, AuditEntry(principal, event.method, event.resource, event.status_code))

    def revoke_attempts(self, executor: str, names: Sequence[str], reason: str) -> list[str]:
        """Revoke these tasks' attempts on the executor; return the tasks that had one."""
        with self._database.write() as connection:
            return self._revoke(connection, executor, names, reason)

    def _register(
        self,
        connection: sa.Connection,
        row: Any,
        executor: plan_pb2.Executor,
        history: ExecutorHistory,
    ) -> tuple[int, list[str]]:
        key = {"executor": executor.name, "incarnation": executor.incarnation}
        is_seen = connection.execute(sa.select(incarnations).filter_by(**key)).first() is not None
        if is_seen and (row is None or row.incarnation != executor.incarnation):
            raise LeaseLostError(
                f"{executor.name} was registered again by a newer process: stop this one", executor=executor.name
            )
        if not is_seen:
            connection.execute(sa.insert(incarnations).values(key))
        if row is None:
            values = {"name": executor.name, "incarnation": executor.incarnation, "lease_term": 1, "is_ended": False}
            connection.execute(sa.insert(executors).values(**values, lease_seconds=0.0, executor=b""))
            return 1, []
        name, is_same = row.name, row.incarnation == executor.incarnation
        crash_tracker.record_deaths(connection, name, history.trainer_deaths, self._max_crashes)
        reason = "its executor lost its lease" if is_same else "its executor restarted"
        revoked = self._revoke(connection, name, (), reason, is_lost=not is_same)
        deaths = {(result.task, result.attempt): result.released for result in history.trainer_deaths}

        def explain(task: str, loss: Loss) -> plan_pb2.TaskReleased | None:
            if is_same or row.incarnation == history.stopped_incarnation:
                return deaths.get((task, loss.attempt))
            return plan_pb2.TaskReleased(reason="its executor died", num_suspects=loss.num_tasks)

        explained = crash_tracker.explain_losses(connection, name, explain, self._max_crashes)
        changed = {"incarnation": executor.incarnation, "is_ended": False}
        connection.execute(sa.update(executors).where(executors.c.name == executor.name).values(changed))
        return int(row.lease_term) + 1, [*revoked, *explained]

    def _revoke(
        self, connection: sa.Connection, executor: str, names: Sequence[str], reason: str, *, is_lost: bool = False
    ) -> list[str]:
        """Requeue the executor's tasks, or only those in `names`. A CANCELLING task waits for another executor, or ends
        if nothing was trained. `is_lost`: the executor may have died."""
        query = sa.select(tasks_table).where(tasks_table.c.executor == executor)
        rows = connection.execute(query.where(tasks_table.c.name.in_(names)) if names else query).all()
        for row in rows:
            columns: dict[str, Any] = {"executor": "", "attempt": row.attempt + 1, **charges.columns_without_work(row)}
            if is_lost and crash_tracker.record_loss(connection, row, len(rows), reason, self._max_crashes):
                continue
            if row.state == TaskState.RUNNING.name:
                tasks.change_state(connection, row, TaskState.QUEUED, reason, **columns)
            elif row.state == TaskState.CANCELLING.name and row.checkpoint is None:
                tasks.change_state(connection, row, TaskState.CANCELLED, reason, **columns)
            else:
                connection.execute(sa.update(tasks_table).where(tasks_table.c.name == row.name).values(columns))
        return [row.name for row in rows]

    def _start(self, connection: sa.Connection, executor: str, start: pb.AttemptStart) -> int:
        row = tasks.get_row(connection, start.task)
        if row.attempt != start.expected_attempt or TaskState[row.state].is_final:
            raise SupersededError(
                f"{start.task} is {row.state} at attempt {row.attempt}, not {start.expected_attempt}", task=start.task
            )
        attempt = int(row.attempt) + 1
        columns: dict[str, Any] = {"attempt": attempt, "executor": executor, "started": row.started or now()}
        columns |= charges.columns_without_work(row)
        if row.state == TaskState.QUEUED.name:
            tasks.change_state(connection, row, TaskState.RUNNING, f"attempt {attempt} on {executor}", **columns)
        else:
            connection.execute(sa.update(tasks_table).where(tasks_table.c.name == row.name).values(columns))
        return attempt

    def _check_lease(self, row: Any, name: str, term: int, incarnation: str | None = None) -> None:
        is_other = incarnation is not None and row is not None and row.incarnation != incarnation
        if row is None or row.is_ended or row.lease_term != term or is_other or self._is_expired(name):
            raise LeaseLostError(f"{name} does not hold the lease of term {term}: register again", executor=name)

    def _is_expired(self, name: str) -> bool:
        with self._guard:
            return self._deadlines.get(name, 0.0) <= self._monotonic()

    def _list_expired(self) -> list[str]:
        with self._guard:
            return [name for name, deadline in self._deadlines.items() if deadline <= self._monotonic()]

    def _end(self, connection: sa.Connection, name: str, reason: str, *, is_lost: bool = False) -> list[str]:
        connection.execute(sa.update(executors).where(executors.c.name == name).values(is_ended=True))
        return self._revoke(connection, name, (), reason, is_lost=is_lost)

    def _live_rows(self, connection: sa.Connection) -> Sequence[Any]:
        query = sa.select(executors).where(executors.c.is_ended.is_(False)).order_by(executors.c.name)
        return connection.execute(query).all()

    def _executor(self, row: Any) -> plan_pb2.Executor:
        executor = plan_pb2.Executor.FromString(row.executor)
        executor.lease_term = row.lease_term
        with self._guard:
            seconds_left = self._deadlines.get(row.name, 0.0) - self._monotonic()
        executor.lease_expire_time.FromMicroseconds(now() + int(seconds_left * 1e6))
        return executor

    def _row(self, connection: sa.Connection, name: str) -> Any:
        return connection.execute(sa.select(executors).where(executors.c.name == name)).one_or_none()


def live_executors(connection: sa.Connection) -> list[plan_pb2.Executor]:
    """Return the executors that hold a lease, as they described themselves."""
    rows = connection.execute(sa.select(executors.c.executor).where(executors.c.is_ended.is_(False)))
    return [plan_pb2.Executor.FromString(row.executor) for row in rows]
