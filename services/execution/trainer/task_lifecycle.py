"""The tasks a trainer holds: taken in, kept safe, handed on. Every path that ends a task here reports why.

One resident's trouble (a store that is away, a corrupt checkpoint, no room) is its own, never its neighbours': what
goes to the artifact store is an errand, and who cannot go on yet waits off the device.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from opentelemetry import trace

from engine.errors import MuxtuneError, UnavailableError, WillNeverFitError
from engine.results import EvaluationResult, StepResult, TaskFailure
from engine.runtime.checkpoint import CheckpointState
from engine.runtime.executor import Executor
from engine.runtime.out_of_memory import OutOfMemoryError
from engine.runtime.task_state import TaskAssignment
from engine.task import evaluation_is_due
from muxtune.v1 import alignment_pb2, execution_pb2, plan_pb2, task_pb2
from services.conversion.results import evaluation_to_proto, step_to_proto
from services.conversion.task import spec_to_domain
from services.execution.trainer.background_io import BackgroundCall, BackgroundIo
from services.execution.trainer.checkpoint_store import CheckpointStore, folder_of
from services.execution.trainer.early_stop import EarlyStop
from services.execution.trainer.resident_task import Completion, Files, ResidentTask, RestoreState, why
from services.rpc.errors import to_failure
from services.telemetry import current_trace_parent, links_to, task_span

_PATIENCE_SECONDS = 60.0  # with the store or for room, before a task that does not train is handed back, or fails
_log = logging.getLogger(__name__)


class TaskLifecycle:
    """Collects results until `take_results`. Not thread-safe: the trainer's loop alone calls it, and `settle` once
    `wake` was called."""

    def __init__(
        self,
        executor: Executor,
        vault: CheckpointStore,
        checkpoint_steps: int,
        checkpoint_seconds: float,
        wake: Callable[[], object],
    ) -> None:
        self._executor, self._vault, self._errands = executor, vault, BackgroundIo(wake)
        self._every_steps, self._every_seconds = checkpoint_steps, checkpoint_seconds
        self._held: dict[str, ResidentTask] = {}
        self._ended: dict[str, int] = {}  # attempts that ended here: a plan made before it knew may still name them
        self._results: list[plan_pb2.TaskResult] = []

    @property
    def names(self) -> list[str]:
        """Of those that train: who has not arrived yet, or is leaving, is none of them."""
        return [name for name in self._held if name in self._executor.tasks]

    @property
    def held(self) -> list[str]:
        """All of them."""
        return list(self._held)

    @property
    def is_empty(self) -> bool:
        return not self._held

    def seconds_to_retry(self) -> float | None:
        """Until someone's next try is due; None: nobody waits for one."""
        waiting = [r.retry_time for r in self._held.values() if r.errand is None and not self._trains(r)]
        return max(0.0, min(waiting) - time.monotonic()) if waiting else None

    def take_results(self) -> list[plan_pb2.TaskResult]:
        results, self._results = self._results, []
        return results

    def adopt(self, tasks: list[plan_pb2.PlannedTask]) -> None:
        """Holds just these: hands back what left, drops what was superseded, takes in what is new."""
        planned = {task.task: task for task in tasks}
        self._ended = {name: attempt for name, attempt in self._ended.items() if name in planned}
        for name, resident in list(self._held.items()):
            if name not in planned:
                self.release(name, "a new plan leaves it out")
            elif planned[name].attempt != resident.attempt:
                self.drop([name])
            else:
                resident.planned = planned[name]
        for name, task in planned.items():
            if name not in self._held and self._ended.get(name, 0) < task.attempt:
                self._take_in(task)
            elif task.cancel and name in self.names:
                self._end(self._held[name], Completion(plan_pb2.TaskFinished(cancelled=True)))
        self.settle()

    def settle(self) -> None:
        """Goes on with whoever can: takes what errands brought, attaches, ends. Waits for nothing. Between
        microbatches."""
        for resident in list(self._held.values()):
            if resident.errand is not None and resident.errand.is_done:
                errand, resident.errand = resident.errand, None
                self._attempt(resident, errand.settle)
            self._advance(resident)

    def member(self, name: str) -> alignment_pb2.Member:
        """Where the task's data stands, for alignment."""
        resident = self._held[name]
        spec = resident.planned.spec
        return alignment_pb2.Member(
            task=name,
            dataset_version=spec.dataset_version,
            training=spec.training,
            num_steps=resident.planned.num_steps,
            cursor_step=self._executor.tasks[name].step,
            num_virtual_tokens=resident.spec.method.num_virtual_tokens,
            num_prefix_tokens=resident.spec.method.num_prefix_tokens,
        )

    def trace_parents(self) -> list[tuple[str, str]]:
        return [(name, self._held[name].planned.trace_parent) for name in self.names]

    def record(self, result: StepResult | EvaluationResult | TaskFailure) -> None:
        """Turns an engine's result into the contract's; ends tasks that failed or stopped improving."""
        resident = self._held.get(result.task)
        if resident is None:
            return
        if isinstance(result, TaskFailure):
            self._fail(resident, result.error)
        elif isinstance(result, StepResult):
            self._report(resident, step_done=step_to_proto(result))
        else:
            self._report(resident, evaluated=evaluation_to_proto(result))
            training = resident.spec.training
            resident.early_stop = resident.early_stop.after(training, result.step, result.loss)
            if result.step == resident.planned.num_steps:
                self._end(resident, Completion(plan_pb2.TaskFinished()))
            elif resident.early_stop.should_stop(training):
                best = resident.early_stop.best
                under = "finite" if best is None else f"under {best:.4f}"
                told = f"early stop after {result.step} steps: held-out loss not {under} any more"
                self._end(resident, Completion(plan_pb2.TaskFinished(message=told)))

    def close_round(self) -> None:
        """At a round's end: finishes what is done, checkpoints what is due."""
        self.settle()
        for name in self.names:
            resident, step = self._held[name], self._executor.tasks[name].step
            last = resident.planned.num_steps
            if step >= last and not evaluation_is_due(resident.spec.training, last, last):
                self._end(resident, Completion(plan_pb2.TaskFinished()))
            elif resident.is_free and self._checkpoint_is_due(resident, step):
                self._attempt(resident, partial(self._checkpoint, resident))

    def export(self, name: str) -> "Future[plan_pb2.TaskFinished]":
        """The adapter as it stands, on its way to the store. Raises ExportMismatchError, UnavailableError."""
        resident = self._held[name]
        try:
            finished, files = self._exported(resident)
        except OutOfMemoryError as error:
            raise UnavailableError(f"there is no memory to export {name} now: {error}; try again later") from None
        return self._errands.send(partial(self._put_adapter, resident.planned, finished, files, is_final=False))

    def fail(self, name: str, error: MuxtuneError) -> None:
        """Ends the task for what only this executor's surroundings could tell."""
        self._fail(self._held[name], error)

    def release(self, name: str, reason: str) -> None:
        """Checkpoints and hands the task back, unharmed. One that waits to be finished does not wait any longer."""
        resident = self._held[name]
        before, resident.retry_time = resident.ending, 0.0
        if before is None or before.finished is not None:
            state = before.state if before is not None else None
            self._end(resident, Completion(reason=reason, is_packed=state is not None, state=state))

    def drop(self, names: list[str]) -> None:
        """Forgets tasks without committing anything: their attempt was superseded."""
        for name in names:
            if self._held.pop(name, None) is not None and name in self._executor.tasks:
                self._executor.detach(name)
        self._results = [result for result in self._results if result.task not in names]

    def _trains(self, resident: ResidentTask) -> bool:
        return resident.name in self._executor.tasks and resident.ending is None

    def _holds(self, resident: ResidentTask) -> bool:
        return self._held.get(resident.name) is resident

    def _take_in(self, task: plan_pb2.PlannedTask) -> None:
        try:
            self._held[task.task] = ResidentTask(task, spec_to_domain(task.spec))
        except MuxtuneError as error:
            failed = plan_pb2.TaskResult(task=task.task, attempt=task.attempt, failed=to_failure(error))
            self._results.append(failed)
            self._ended[task.task] = task.attempt

    def _advance(self, resident: ResidentTask) -> None:
        """Whatever can be done for it now, but to train it."""
        while self._holds(resident) and resident.is_free and not self._trains(resident):
            self._attempt(resident, partial(self._start_next_transfer, resident))

    def _start_next_transfer(self, resident: ResidentTask) -> None:
        ending = resident.ending
        if ending is not None and ending.is_packed:
            self._upload_result(resident, ending)
        elif resident.name in self._executor.tasks:
            self._export(resident)
        elif resident.luggage is None and resident.has_luggage:
            fetching = self._errands.send(partial(self._fetch, resident.planned))
            resident.errand = BackgroundCall(fetching, partial(setattr, resident, "luggage"))
        else:
            self._attach(resident, resident.luggage or RestoreState())

    def _attempt(self, resident: ResidentTask, work: Callable[[], None]) -> None:
        """Does it; what goes wrong is put off, or ends this task alone."""
        if not self._holds(resident):
            return  # dropped, while its errand was under way
        try:
            work()
        except (UnavailableError, OutOfMemoryError) as error:
            self._retry_or_fail(resident, error)
        except MuxtuneError as error:
            self._fail(resident, error)

    def _retry_or_fail(self, resident: ResidentTask, error: UnavailableError | OutOfMemoryError) -> None:
        """The store is away, or there is no room: it waits for a while. Who finds no room alone then never will."""
        ending, told = resident.ending, why(error)
        is_patient = self._trains(resident) or not resident.has_waited(_PATIENCE_SECONDS)
        if ending is not None and ending.finished is None:
            return self._release(resident, f"{ending.reason}; not checkpointed: {told}")
        if isinstance(error, OutOfMemoryError) and not is_patient and set(self.names) <= {resident.name}:
            what = "export" if ending is not None else "adapter, with gradients and optimizer,"
            return self._fail(
                resident, WillNeverFitError(f"its {what} finds no memory even alone: {error}; adapt less")
            )
        if ending is not None and resident.name in self._executor.tasks:
            if ending.state is None:
                return self._release(resident, f"handed back: {told}")
            self._executor.detach(resident.name)  # it comes back to be exported when there is room
            resident.luggage = RestoreState(ending.state)
        elif ending is None and not is_patient:
            return self._release(resident, f"not taken in: {told}")
        resident.schedule_retry()
        _log.warning("%s is put off: %s", resident.name, told)

    def _fetch(self, task: plan_pb2.PlannedTask) -> RestoreState:
        """On a thread."""
        with task_span("fetch", task.task, task.trace_parent):
            if task.HasField("resume_from"):
                return RestoreState(*self._vault.get_checkpoint(task.task, task.resume_from))
            return RestoreState(initial_adapter=self._vault.get_adapter(task.initial_adapter_key))

    def _attach(self, resident: ResidentTask, luggage: RestoreState) -> None:
        task, state, used = resident.planned, luggage.state, luggage.used
        with task_span("attach", task.task, task.trace_parent, **{"muxtune.attempt": resident.attempt}):
            if state is not None:
                checkpointed = (task.task, state.metadata.get("trace_parent", ""))
                for link in links_to([checkpointed]):  # in an attempt before this one
                    trace.get_current_span().add_link(link.context, link.attributes)
            with folder_of(luggage.initial_adapter or {}) as folder:
                assignment = TaskAssignment(task.task, resident.spec, task.num_steps, resident.attempt)
                self._executor.attach(assignment, state, folder if luggage.initial_adapter else None)
        resident.luggage = None
        if resident.ending is None:
            resident.went_well()
        if state is not None and used is not None:
            resident.early_stop = EarlyStop(**state.metadata.get("early_stop", {}))
            resident.checkpoint_step = state.step
            if used.manifest_key != task.resume_from.manifest_key:
                told = f"goes on from step {used.step}: the checkpoint of step {task.resume_from.step} cannot be read"
                self._report(resident, resumed=plan_pb2.TaskResumed(checkpoint=used, message=told))
        if task.cancel and resident.ending is None:
            self._end(resident, Completion(plan_pb2.TaskFinished(cancelled=True)))

    def _checkpoint_is_due(self, resident: ResidentTask, step: int) -> bool:
        is_new = step > resident.checkpoint_step
        aged = time.monotonic() - resident.checkpoint_time >= self._every_seconds
        return is_new and (aged or step - resident.checkpoint_step >= self._every_steps)

    def _checkpoint(self, resident: ResidentTask) -> None:
        state = self._executor.checkpoint(resident.name)
        work = partial(self._put_checkpoint, resident.planned, resident.early_stop, state)
        resident.errand = BackgroundCall(self._errands.send(work), partial(self._note, resident))

    def _put_checkpoint(
        self, task: plan_pb2.PlannedTask, early_stop: EarlyStop, state: CheckpointState
    ) -> task_pb2.CheckpointCommitted:
        """On a thread."""
        with task_span("checkpoint", task.task, task.trace_parent, **{"muxtune.step": state.step}):
            extra = {"early_stop": vars(early_stop), "trace_parent": current_trace_parent()}
            return self._vault.put_checkpoint(task.task, task.attempt, state, extra)

    def _note(self, resident: ResidentTask, committed: task_pb2.CheckpointCommitted) -> None:
        resident.checkpoint_step, resident.checkpoint_time = committed.step, time.monotonic()
        resident.went_well()
        self._report(resident, checkpoint_committed=committed)

    def _end(self, resident: ResidentTask, ending: Completion) -> None:
        """It trains no more: off the device at once, and when the store has what it leaves, it is gone."""
        resident.ending = ending
        if resident.name in self._executor.tasks:
            self._attempt(resident, partial(self._export, resident))
        elif ending.finished is None and ending.state is None:
            return self._release(resident, ending.reason)
        self._advance(resident)

    def _export(self, resident: ResidentTask) -> None:
        """Takes what it leaves off the device: its state, and its adapter if it is finished. Cancelled before a step:
        neither."""
        name, ending = resident.name, resident.ending
        assert ending is not None
        step, finished = self._executor.tasks[name].step, ending.finished
        if step > (resident.checkpoint_step if finished is None else 0) and ending.state is None:
            ending.state = self._executor.checkpoint(name)
        if finished is not None and step > 0:
            exported, ending.adapter = self._exported(resident)
            finished.MergeFrom(exported)
        self._executor.detach(name)
        ending.is_packed = True

    def _exported(self, resident: ResidentTask) -> tuple[plan_pb2.TaskFinished, Files]:
        """Raises ExportMismatchError, NoMemory, UnavailableError."""
        name, step = resident.name, self._executor.tasks[resident.name].step
        with (
            task_span("export", name, resident.planned.trace_parent, **{"muxtune.step": step}),
            folder_of({}) as folder,
        ):
            report = self._executor.export(name, folder)
            files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}
        return plan_pb2.TaskFinished(step=step, max_logit_difference=report.max_logit_difference), files

    def _upload_result(self, resident: ResidentTask, ending: Completion) -> None:
        """What was packed goes to the store; then the task is gone."""
        state = ending.state if ending.state is not None and ending.state.step > resident.checkpoint_step else None
        if state is None and ending.adapter is None:
            return self._depart(resident, ending)
        task, early_stop = resident.planned, resident.early_stop

        def put() -> task_pb2.CheckpointCommitted | None:
            committed = self._put_checkpoint(task, early_stop, state) if state is not None else None
            if ending.finished is not None and ending.adapter is not None:
                self._put_adapter(task, ending.finished, ending.adapter, is_final=True)
            return committed

        def then(committed: task_pb2.CheckpointCommitted | None) -> None:
            if committed is not None:
                self._note(resident, committed)
            self._depart(resident, ending)

        resident.errand = BackgroundCall(self._errands.send(put), then)

    def _put_adapter(
        self, task: plan_pb2.PlannedTask, finished: plan_pb2.TaskFinished, files: Files, *, is_final: bool
    ) -> plan_pb2.TaskFinished:
        """On a thread: writes into `finished` where it lies."""
        with task_span("store adapter", task.task, task.trace_parent, **{"muxtune.step": finished.step}):
            manifest = self._vault.put_adapter(task.task, task.attempt, finished.step, files, is_final)
        finished.adapter_key, finished.adapter_bytes = manifest.key, manifest.size_bytes
        return finished

    def _depart(self, resident: ResidentTask, ending: Completion) -> None:
        if ending.finished is None:
            return self._release(resident, ending.reason)
        self._report(resident, finished=ending.finished)
        self._forget(resident)

    def _release(self, resident: ResidentTask, reason: str) -> None:
        self._report(resident, released=plan_pb2.TaskReleased(reason=reason))
        self._forget(resident)

    def _fail(self, resident: ResidentTask, error: MuxtuneError) -> None:
        self._report(resident, failed=to_failure(error))
        self._forget(resident)

    def _forget(self, resident: ResidentTask) -> None:
        if resident.name in self._executor.tasks:
            self._executor.detach(resident.name)
        self._ended[resident.name] = self._held.pop(resident.name).attempt

    def _report(self, resident: ResidentTask, **result: object) -> None:
        named = {"task": resident.name, "attempt": resident.attempt}
        self._results.append(plan_pb2.TaskResult(**named, **result))  # type: ignore[arg-type]


def exported_response(finished: plan_pb2.TaskFinished) -> execution_pb2.ExportAdapterResponse:
    """What ExportAdapter answers."""
    return execution_pb2.ExportAdapterResponse(
        step=finished.step,
        adapter_key=finished.adapter_key,
        max_logit_difference=finished.max_logit_difference,
    )
