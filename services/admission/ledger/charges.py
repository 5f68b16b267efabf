"""Charges the work that executors report to the tenant's day and to the task, each second and token once.

An executor reports the totals of a step or evaluation while it is in progress and when it is complete. Each report is
charged with what it adds to the reports before, which `progress` holds as work in progress. Work that is lost with its
attempt stays charged. Synchronous, no gRPC.
"""

from typing import Any

import sqlalchemy as sa

from muxtune.v1 import event_pb2, plan_pb2, task_pb2
from services.admission.policy import quotas
from services.admission.policy.quotas import Work


def charge_in_progress(
    connection: sa.Connection, tenant: str, progress: task_pb2.TaskProgress, report: plan_pb2.WorkInProgress
) -> bool:
    """Charge what the report adds to the work in progress; return whether it adds anything."""
    work = Work.reported(report)
    if not _charge(connection, tenant, progress, work):
        return False
    progress.tokens_in_progress = max(progress.tokens_in_progress, work.effective_tokens)
    progress.padding_in_progress = max(progress.padding_in_progress, work.padding_tokens)
    progress.seconds_in_progress = max(progress.seconds_in_progress, work.device_seconds)
    return True


def charge_step(
    connection: sa.Connection, tenant: str, progress: task_pb2.TaskProgress, step: event_pb2.StepDone
) -> None:
    """Charge what is not charged yet of a step that is complete."""
    work = Work.reported(step)
    _charge(connection, tenant, progress, work, num_steps=1)
    progress.effective_tokens += work.effective_tokens
    progress.padding_tokens += work.padding_tokens
    _clear_in_progress(progress)


def charge_evaluation(
    connection: sa.Connection, tenant: str, progress: task_pb2.TaskProgress, evaluated: event_pb2.Evaluated
) -> None:
    """Charge what is not charged yet of an evaluation that is complete."""
    work = Work.reported(evaluated)
    _charge(connection, tenant, progress, work)
    progress.evaluated_tokens += work.effective_tokens
    _clear_in_progress(progress)


def lose_in_progress(progress: task_pb2.TaskProgress) -> None:
    """Record that an attempt began or ended: the next one starts its step or evaluation from nothing."""
    progress.lost_tokens += progress.tokens_in_progress
    _clear_in_progress(progress)


def columns_without_work(row: Any) -> dict[str, bytes]:
    """Return the columns of a task's row that change because its attempt began or ended."""
    progress = task_pb2.TaskProgress.FromString(row.progress)
    lose_in_progress(progress)
    return {"progress": progress.SerializeToString()}


def _charge(
    connection: sa.Connection, tenant: str, progress: task_pb2.TaskProgress, total: Work, num_steps: int = 0
) -> Work:
    """Charge what `total` adds to the work in progress; return it."""
    in_progress = Work(progress.tokens_in_progress, progress.padding_in_progress, progress.seconds_in_progress)
    added = total.beyond(in_progress)
    if added or num_steps:
        quotas.charge(connection, tenant, added, num_steps)
    progress.device_seconds += added.device_seconds
    return added


def _clear_in_progress(progress: task_pb2.TaskProgress) -> None:
    progress.tokens_in_progress = progress.padding_in_progress = 0
    progress.seconds_in_progress = 0.0
