"""Counts executors' deaths by task: any task may be the cause, so each runs alone until it completes a step.

A task fails only if its executors die several times in a row while it is alone. Synchronous, no gRPC.
"""

from typing import Any

import sqlalchemy as sa

from engine.task import TaskState
from muxtune.v1 import errors_pb2
from services.admission.ledger import charges
from services.admission.store import tasks
from services.admission.store.tables import tasks as tasks_table


def list_suspects(connection: sa.Connection, executor: str) -> set[str]:
    """Return the executor's suspects: tasks that have not completed a step since an executor died with them."""
    query = sa.select(tasks_table.c.name).where(tasks_table.c.executor == executor, tasks_table.c.crashes > 0)
    return set(connection.execute(query).scalars())


def record_crash(connection: sa.Connection, row: Any, reason: str, num_suspects: int, max_crashes: int) -> bool:
    """Record that the task's executor died with `num_suspects` tasks; return whether the task fails because of it."""
    num_crashes = row.crashes + 1
    if num_suspects == 1 and num_crashes >= max_crashes:
        message = (
            f"its executors died {num_crashes} times in a row before a step, the last with no other task: {reason}"
        )
        failure = errors_pb2.TaskFailure(reason=errors_pb2.ERROR_REASON_INTERNAL, message=message)
        columns = {"crashes": num_crashes, **charges.columns_without_work(row)}
        tasks.change_state(connection, row, TaskState.FAILED, message, failure=failure, **columns)
        return True
    connection.execute(sa.update(tasks_table).where(tasks_table.c.name == row.name).values(crashes=num_crashes))
    return False
