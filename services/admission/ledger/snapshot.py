"""Reads what scheduling plans with: a snapshot of unfinished tasks in pages, and what never changes of them on request.

Specs are not in a snapshot, as they are most of its bytes: scheduling asks once for each task. Synchronous, no gRPC.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from google.protobuf.message import DecodeError

from engine.errors import InvalidInputError
from engine.task import TaskState
from muxtune.v1 import event_pb2, operator_pb2, plan_pb2, task_pb2
from muxtune.v1 import ledger_pb2 as pb
from services.admission.ledger import crash_tracker
from services.admission.policy import quotas
from services.admission.store import tasks
from services.admission.store.tables import plans
from services.admission.store.tables import tasks as tasks_table
from services.conversion.task import state_to_proto
from services.message_parts import MAX_PART_BYTES, cut, joined

_MAX_NAMES, _NAMES_OF_A_QUERY = 1000, 64
_ROWS_OF_A_FETCH = 500
_COLUMNS = [
    tasks_table.c[name]
    for name in ("name", "tenant", "state", "progress", "attempt", "trace_parent", "executor", "checkpoint",
                 "initial_adapter_key", "crashes", "losses")
]  # fmt: skip


def read_pages(
    connection: sa.Connection, executors: Sequence[plan_pb2.Executor], default: operator_pb2.Quota
) -> list[pb.GetSnapshotResponse]:
    """Return the pages of a snapshot, at least one: first the executors, then the unfinished tasks, oldest first.

    Tasks of tenants that have reached a daily limit are left out, so that their executors release them.
    """
    version = connection.execute(sa.select(sa.func.max(plans.c.version))).scalar() or 0
    pages = [pb.GetSnapshotResponse(executors=part) for part in cut(executors)]
    pages += [pb.GetSnapshotResponse(tasks=part) for part in cut(_read_tasks(connection, default))]
    pages = joined(pages) or [pb.GetSnapshotResponse()]
    for page in pages:
        page.plan_version = version
    return pages


def _read_tasks(connection: sa.Connection, default: operator_pb2.Quota) -> Iterator[pb.SnapshotTask]:
    exhausted, cancelling = quotas.list_exhausted_tenants(connection, default), TaskState.CANCELLING.name
    states = {name: state_to_proto(TaskState[name]) for name in tasks.UNFINISHED}
    query = sa.select(*_COLUMNS).where(tasks_table.c.state.in_(tasks.UNFINISHED))
    query = query.order_by(tasks_table.c.created, tasks_table.c.name)
    for row in connection.execute(query.execution_options(yield_per=_ROWS_OF_A_FETCH)):
        if row.tenant not in exhausted or row.state == cancelling:
            yield pb.SnapshotTask(
                task=task_pb2.Task(
                    name=row.name,
                    state=states[row.state],
                    progress=task_pb2.TaskProgress.FromString(row.progress),
                    attempt=row.attempt,
                    trace_parent=row.trace_parent,
                ),
                executor=row.executor,
                checkpoint=event_pb2.CheckpointCommitted.FromString(row.checkpoint) if row.checkpoint else None,
                initial_adapter_key=row.initial_adapter_key,
                num_crashes=crash_tracker.count_suspicions(row),
            )


def read_specs(connection: sa.Connection, names: Sequence[str]) -> tuple[list[pb.StoredTaskSpec], int]:
    """Return specs and estimates of the first tasks in `names`, as many as a message may have, and their number in
    `names`; names of no task are skipped. Raises InvalidInputError for too many names."""
    if len(names) > _MAX_NAMES:
        raise InvalidInputError.of_field("tasks", f"has {len(names)} names, at most {_MAX_NAMES} are allowed")
    found, size = list[pb.StoredTaskSpec](), 0
    for index, (name, row) in enumerate(_read_rows(connection, names)):
        if row is None:
            continue
        stored = _stored_spec(name, row)
        size += stored.ByteSize() + 8
        if found and size > MAX_PART_BYTES:
            return found, index
        found.append(stored)
    return found, len(names)


def _read_rows(connection: sa.Connection, names: Sequence[str]) -> Iterator[tuple[str, Any | None]]:
    columns = tasks_table.c
    for start in range(0, len(names), _NAMES_OF_A_QUERY):
        some = names[start : start + _NAMES_OF_A_QUERY]
        query = sa.select(columns.name, columns.spec, columns.estimate).where(columns.name.in_(some))
        rows = {row.name: row for row in connection.execute(query)}
        for name in some:
            yield name, rows.get(name)


def _stored_spec(name: str, row: Any) -> pb.StoredTaskSpec:
    try:
        return pb.StoredTaskSpec(
            task=name,
            spec=task_pb2.TaskSpec.FromString(row.spec),
            estimate=task_pb2.TaskEstimate.FromString(row.estimate),
        )
    except DecodeError:
        return pb.StoredTaskSpec(task=name, unreadable="its stored spec or estimate is damaged")
