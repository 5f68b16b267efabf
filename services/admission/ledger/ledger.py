"""The durable side of scheduling: leases, attempts, results. Everything is compared where it is committed:
(executor's lease term), (task, attempt, step), (plan version). Synchronous, no gRPC.

Lease deadlines run on this process's monotonic clock, so a jump of the wall clock changes none. After a restart, or
with another keeper, every lease gets its whole duration again.
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
from muxtune.v1 import operator_pb2, plan_pb2, task_pb2
from services.admission.ledger import crash_tracker, result_commit
from services.admission.ledger.fencing import FencedDatabase
from services.admission.ledger.scheduler_lease import SchedulerLease, check_leader
from services.admission.policy import quotas
from services.admission.store import audit_log, tasks
from services.admission.store.clock import now
from services.admission.store.database import Database
from services.admission.store.tables import executors, incarnations, plans
from services.admission.store.tables import tasks as tasks_table
from services.conversion.results import ATTEMPT_ENDS
from services.rpc.audit import AuditEntry
from services.rpc.authorization import Principal, Role


class Ledger:
    """Who makes one keeps the ledger: what an earlier one would still commit is refused, UnavailableError. `monotonic`
    is the clock of leases, replaceable in tests. `quota`: of tenants without one of their own. A task
    fails that was alone on an executor which died, `max_crashes` times in a row with no new step since the first."""

    def __init__(
        self,
        database: Database,
        monotonic: Callable[[], float] = time.monotonic,
        *,
        quota: operator_pb2.Quota | None = None,
        max_crashes: int = 3,
    ) -> None:
        self.fence = self._database = FencedDatabase(database)
        self.leadership = SchedulerLease(self.fence, monotonic)
        self._quota, self._max_crashes = quota or operator_pb2.Quota(), max_crashes
        self._monotonic = monotonic
        self._deadlines: dict[str, float] = {}
        self._guard = threading.Lock()
        with self.fence.read() as connection:
            for row in connection.execute(sa.select(executors).where(executors.c.is_ended.is_(False))):
                self._deadlines[row.name] = monotonic() + row.lease_seconds

    def snapshot(self) -> pb.GetSnapshotResponse:
        """Unfinished tasks, live executors. Call `end_expired` before.

        Tasks of a tenant who used up a limit of the day are left out, so that they are handed back and wait.
        """
        with self._database.write() as connection:
            rows = connection.execute(
                sa.select(tasks_table)
                .where(tasks_table.c.state.in_(tasks.UNFINISHED))
                .order_by(tasks_table.c.created, tasks_table.c.name)
            ).all()
            waiting, cancelling = quotas.exhausted_tenants(connection, self._quota), TaskState.CANCELLING.name
            version = connection.execute(sa.select(sa.func.max(plans.c.version))).scalar() or 0
            return pb.GetSnapshotResponse(
                tasks=[_snapshot_task(row) for row in rows if row.tenant not in waiting or row.state == cancelling],
                executors=[self._executor(row) for row in self._live(connection)],
                plan_version=version,
            )

    def next_deadline(self) -> float | None:
        """Monotonic time of the next lease to run out."""
        with self._guard:
            return min(self._deadlines.values(), default=None)

    def end_expired(self) -> list[str]:
        """Ends the leases that ran out; the tasks whose attempts were taken back."""
        if not self._expired():
            return []
        with self._database.write() as connection:
            expired = self._expired()  # none can be renewed now: writers take turns
            taken = [
                task
                for name in expired
                for task in self._end(connection, name, "its executor's lease ran out", is_crash=True)
            ]
        with self._guard:
            for name in expired:
                if self._deadlines.get(name, math.inf) <= self._monotonic():
                    del self._deadlines[name]
        return taken

    def put_lease(self, executor: plan_pb2.Executor, seconds: float) -> tuple[int, list[str]]:
        """Lease term 0 registers an incarnation, another renews: the term, and tasks whose attempts were taken back
        from the incarnation before. Raises LeaseLostError; see PutLease."""
        with self._database.write() as connection:
            row, term = self._row(connection, executor.name), executor.lease_term
            taken: list[str] = []
            if term == 0:
                term, taken = self._register(connection, row, executor)
            else:
                self._check_lease(row, executor.name, executor.lease_term, executor.incarnation)
                known = plan_pb2.Executor.FromString(row.executor)
                known.device.CopyFrom(executor.device)
                known.draining = executor.draining
                executor = known
            values = {"executor": executor.SerializeToString(), "lease_term": term, "lease_seconds": seconds}
            connection.execute(sa.update(executors).where(executors.c.name == executor.name).values(values))
            with self._guard:
                self._deadlines[executor.name] = self._monotonic() + seconds
        return term, taken

    def end_lease(self, name: str, incarnation: str) -> list[str]:
        """The tasks whose attempts were taken back."""
        with self._database.write() as connection:
            row = self._row(connection, name)
            if row is None or row.incarnation != incarnation or row.is_ended:
                return []
            taken = self._end(connection, name, "the executor left")
        with self._guard:
            self._deadlines.pop(name, None)
        return taken

    def commit_plan(self, request: pb.CommitPlanRequest) -> list[int]:
        """Attempts of the tasks started. Raises SupersededError or LeaseLostError with nothing stored."""
        with self._database.write() as connection:
            self._check_lease(self._row(connection, request.executor), request.executor, request.lease_term)
            check_leader(connection, request.leader_term)
            newest = connection.execute(sa.select(sa.func.max(plans.c.version))).scalar() or 0
            if request.version <= newest:
                raise SupersededError(f"plan {request.version} comes after plan {newest}: take a new snapshot")
            connection.execute(
                sa.insert(plans).values(version=request.version, executor=request.executor, created=now())
            )
            return [self._start(connection, request.executor, start) for start in request.starts]

    def commit_results(
        self, executor: str, lease_term: int, batch: Sequence[plan_pb2.TaskResult]
    ) -> tuple[list[pb.ResultVerdict.ValueType], bool]:
        """A verdict for each, in order, all in one transaction; and whether the plan may change by it. Raises
        LeaseLostError with nothing stored."""
        with self._database.write() as connection:
            self._check_lease(self._row(connection, executor), executor, lease_term)
            suspects = crash_tracker.suspects(connection, executor)
            verdicts = [result_commit.commit(connection, executor, result, self._max_crashes) for result in batch]
            is_cleared = suspects != crash_tracker.suspects(connection, executor)
        return verdicts, is_cleared or any(result.WhichOneof("result") in ATTEMPT_ENDS for result in batch)

    def record_audit(self, event: operator_pb2.AuditEvent) -> None:
        """A line from scheduling. Raises InvalidInputError for one that does not say who or what."""
        for field in ("subject", "method"):
            if not getattr(event, field):
                raise InvalidInputError.of_field(f"event.{field}", "is missing")
        principal = Principal(event.tenant or None, Role.ANYONE, event.subject)
        with self._database.write() as connection:
            audit_log.insert(connection, AuditEntry(principal, event.method, event.resource, event.status_code))

    def revoke(self, executor: str, names: Sequence[str], reason: str) -> list[str]:
        """The tasks whose attempts were taken back."""
        with self._database.write() as connection:
            return self._revoke(connection, executor, names, reason)

    def _register(self, connection: sa.Connection, row: Any, executor: plan_pb2.Executor) -> tuple[int, list[str]]:
        key = {"executor": executor.name, "incarnation": executor.incarnation}
        seen = connection.execute(sa.select(incarnations).filter_by(**key)).first()
        if seen and (row is None or row.incarnation != executor.incarnation):
            raise LeaseLostError(f"{executor.name}: a newer incarnation has this name", executor=executor.name)
        if not seen:
            connection.execute(sa.insert(incarnations).values(key))
        if row is None:
            fresh = {"name": executor.name, "incarnation": executor.incarnation, "lease_term": 1, "is_ended": False}
            connection.execute(sa.insert(executors).values(**fresh, lease_seconds=0.0, executor=b""))
            return 1, []
        is_crash = not row.is_ended  # it did not say good-bye
        taken = self._revoke(connection, executor.name, (), "its executor started anew", is_crash=is_crash)
        changed = {"incarnation": executor.incarnation, "is_ended": False}
        connection.execute(sa.update(executors).where(executors.c.name == executor.name).values(changed))
        return int(row.lease_term) + 1, taken

    def _revoke(
        self, connection: sa.Connection, executor: str, names: Sequence[str], reason: str, *, is_crash: bool = False
    ) -> list[str]:
        """RUNNING becomes QUEUED; CANCELLING waits for another executor, or ends if nothing was trained."""
        query = sa.select(tasks_table).where(tasks_table.c.executor == executor)
        rows = connection.execute(query.where(tasks_table.c.name.in_(names)) if names else query).all()
        for row in rows:
            columns: dict[str, Any] = {"executor": "", "attempt": row.attempt + 1}
            if is_crash and crash_tracker.count(connection, row, reason, len(rows), self._max_crashes):
                continue
            if row.state == TaskState.RUNNING.name:
                tasks.change_state(connection, row, TaskState.QUEUED, reason, **columns)
            elif row.state == TaskState.CANCELLING.name and row.checkpoint is None:
                tasks.change_state(connection, row, TaskState.CANCELLED, reason, **columns)
            else:
                connection.execute(sa.update(tasks_table).where(tasks_table.c.name == row.name).values(columns))
        return [row.name for row in rows]

    def _start(self, connection: sa.Connection, executor: str, start: pb.AttemptStart) -> int:
        row = tasks.row_of(connection, start.task)
        if row.attempt != start.expected_attempt or TaskState[row.state].is_final:
            raise SupersededError(
                f"{start.task} is {row.state} at attempt {row.attempt}, not {start.expected_attempt}", task=start.task
            )
        attempt = int(row.attempt) + 1
        columns: dict[str, Any] = {"attempt": attempt, "executor": executor, "started": row.started or now()}
        if row.state == TaskState.QUEUED.name:
            tasks.change_state(connection, row, TaskState.RUNNING, f"attempt {attempt} on {executor}", **columns)
        else:
            connection.execute(sa.update(tasks_table).where(tasks_table.c.name == row.name).values(columns))
        return attempt

    def _check_lease(self, row: Any, name: str, term: int, incarnation: str | None = None) -> None:
        is_other = incarnation is not None and row is not None and row.incarnation != incarnation
        if row is None or row.is_ended or row.lease_term != term or is_other or self._is_expired(name):
            raise LeaseLostError(f"{name} does not hold lease {term}: register again", executor=name)

    def _is_expired(self, name: str) -> bool:
        with self._guard:
            return self._deadlines.get(name, 0.0) <= self._monotonic()

    def _expired(self) -> list[str]:
        with self._guard:
            return [name for name, deadline in self._deadlines.items() if deadline <= self._monotonic()]

    def _end(self, connection: sa.Connection, name: str, reason: str, *, is_crash: bool = False) -> list[str]:
        connection.execute(sa.update(executors).where(executors.c.name == name).values(is_ended=True))
        return self._revoke(connection, name, (), reason, is_crash=is_crash)

    def _live(self, connection: sa.Connection) -> Sequence[Any]:
        query = sa.select(executors).where(executors.c.is_ended.is_(False)).order_by(executors.c.name)
        return connection.execute(query).all()

    def _executor(self, row: Any) -> plan_pb2.Executor:
        executor = plan_pb2.Executor.FromString(row.executor)
        executor.lease_term = row.lease_term
        with self._guard:
            left = self._deadlines.get(row.name, 0.0) - self._monotonic()
        executor.lease_expire_time.FromMicroseconds(now() + int(left * 1e6))
        return executor

    def _row(self, connection: sa.Connection, name: str) -> Any:
        return connection.execute(sa.select(executors).where(executors.c.name == name)).one_or_none()


def live_executors(connection: sa.Connection) -> list[plan_pb2.Executor]:
    """Those that hold a lease, as they described themselves."""
    rows = connection.execute(sa.select(executors.c.executor).where(executors.c.is_ended.is_(False)))
    return [plan_pb2.Executor.FromString(row.executor) for row in rows]


def _snapshot_task(row: Any) -> pb.SnapshotTask:
    return pb.SnapshotTask(
        task=tasks.to_proto(row),
        executor=row.executor,
        checkpoint=task_pb2.CheckpointCommitted.FromString(row.checkpoint) if row.checkpoint else None,
        initial_adapter_key=row.initial_adapter_key,
        num_crashes=row.crashes,
    )
