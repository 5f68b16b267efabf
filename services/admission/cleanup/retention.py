"""Deletes rows that are older than an operator wants to keep them. Synchronous, no gRPC.

Rows go in transactions of a few milliseconds, because there is one writer at a time and every call waits for it. Usage
is never deleted: it is one row for each tenant and day, and does not depend on other tables.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from services.admission.cleanup.garbage_collector import GarbageCollector
from services.admission.store.clock import now
from services.admission.store.database import Database
from services.admission.store.tables import audit_events, plans, requests, task_events, tasks
from services.settings import SettingsError

_BATCH_ROWS, _BATCH_TASKS, _NUM_PLANS = 500, 100, 1000
_DAY_MICROSECONDS = 86_400_000_000
_YOUNG_MICROSECONDS = 600_000_000  # a task is kept so long after its end, whatever the number of its tenant's tasks
_MIN_AUDIT_DAYS = 30  # the database refuses to delete younger entries: migration 0007


@dataclass(frozen=True)
class RetentionPolicy:
    """Says which rows are kept; 0 keeps all. Of tasks and requests only the newest `num_*` of each tenant are.

    `events_days`: events of a task after its end, but its last one. `tasks_days`, `num_tasks`: tasks that ended.
    `requests_days`, `num_requests`: ids by which a repeated request is recognised. `audit_days`: the audit log.
    """

    events_days: float = 30
    tasks_days: float = 0
    num_tasks: int = 10_000
    requests_days: float = 2
    num_requests: int = 100_000
    audit_days: float = 0

    def __post_init__(self) -> None:
        """Raises SettingsError for negative values, and for audit entries that the database would not delete."""
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise SettingsError(f"MUXTUNE_KEEP_{name.upper()}: {value} must be finite and not negative")
        if 0 < self.audit_days < _MIN_AUDIT_DAYS:
            raise SettingsError(f"MUXTUNE_KEEP_AUDIT_DAYS: {self.audit_days} must be 0 or at least {_MIN_AUDIT_DAYS}")


class OldRows:
    """Deletes what the policy does not keep. A deletion that is cut short is completed by the next one."""

    def __init__(self, database: Database, collector: GarbageCollector, policy: RetentionPolicy) -> None:
        self._database, self._collector, self._policy = database, collector, policy
        self._last_cleared = (0, "")  # the last task, by its end, whose events are deleted

    def delete(self) -> Iterator[int]:
        """Delete old rows; yield the number of rows of each transaction. Raises UnavailableError."""
        policy = self._policy
        yield from self._delete_plans()
        if policy.events_days:
            yield from self._delete_events(_before(policy.events_days))
        if policy.tasks_days:
            yield from self._delete_tasks(tasks.c.ended < _before(policy.tasks_days))
        for tenant in self._tenants(tasks) if policy.num_tasks else ():
            yield from self._delete_tasks_beyond(tenant, policy.num_tasks)
        for tenant in self._tenants(requests):
            yield from self._delete_requests(tenant)
        if policy.audit_days:
            yield from self._delete_audit_events(_before(policy.audit_days))

    def _delete_plans(self) -> Iterator[int]:
        """Delete all but the newest plans: of them only the newest version is read."""
        newest = sa.select(sa.func.max(plans.c.version)).scalar_subquery()
        yield from self._delete_rows(sa.select(*plans.primary_key).where(plans.c.version <= newest - _NUM_PLANS))

    def _delete_events(self, ended_before: int) -> Iterator[int]:
        """Delete the events of tasks that ended, a few tasks at a time, but the last event of each: it has the task's
        final state, which ends a watch."""
        position = sa.tuple_(tasks.c.ended, tasks.c.name)
        while True:
            after = position > sa.tuple_(*map(sa.literal, self._last_cleared))
            query = sa.select(tasks.c.ended, tasks.c.name).where(after, tasks.c.ended < ended_before)
            if not (rows := self._read(query.order_by(tasks.c.ended, tasks.c.name).limit(_BATCH_TASKS))):
                return
            events = _events_of(rows).join(tasks, tasks.c.name == task_events.c.task)
            yield from self._delete_rows(events.where(task_events.c.sequence < tasks.c.last_sequence))
            self._last_cleared = (rows[-1].ended, rows[-1].name)

    def _delete_tasks_beyond(self, tenant: str, num_tasks: int) -> Iterator[int]:
        """Delete a tenant's tasks that are older than its `num_tasks` newest ones and ended a while ago."""
        created = sa.select(tasks.c.created).where(tasks.c.tenant == tenant).order_by(tasks.c.created.desc())
        for row in self._read(created.offset(num_tasks).limit(1)):
            is_old = (tasks.c.tenant == tenant) & (tasks.c.created <= row.created)
            yield from self._delete_tasks(is_old & (tasks.c.ended < now() - _YOUNG_MICROSECONDS))

    def _delete_tasks(self, are_old: "sa.ColumnElement[bool]") -> Iterator[int]:
        """Delete tasks that ended, with their events. Their adapters remain; before, what else they left in the
        artifact store is deleted, which nobody would know afterwards."""
        query = sa.select(tasks.c.name, tasks.c.started).where(are_old).limit(_BATCH_TASKS)
        while rows := self._read(query):
            if self._collector.collect(row.name for row in rows if row.started):
                return  # the store is away
            yield from self._delete_rows(_events_of(rows))
            yield from self._delete_rows(sa.select(tasks.c.name).where(tasks.c.name.in_([row.name for row in rows])))

    def _delete_requests(self, tenant: str) -> Iterator[int]:
        policy, is_tenants = self._policy, requests.c.tenant == tenant
        oldest_kept = _before(policy.requests_days) if policy.requests_days else 0
        if policy.num_requests:
            created = sa.select(requests.c.created).where(is_tenants).order_by(requests.c.created.desc())
            newest_old = self._read(created.offset(policy.num_requests).limit(1))
            oldest_kept = max([oldest_kept, *(row.created + 1 for row in newest_old)])
        yield from self._delete_rows(
            sa.select(*requests.primary_key).where(is_tenants, requests.c.created < oldest_kept)
        )

    def _delete_audit_events(self, before: int) -> Iterator[int]:
        """Delete the oldest entries. They are in the order of their times, which have no index."""
        sequence = audit_events.c.sequence
        oldest = sa.select(sequence).order_by(sequence).limit(_BATCH_ROWS)
        yield from self._delete_rows(sa.select(sequence).where(sequence.in_(oldest), audit_events.c.time < before))

    def _delete_rows(self, keys: "sa.Select[Any]") -> Iterator[int]:
        """Delete the rows whose primary keys the query selects, in transactions of a batch each."""
        columns = list(keys.selected_columns)
        batch = sa.delete(columns[0].table).where(sa.tuple_(*columns).in_(keys.limit(_BATCH_ROWS)))
        while self._read(keys.limit(1)):
            with self._database.write() as connection:
                num_rows = connection.execute(batch).rowcount
            yield num_rows

    def _tenants(self, table: sa.Table) -> list[str]:
        return [row.tenant for row in self._read(sa.select(table.c.tenant).distinct())]

    def _read(self, query: "sa.Select[Any]") -> Sequence[Any]:
        with self._database.read() as connection:
            return connection.execute(query).all()


def _before(days: float) -> int:
    return now() - int(days * _DAY_MICROSECONDS)


def _events_of(rows: Sequence[Any]) -> "sa.Select[Any]":
    """Select the keys of the tasks' events."""
    return sa.select(*task_events.primary_key).where(task_events.c.task.in_([row.name for row in rows]))
