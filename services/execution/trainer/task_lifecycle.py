"""Lifecycle of the trainer's tasks: restore, attach, checkpoint, export, release.

Every end of a task reports its cause. A problem of one task (the store is unavailable, a checkpoint is corrupt, memory
is short) never delays another: I/O runs in the background, and a task that cannot continue yet waits off the device.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from opentelemetry import trace

from engine.errors import MuxtuneError, UnavailableError, WillNeverFitError
from engine.results import EvaluationResult, StepResult, TaskFailure, WorkInProgress
from engine.runtime.checkpoint import CheckpointState
from engine.runtime.executor import Executor
from engine.runtime.out_of_memory import OutOfMemoryError
from engine.runtime.task_state import TaskAssignment
from engine.task import evaluation_is_due
from muxtune.v1 import alignment_pb2, event_pb2, plan_pb2
from services.conversion.results import evaluation_to_proto, step_to_proto, work_in_progress_to_proto
from services.conversion.task import spec_to_domain
from services.execution.trainer.background_io import BackgroundCall, BackgroundIo
from services.execution.trainer.checkpoint_store import CheckpointStore
from services.execution.trainer.early_stop import EarlyStop
from services.execution.trainer.resident_task import Completion, Files, ResidentTask, RestoreState, fetch, reason_of
from services.rpc.errors import to_failure
from services.telemetry import current_trace_parent, links_to, task_span

_MAX_WAIT_SECONDS = 60.0  # for the store or for memory, before a task that does not train is released or fails
_log = logging.getLogger(__name__)


class TaskLifecycle:
    """Moves tasks through their lifecycle and collects results until `pop_results`.

    Not thread-safe: only the trainer's loop calls it. After `wake` was called, `next_ready` names a
    task.
    """

    def __init__(
        self,
        executor: Executor,
        checkpoints: CheckpointStore,
        checkpoint_steps: int,
        checkpoint_seconds: float,
        wake: Callable[[], object],
    ) -> None:
        self._executor, self._checkpoints, self._background_io = executor, checkpoints, BackgroundIo(wake)
        self._every = checkpoint_steps, checkpoint_seconds
        self._residents: dict[str, ResidentTask] = {}
        self._ended: dict[str, int] = {}  # attempts that ended here: an older plan may still name them
        self._results: list[plan_pb2.TaskResult] = []

    @property
    def names(self) -> list[str]:
        """Names of the tasks that are training, without those still loading or leaving."""
        return [name for name, resident in self._residents.items() if self._is_training(resident)]

    @property
    def all_names(self) -> list[str]:
        """Names of all tasks, also of those still loading or leaving."""
        return list(self._residents)

    @property
    def is_empty(self) -> bool:
        return not self._residents

    def seconds_to_retry(self) -> float | None:
        """Returns the seconds until the next retry of any task; None if no task waits for one."""
        retry_times = [
            resident.retry_time
            for resident in self._residents.values()
            if resident.background_call is None and not self._is_training(resident)
        ]
        return max(0.0, min(retry_times) - time.monotonic()) if retry_times else None

    def pop_results(self) -> list[plan_pb2.TaskResult]:
        """Returns the results since the last call."""
        results, self._results = self._results, []
        return results

    def adopt(self, tasks: list[plan_pb2.PlannedTask]) -> None:
        """Makes `tasks` the tasks of this executor: releases the others, drops superseded attempts, adds new tasks."""
        planned, training = {task.task: task for task in tasks}, set(self.names)
        self._ended = {name: attempt for name, attempt in self._ended.items() if name in planned}
        for name, resident in list(self._residents.items()):
            if name not in planned:
                self.release(name, "a new plan does not contain it")
            elif planned[name].attempt != resident.attempt:
                self.drop([name])
            else:
                resident.planned = planned[name]
        for name, task in planned.items():
            if name not in self._residents and self._ended.get(name, 0) < task.attempt:
                self._add(task)
            elif task.cancel and name in training:
                self._end(self._residents[name], Completion(plan_pb2.TaskFinished(cancelled=True)))

    def next_ready(self, order: Callable[[str], float] = lambda _: 0.0) -> str | None:
        """Returns the task with the least `order` among those that can go on loading, leaving or with their store."""
        ready = [name for name, resident in self._residents.items() if self._is_ready(resident)]
        return min(ready, key=order, default=None)

    def advance(self, name: str) -> None:
        """Advances a task that is ready as far as it can go without waiting. Call it between microbatches."""
        resident = self._residents[name]
        if resident.background_call is not None and resident.background_call.is_done:
            call, resident.background_call = resident.background_call, None
            self._attempt(resident, call.complete)
        while self._is_current(resident) and resident.is_free and not self._is_training(resident):
            self._attempt(resident, partial(self._start_next_transfer, resident))

    def member(self, name: str, round_tokens: int) -> alignment_pb2.Member:
        """Describes the task and its position in its data for alignment."""
        resident, state = self._residents[name], self._executor.tasks[name]
        spec = resident.planned.spec
        return alignment_pb2.Member(
            task=name,
            dataset_version=spec.dataset_version,
            training=spec.training,
            num_steps=resident.planned.num_steps,
            cursor_step=state.step,
            num_virtual_tokens=resident.spec.method.num_virtual_tokens,
            num_prefix_tokens=resident.spec.method.num_prefix_tokens,
            round_tokens=round_tokens,
            is_evaluated=state.evaluated_step == state.step,
            done=[alignment_pb2.Interval(start=start, end=end) for start, end in state.accumulated.done],
        )

    def trace_parents(self) -> list[tuple[str, str]]:
        return [(name, self._residents[name].planned.trace_parent) for name in self.names]

    def record(self, result: StepResult | EvaluationResult | TaskFailure) -> None:
        """Reports a result of the engine; ends the task if it failed, is complete or has stopped improving."""
        resident = self._residents.get(result.task)
        if resident is None:
            return
        if isinstance(result, TaskFailure):
            self._report_work(resident, result.work)
            self._fail(resident, result.error)
        elif isinstance(result, StepResult):
            self._report(resident, step_done=step_to_proto(result))
            self._end_or_checkpoint(resident, result.step)
        else:
            self._report(resident, evaluated=evaluation_to_proto(result))
            training = resident.spec.training
            resident.early_stop = resident.early_stop.after(training, result.step, result.loss)
            if result.step == resident.planned.num_steps:
                self._end(resident, Completion(plan_pb2.TaskFinished()))
            elif resident.early_stop.should_stop(training):
                message = resident.early_stop.describe(result.step)
                self._end(resident, Completion(plan_pb2.TaskFinished(message=message)))

    def report_work_in_progress(self, min_seconds: float) -> None:
        """Reports the device time of steps and evaluations that have taken `min_seconds` and are not complete."""
        for name in self.names:
            if (work := self._executor.work_in_progress(name)).seconds >= min_seconds:
                self._report_work(self._residents[name], work)

    def _end_or_checkpoint(self, resident: ResidentTask, step: int) -> None:
        """Ends the task after its last step, unless an evaluation follows; otherwise checkpoints it if that is due."""
        last = resident.planned.num_steps
        if step >= last and not evaluation_is_due(resident.spec.training, last, last):
            self._end(resident, Completion(plan_pb2.TaskFinished()))
        elif resident.is_free and resident.checkpoint_is_due(step, *self._every):
            self._attempt(resident, partial(self._checkpoint, resident))

    def export(self, name: str) -> "Future[plan_pb2.TaskFinished]":
        """Exports the current adapter and uploads it in the background. Raises MuxtuneError."""
        resident = self._residents[name]
        try:
            finished, files = self._export_adapter(resident)
        except OutOfMemoryError as error:
            raise UnavailableError(f"no memory to export {name} now: {error}. Retry later.") from None
        return self._background_io.submit(partial(self._put_adapter, resident.planned, finished, files, is_final=False))

    def fail(self, name: str, error: MuxtuneError) -> None:
        """Fails the task with an error that the engine did not raise."""
        if name in self._executor.tasks:
            self._report_work(self._residents[name], self._executor.work_in_progress(name))
        self._fail(self._residents[name], error)

    def release(self, name: str, reason: str) -> None:
        """Checkpoints and releases the task. A task that waits for a retry of its end is released at once."""
        resident = self._residents[name]
        previous, resident.retry_time = resident.completion, 0.0
        if previous is None or previous.finished is not None:
            state = previous.state if previous is not None else None
            self._end(resident, Completion(reason=reason, is_exported=state is not None, state=state))

    def drop(self, names: list[str]) -> None:
        """Forgets tasks without committing anything: their attempts were superseded."""
        for name in names:
            if self._residents.pop(name, None) is not None and name in self._executor.tasks:
                self._executor.detach(name)
        self._results = [result for result in self._results if result.task not in names]

    def _is_training(self, resident: ResidentTask) -> bool:
        return resident.name in self._executor.tasks and resident.completion is None

    def _is_ready(self, resident: ResidentTask) -> bool:
        if resident.background_call is not None:
            return resident.background_call.is_done
        return not self._is_training(resident) and resident.is_free

    def _is_current(self, resident: ResidentTask) -> bool:
        return self._residents.get(resident.name) is resident

    def _add(self, task: plan_pb2.PlannedTask) -> None:
        try:
            self._residents[task.task] = ResidentTask(task, spec_to_domain(task.spec))
        except MuxtuneError as error:
            failed = plan_pb2.TaskResult(task=task.task, attempt=task.attempt, failed=to_failure(error))
            self._results.append(failed)
            self._ended[task.task] = task.attempt

    def _start_next_transfer(self, resident: ResidentTask) -> None:
        completion = resident.completion
        if completion is not None and completion.is_exported:
            self._upload_result(resident, completion)
        elif resident.name in self._executor.tasks:
            self._export(resident)
        elif resident.restore_state is None and resident.needs_restore:
            fetching = self._background_io.submit(partial(fetch, self._checkpoints, resident.planned))
            resident.background_call = BackgroundCall(fetching, partial(setattr, resident, "restore_state"))
        else:
            self._attach(resident, resident.restore_state or RestoreState())

    def _attempt(self, resident: ResidentTask, work: Callable[[], None]) -> None:
        """Does `work`. If it fails, schedules a retry or ends this task alone."""
        if not self._is_current(resident):
            return  # it was dropped during its background call
        try:
            work()
        except (UnavailableError, OutOfMemoryError) as error:
            self._retry_or_fail(resident, error)
        except MuxtuneError as error:
            self._fail(resident, error)

    def _retry_or_fail(self, resident: ResidentTask, error: UnavailableError | OutOfMemoryError) -> None:
        """Schedules a retry after a failure of the store or a lack of memory; ends the task after too many."""
        completion, reason = resident.completion, reason_of(error)
        may_retry = self._is_training(resident) or not resident.has_waited(_MAX_WAIT_SECONDS)
        if completion is not None and completion.finished is None:
            return self._release(resident, f"{completion.reason}; not checkpointed: {reason}")
        if isinstance(error, OutOfMemoryError) and not may_retry and set(self._executor.tasks) <= {resident.name}:
            part = "export" if completion is not None else "adapter with gradients and optimizer"
            message = f"The {part} does not fit in memory with no other task: {error}."
            return self._fail(resident, WillNeverFitError(f"{message} Reduce `rank` or `target_modules`."))
        if completion is not None and resident.name in self._executor.tasks:
            if completion.state is None:
                return self._release(resident, f"not finished: {reason}")
            self._executor.detach(resident.name)  # it is attached again to be exported when there is memory
            resident.restore_state = RestoreState(completion.state)
        elif completion is None and not may_retry:
            return self._release(resident, f"not attached: {reason}")
        resident.schedule_retry()
        _log.warning("A retry of %s is scheduled: %s", resident.name, reason)

    def _attach(self, resident: ResidentTask, restore_state: RestoreState) -> None:
        task, state, used = resident.planned, restore_state.state, restore_state.used
        with task_span("attach", task.task, task.trace_parent, **{"muxtune.attempt": resident.attempt}):
            if state is not None:
                checkpointed = (task.task, state.metadata.get("trace_parent", ""))
                for link in links_to([checkpointed]):  # to the trace of the earlier attempt
                    trace.get_current_span().add_link(link.context, link.attributes)
            with self._checkpoints.folder_of(restore_state.initial_adapter or {}) as folder:
                assignment = TaskAssignment(task.task, resident.spec, task.num_steps, resident.attempt)
                self._executor.attach(assignment, state, folder if restore_state.initial_adapter else None)
        resident.restore_state = None
        if resident.completion is None:
            resident.reset_retry()
        if state is not None and used is not None:
            resident.early_stop = EarlyStop(**state.metadata.get("early_stop", {}))
            if not resident.is_at_end(state.step):
                self._executor.tasks[resident.name].evaluated_step = resident.early_stop.evaluated_step
            resident.checkpoint_step = state.step
            if used.manifest_key != task.resume_from.manifest_key:
                message = (
                    f"resumed from step {used.step}: the checkpoint of step {task.resume_from.step} cannot be read"
                )
                self._report(resident, resumed=plan_pb2.TaskResumed(checkpoint=used, message=message))
        if resident.completion is None and task.cancel:
            self._end(resident, Completion(plan_pb2.TaskFinished(cancelled=True)))
        elif resident.completion is None:
            self._end_or_checkpoint(resident, self._executor.tasks[resident.name].step)

    def _checkpoint(self, resident: ResidentTask) -> None:
        state = self._executor.checkpoint(resident.name)
        work = partial(self._put_checkpoint, resident.planned, resident.early_stop, state)
        resident.background_call = BackgroundCall(
            self._background_io.submit(work), partial(self._record_checkpoint, resident)
        )

    def _put_checkpoint(
        self, task: plan_pb2.PlannedTask, early_stop: EarlyStop, state: CheckpointState
    ) -> event_pb2.CheckpointCommitted:
        """Uploads a checkpoint. Runs on a background thread."""
        with task_span("checkpoint", task.task, task.trace_parent, **{"muxtune.step": state.step}):
            extra = {"early_stop": vars(early_stop), "trace_parent": current_trace_parent()}
            return self._checkpoints.put_checkpoint(task.task, task.attempt, state, extra)

    def _record_checkpoint(self, resident: ResidentTask, committed: event_pb2.CheckpointCommitted) -> None:
        resident.checkpoint_step, resident.checkpoint_time = committed.step, time.monotonic()
        resident.reset_retry()
        self._report(resident, checkpoint_committed=committed)

    def _end(self, resident: ResidentTask, completion: Completion) -> None:
        """Ends the training. `advance` then takes the task off the device and uploads its checkpoint and adapter."""
        resident.completion = completion
        if resident.name in self._executor.tasks:
            self._report_work(resident, self._executor.work_in_progress(resident.name))
        elif completion.finished is None and completion.state is None:
            self._release(resident, completion.reason)

    def _export(self, resident: ResidentTask) -> None:
        """Copies the task's state, and its adapter if it is finished, off the device, and detaches the task."""
        name, completion = resident.name, resident.completion
        assert completion is not None
        step, finished = self._executor.tasks[name].step, completion.finished
        if step > (resident.checkpoint_step if finished is None else 0) and completion.state is None:
            completion.state = self._executor.checkpoint(name)
        if finished is not None and step > 0:
            exported, completion.adapter = self._export_adapter(resident)
            finished.MergeFrom(exported)
        self._executor.detach(name)
        completion.is_exported = True

    def _export_adapter(self, resident: ResidentTask) -> tuple[plan_pb2.TaskFinished, Files]:
        """Exports the adapter as files. Raises ExportMismatchError, OutOfMemoryError, UnavailableError."""
        name, step = resident.name, self._executor.tasks[resident.name].step
        with (
            task_span("export", name, resident.planned.trace_parent, **{"muxtune.step": step}),
            self._checkpoints.folder_of({}) as folder,
        ):
            report = self._executor.export(name, folder)
            files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}
        return plan_pb2.TaskFinished(step=step, max_logit_difference=report.max_logit_difference), files

    def _upload_result(self, resident: ResidentTask, completion: Completion) -> None:
        """Uploads the exported checkpoint and adapter; then finishes or releases the task."""
        state = completion.state
        if state is not None and state.step <= resident.checkpoint_step:
            state = None  # it is committed already
        if state is None and completion.adapter is None:
            return self._complete(resident, completion)
        task, early_stop = resident.planned, resident.early_stop

        def put() -> event_pb2.CheckpointCommitted | None:
            committed = self._put_checkpoint(task, early_stop, state) if state is not None else None
            if completion.finished is not None and completion.adapter is not None:
                self._put_adapter(task, completion.finished, completion.adapter, is_final=True)
            return committed

        def on_done(committed: event_pb2.CheckpointCommitted | None) -> None:
            if committed is not None:
                self._record_checkpoint(resident, committed)
            self._complete(resident, completion)

        resident.background_call = BackgroundCall(self._background_io.submit(put), on_done)

    def _put_adapter(
        self, task: plan_pb2.PlannedTask, finished: plan_pb2.TaskFinished, files: Files, *, is_final: bool
    ) -> plan_pb2.TaskFinished:
        """Uploads the adapter and writes its key and size into `finished`. Runs on a background thread."""
        with task_span("store adapter", task.task, task.trace_parent, **{"muxtune.step": finished.step}):
            manifest = self._checkpoints.put_adapter(task.task, task.attempt, finished.step, files, is_final)
        finished.adapter_key, finished.adapter_bytes = manifest.key, manifest.size_bytes
        return finished

    def _complete(self, resident: ResidentTask, completion: Completion) -> None:
        if completion.finished is None:
            return self._release(resident, completion.reason)
        self._report(resident, finished=completion.finished)
        self._forget(resident)

    def _release(self, resident: ResidentTask, reason: str) -> None:
        self._report(resident, released=plan_pb2.TaskReleased(reason=reason))
        self._forget(resident)

    def _report_work(self, resident: ResidentTask, work: WorkInProgress) -> None:
        """Reports the device time of a step that is not complete, and may never be."""
        if work.seconds > 0:
            self._report(resident, in_progress=work_in_progress_to_proto(work))

    def _fail(self, resident: ResidentTask, error: MuxtuneError) -> None:
        self._report(resident, failed=to_failure(error))
        self._forget(resident)

    def _forget(self, resident: ResidentTask) -> None:
        if resident.name in self._executor.tasks:
            self._executor.detach(resident.name)
        self._ended[resident.name] = self._residents.pop(resident.name).attempt

    def _report(self, resident: ResidentTask, **result: object) -> None:
        key = {"task": resident.name, "attempt": resident.attempt}
        self._results.append(plan_pb2.TaskResult(**key, **result))  # type: ignore[arg-type]
