"""Tasks that were on an executor when it died: one of them may be why, so each runs alone until it has done a step.

Who kills its executors alone as well, again and again, fails; nobody else does. Synchronous, no gRPC.
"""

from typing import Any

import sqlalchemy as sa

from engine.task import TaskState
from muxtune.v1 import errors_pb2
from services.admission.store import tasks
from services.admission.store.tables import tasks as tasks_table


def suspects(connection: sa.Connection, executor: str) -> set[str]:
    """Of the tasks that the executor holds."""
    query = sa.select(tasks_table.c.name).where(tasks_table.c.executor == executor, tasks_table.c.crashes > 0)
    return set(connection.execute(query).scalars())


def count(connection: sa.Connection, row: Any, reason: str, num_suspects: int, max_crashes: int) -> bool:
    """Notes that the task's executor died, for this reason, with so many tasks; whether the task fails for it."""
    num_crashes = row.crashes + 1
    if num_suspects == 1 and num_crashes >= max_crashes:
        message = (
            f"its executor died {num_crashes} times in a row before a step of it was done, and it was alone: {reason}"
        )
        failure = errors_pb2.TaskFailure(reason=errors_pb2.ERROR_REASON_INTERNAL, message=message)
        tasks.change_state(connection, row, TaskState.FAILED, message, failure=failure, crashes=num_crashes)
        return True
    connection.execute(sa.update(tasks_table).where(tasks_table.c.name == row.name).values(crashes=num_crashes))
    return False
