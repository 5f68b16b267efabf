"""Counts executors' deaths by task: any task may be the cause, so each runs alone until it completes a step.

A task fails only if its executors die several times in a row while it is alone. An executor that is lost may have died,
or its lease may have run out while the network, scheduling or admission was away. So a loss is recorded with the
executor's tasks, and counts only when it is known for a death (docs/adr/0017):

- its process registers again: it lived, and only tasks that its trainer died with count;
- another process registers under its name: it died, unless it had been asked to stop;
- a further executor is lost with the task, and it has not come back by then: it counts as dead.

Synchronous, no gRPC.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from typing import Any

import sqlalchemy as sa

from engine.task import TaskState
from muxtune.v1 import errors_pb2, plan_pb2
from services.admission.ledger import charges
from services.admission.store import tasks
from services.admission.store.tables import tasks as tasks_table


@dataclass(frozen=True)
class Loss:
    """An executor that was lost with a task: the task's attempt on it, and the number of tasks that it held."""

    attempt: int
    num_tasks: int


# Returns the death of a task's executor, for the task and its loss; None if there was none.
Explain = Callable[[str, Loss], plan_pb2.TaskReleased | None]


def list_suspects(connection: sa.Connection, executor: str) -> set[str]:
    """Return the executor's suspects: tasks that have not completed a step since an executor died or was lost."""
    is_suspect = sa.or_(tasks_table.c.crashes > 0, tasks_table.c.losses != "")
    query = sa.select(tasks_table.c.name).where(tasks_table.c.executor == executor, is_suspect)
    return set(connection.execute(query).scalars())


def count_suspicions(row: Any) -> int:
    """Return the number of executors that died, or were lost for a reason not known yet, since the last new step."""
    return int(row.crashes) + len(_losses(row))


def record_crash(connection: sa.Connection, row: Any, reason: str, num_suspects: int, max_crashes: int) -> bool:
    """Record that the task's executor died with `num_suspects` tasks; return whether the task fails because of it."""
    num_crashes = count_suspicions(row) + 1
    if num_suspects == 1 and num_crashes >= max_crashes:
        _fail(connection, row, num_crashes, reason)
        return True
    values = {"crashes": row.crashes + 1}
    connection.execute(sa.update(tasks_table).where(tasks_table.c.name == row.name).values(values))
    return False


def record_deaths(
    connection: sa.Connection, executor: str, deaths: Iterable[plan_pb2.TaskResult], max_crashes: int
) -> None:
    """Record the deaths of the executor's trainer with attempts that are still the executor's."""
    for death in deaths:
        query = sa.select(tasks_table).filter_by(name=death.task, attempt=death.attempt, executor=executor)
        if (row := connection.execute(query).one_or_none()) is not None:
            record_crash(connection, row, death.released.reason, death.released.num_suspects, max_crashes)


def record_loss(connection: sa.Connection, row: Any, num_tasks: int, reason: str, max_crashes: int) -> bool:
    """Record that the task's executor was lost, which held `num_tasks`.

    Return whether the task fails, because of executors that were lost before and have not come back.
    """
    losses, num_crashes = _losses(row), count_suspicions(row)
    if losses and list(losses.values())[-1].num_tasks == 1 and num_crashes >= max_crashes:
        _fail(connection, row, num_crashes, reason)
        return True
    _put_losses(connection, row, losses | {row.executor: Loss(row.attempt, num_tasks)})
    return False


def explain_losses(connection: sa.Connection, executor: str, explain: Explain, max_crashes: int) -> list[str]:
    """Replace the losses of this executor by crashes, or forget them. Return the tasks that had one."""
    query = sa.select(tasks_table).where(tasks_table.c.state.in_(tasks.UNFINISHED), tasks_table.c.losses != "")
    explained = []
    for row in connection.execute(query).all():
        losses = _losses(row)
        if (loss := losses.pop(executor, None)) is None:
            continue
        explained.append(row.name)
        _put_losses(connection, row, losses)
        if (death := explain(row.name, loss)) is not None:
            current = tasks.get_row(connection, row.name)
            record_crash(connection, current, death.reason, death.num_suspects, max_crashes)
    return explained


def _fail(connection: sa.Connection, row: Any, num_crashes: int, reason: str) -> None:
    message = f"its executors died {num_crashes} times in a row before a step, the last with no other task: {reason}"
    failure = errors_pb2.TaskFailure(reason=errors_pb2.ERROR_REASON_INTERNAL, message=message)
    columns = {"crashes": num_crashes, "losses": "", **charges.columns_without_work(row)}
    tasks.change_state(connection, row, TaskState.FAILED, message, failure=failure, **columns)


def _losses(row: Any) -> dict[str, Loss]:
    """Return the task's losses by executor, oldest first."""
    return {executor: Loss(*values) for executor, values in json.loads(row.losses or "{}").items()}


def _put_losses(connection: sa.Connection, row: Any, losses: dict[str, Loss]) -> None:
    text = json.dumps({executor: astuple(loss) for executor, loss in losses.items()}) if losses else ""
    connection.execute(sa.update(tasks_table).where(tasks_table.c.name == row.name).values(losses=text))
