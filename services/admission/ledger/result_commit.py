"""Commits executors' results of a task: each result counts once or not at all. Synchronous, no gRPC."""

from typing import Any

import sqlalchemy as sa

from engine.task import TaskState
from muxtune.v1 import event_pb2, plan_pb2, task_pb2
from muxtune.v1 import ledger_pb2 as pb
from services.admission.ledger import charges, crash_tracker
from services.admission.policy import quotas
from services.admission.store import tasks
from services.admission.store.clock import now
from services.admission.store.tables import adapters
from services.admission.store.tables import tasks as tasks_table
from services.resource_names import adapter_of_task

_RATE_WEIGHT = 0.2  # of the newest step in the moving average of tokens per second


def commit_result(
    connection: sa.Connection, executor: str, result: plan_pb2.TaskResult, max_crashes: int
) -> pb.ResultVerdict.ValueType:
    """Return COMMITTED, DUPLICATE (the result is recorded already) or STALE (the attempt was superseded)."""
    row = connection.execute(sa.select(tasks_table).where(tasks_table.c.name == result.task)).one_or_none()
    if row is None or row.attempt != result.attempt or row.executor != executor:
        has_ended = row is not None and TaskState[row.state].is_final and row.attempt == result.attempt
        return pb.RESULT_VERDICT_DUPLICATE if has_ended else pb.RESULT_VERDICT_STALE
    kind, suspects = result.WhichOneof("result"), result.released.num_suspects
    if kind is None:  # a newer executor reports what this version does not know
        return pb.RESULT_VERDICT_DUPLICATE
    if suspects and crash_tracker.record_crash(connection, row, result.released.reason, suspects, max_crashes):
        return pb.RESULT_VERDICT_COMMITTED
    is_new = {
        "step_done": _commit_step,
        "evaluated": _commit_evaluation,
        "checkpoint_committed": _commit_checkpoint,
        "finished": _finish,
        "failed": _fail,
        "released": _release,
        "resumed": _resume,
        "in_progress": _charge_in_progress,
    }[kind](connection, row, result)
    return pb.RESULT_VERDICT_COMMITTED if is_new else pb.RESULT_VERDICT_DUPLICATE


def _commit_step(connection: sa.Connection, row: Any, result: plan_pb2.TaskResult) -> bool:
    step, progress = result.step_done, task_pb2.TaskProgress.FromString(row.progress)
    if step.step <= progress.step:
        return False
    time = now()
    _measure_rate(progress, step, row, time)
    if not progress.HasField("first_loss"):
        progress.first_loss = step.loss
    progress.step, progress.last_loss = step.step, step.loss
    progress.num_neighbours = step.num_neighbours
    charges.charge_step(connection, row.tenant, progress, step)
    _put_progress(connection, row, progress, progress_time=time, crashes=0, losses="")
    tasks.append_event(connection, row.name, event_pb2.TaskEvent(step_done=step))
    _stop_if_over_budget(connection, row, progress)
    return True


def _charge_in_progress(connection: sa.Connection, row: Any, result: plan_pb2.TaskResult) -> bool:
    """Charge a step or evaluation that is in progress. One that is recorded already, and runs again in a later attempt,
    is not charged again."""
    report, progress = result.in_progress, task_pb2.TaskProgress.FromString(row.progress)
    is_recorded = report.is_evaluation and report.step <= row.evaluated_step
    if report.step != progress.step or is_recorded:
        return False
    if not charges.charge_in_progress(connection, row.tenant, progress, report):
        return False
    _put_progress(connection, row, progress)
    _stop_if_over_budget(connection, row, progress)
    return True


def _stop_if_over_budget(connection: sa.Connection, row: Any, progress: task_pb2.TaskProgress) -> None:
    reason = quotas.describe_spent_budget(tasks.read_spec(row).budget, progress)
    if reason and row.state == TaskState.RUNNING.name:
        tasks.change_state(connection, row, TaskState.CANCELLING, reason)


def _measure_rate(progress: task_pb2.TaskProgress, step: event_pb2.StepDone, row: Any, time: int) -> None:
    """Update tokens per second and seconds left, by the wall clock from commit to commit, as a user sees them."""
    elapsed = (time - (row.progress_time or row.started or time)) / 1e6
    if elapsed <= 0:
        return
    # The first step's time includes attaching the task and its first evaluation: it does not predict later steps.
    weight = 1.0 if progress.step <= 1 else _RATE_WEIGHT
    newest, average = step.effective_tokens / elapsed, progress.effective_tokens_per_second
    progress.effective_tokens_per_second = average + weight * (newest - average)
    if progress.step < 1 or progress.effective_tokens_per_second <= 0:
        return
    estimate = task_pb2.TaskEstimate.FromString(row.estimate)
    tokens_left = estimate.num_train_tokens * max(0.0, 1 - step.step / max(1, estimate.num_steps))
    progress.seconds_left = tokens_left / progress.effective_tokens_per_second


def _commit_evaluation(connection: sa.Connection, row: Any, result: plan_pb2.TaskResult) -> bool:
    evaluated, progress = result.evaluated, task_pb2.TaskProgress.FromString(row.progress)
    if evaluated.step <= row.evaluated_step:
        return False
    if not progress.HasField("first_heldout_loss"):
        progress.first_heldout_loss = evaluated.loss
    progress.last_heldout_loss = evaluated.loss
    charges.charge_evaluation(connection, row.tenant, progress, evaluated)
    _put_progress(connection, row, progress, evaluated_step=evaluated.step)
    tasks.append_event(connection, row.name, event_pb2.TaskEvent(evaluated=evaluated))
    _stop_if_over_budget(connection, row, progress)
    return True


def _commit_checkpoint(connection: sa.Connection, row: Any, result: plan_pb2.TaskResult) -> bool:
    checkpoint, progress = result.checkpoint_committed, task_pb2.TaskProgress.FromString(row.progress)
    if row.checkpoint and event_pb2.CheckpointCommitted.FromString(row.checkpoint).step >= checkpoint.step:
        return False
    progress.checkpoint_step = checkpoint.step
    _put_progress(connection, row, progress, checkpoint=checkpoint.SerializeToString())
    tasks.append_event(connection, row.name, event_pb2.TaskEvent(checkpoint_committed=checkpoint))
    return True


def _finish(connection: sa.Connection, row: Any, result: plan_pb2.TaskResult) -> bool:
    finished = result.finished
    adapter = adapter_of_task(row.name) if finished.adapter_key else ""
    if adapter:
        connection.execute(
            sa.insert(adapters).values(
                name=adapter,
                tenant=row.tenant,
                manifest_key=finished.adapter_key,
                size_bytes=finished.adapter_bytes,
                created=now(),
            )
        )
    state = TaskState.CANCELLED if finished.cancelled else TaskState.SUCCEEDED
    message = finished.message or (
        f"{finished.step} steps; exported, loaded again, logits within {finished.max_logit_difference:.1e}"
        if adapter
        else "no step was done"
    )
    progress = task_pb2.TaskProgress.FromString(row.progress)
    progress.ClearField("seconds_left")
    charges.lose_in_progress(progress)
    _put_progress(connection, row, progress)
    tasks.change_state(connection, row, state, message, adapter=adapter)
    return True


def _fail(connection: sa.Connection, row: Any, result: plan_pb2.TaskResult) -> bool:
    columns = charges.columns_without_work(row)
    tasks.change_state(connection, row, TaskState.FAILED, result.failed.message, failure=result.failed, **columns)
    return True


def _release(connection: sa.Connection, row: Any, result: plan_pb2.TaskResult) -> bool:
    reason = result.released.reason or "released by its executor"
    columns: dict[str, Any] = {"executor": "", **charges.columns_without_work(row)}
    if row.state == TaskState.RUNNING.name:
        tasks.change_state(connection, row, TaskState.QUEUED, reason, **columns)
    else:
        connection.execute(sa.update(tasks_table).where(tasks_table.c.name == row.name).values(columns))
    return True


def _resume(connection: sa.Connection, row: Any, result: plan_pb2.TaskResult) -> bool:
    """Replace the recorded checkpoint, which cannot be read, by an earlier one, and report that to the tenant."""
    checkpoint = result.resumed.checkpoint
    if not row.checkpoint or event_pb2.CheckpointCommitted.FromString(row.checkpoint).step <= checkpoint.step:
        return False
    progress = task_pb2.TaskProgress.FromString(row.progress)
    progress.checkpoint_step = checkpoint.step
    _put_progress(connection, row, progress, checkpoint=checkpoint.SerializeToString())
    tasks.append_message(connection, row, result.resumed.message)
    return True


def _put_progress(connection: sa.Connection, row: Any, progress: task_pb2.TaskProgress, **columns: Any) -> None:
    values = {"progress": progress.SerializeToString(), **columns}
    connection.execute(sa.update(tasks_table).where(tasks_table.c.name == row.name).values(values))
