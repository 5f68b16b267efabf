"""The tasks a trainer holds: taken in, kept safe, handed on. Every path that ends a task here reports why.

One resident's trouble (a corrupt checkpoint, an adapter that does not fit) is its own result, never its neighbours'.
"""

import logging
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from opentelemetry import trace

from engine.errors import MuxtuneError, UnavailableError
from engine.results import EvaluationResult, StepResult, TaskFailure
from engine.runtime.executor import Executor
from engine.runtime.task_run import Assignment
from engine.task import TaskSpec, evaluation_is_due
from muxtune.v1 import alignment_pb2, execution_pb2, plan_pb2
from services.convert import evaluation_to_proto, spec_to_domain, step_to_proto
from services.errors import to_failure
from services.execution.early_stop import EarlyStop
from services.execution.vault import Vault
from services.telemetry import current_trace_parent, links_to, task_span

_RETRY_SECONDS = 1.0
_log = logging.getLogger(__name__)


@dataclass
class Resident:
    """A task in this executor's hands, in one attempt."""

    planned: plan_pb2.PlannedTask
    spec: TaskSpec
    early_stop: EarlyStop = field(default_factory=EarlyStop)
    checkpoint_step: int = 0
    checkpoint_time: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return self.planned.task


class Residents:
    """Collects results until `take_results`. Not thread-safe: the trainer's loop alone calls it."""

    def __init__(self, executor: Executor, vault: Vault, checkpoint_steps: int, checkpoint_seconds: float) -> None:
        self._executor, self._vault = executor, vault
        self._every_steps, self._every_seconds = checkpoint_steps, checkpoint_seconds
        self._held: dict[str, Resident] = {}
        self._ended: dict[str, int] = {}  # attempts that ended here: a plan made before it knew may still name them
        self._results: list[plan_pb2.TaskResult] = []

    @property
    def names(self) -> list[str]:
        return list(self._held)

    def take_results(self) -> list[plan_pb2.TaskResult]:
        results, self._results = self._results, []
        return results

    def adopt(self, tasks: list[plan_pb2.PlannedTask]) -> None:
        """Holds just these: hands back what left, drops what was superseded, takes in what is new."""
        planned = {task.task: task for task in tasks}
        self._ended = {name: epoch for name, epoch in self._ended.items() if name in planned}
        for name, resident in list(self._held.items()):
            if name not in planned:
                self.release(name, "a new plan leaves it out")
            elif planned[name].attempt_epoch != resident.planned.attempt_epoch:
                self.drop([name])
            else:
                resident.planned = planned[name]
        for name, task in planned.items():
            if name not in self._held and self._ended.get(name, 0) < task.attempt_epoch:
                self._take_in(task)
            if task.cancel and name in self._held:
                self.finish(name, cancelled=True)

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
        return [(name, resident.planned.trace_parent) for name, resident in self._held.items()]

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
                self.finish(result.task)
            elif resident.early_stop.should_stop(training):
                best = resident.early_stop.best
                under = "finite" if best is None else f"under {best:.4f}"
                why = f"early stop after {result.step} steps: held-out loss not {under} any more"
                self.finish(result.task, message=why)

    def close_round(self) -> None:
        """At a round's end: finishes what is done or cancelled, checkpoints what is due."""
        for name, resident in list(self._held.items()):
            step, last = self._executor.tasks[name].step, resident.planned.num_steps
            if resident.planned.cancel:  # its adapter could not be committed before
                self.finish(name, cancelled=True)
            elif step >= last and not evaluation_is_due(resident.spec.training, last, last):
                self.finish(name)
            elif self._checkpoint_is_due(resident, step):
                try:
                    self._checkpoint(resident)
                except UnavailableError as error:
                    _log.warning("checkpoint of %s put off: %s", name, error)

    def finish(self, name: str, *, cancelled: bool = False, message: str = "") -> None:
        """Checkpoints, exports, checks, commits the adapter, reports. Cancelled before a step: no adapter."""
        resident = self._held[name]
        step = self._executor.tasks[name].step
        try:
            finished = plan_pb2.TaskFinished(step=step, cancelled=cancelled, message=message)
            if step > 0:
                self._checkpoint(resident)
                exported = self.export(name, is_final=True)
                finished.adapter_key = exported.adapter_key
                finished.adapter_bytes = exported.adapter_bytes
                finished.max_logit_difference = exported.max_logit_difference
            self._report(resident, finished=finished)
            self._forget(name)
        except UnavailableError as error:  # tried again at the end of each round
            _log.warning("end of %s put off: %s", name, error)
            time.sleep(_RETRY_SECONDS)
        except MuxtuneError as error:
            self._fail(resident, error)

    def export(self, name: str, *, is_final: bool = False) -> plan_pb2.TaskFinished:
        """The adapter as it stands, committed to the store. Raises ExportMismatchError, UnavailableError."""
        resident, step = self._held[name], self._executor.tasks[name].step
        with (
            task_span("export", name, resident.planned.trace_parent, **{"muxtune.step": step}),
            tempfile.TemporaryDirectory(prefix="muxtune-export-") as folder,
        ):
            report = self._executor.export(name, Path(folder))
            epoch = resident.planned.attempt_epoch
            manifest = self._vault.put_adapter(name, epoch, step, Path(folder), is_final)
        return plan_pb2.TaskFinished(
            step=step,
            adapter_key=manifest.key,
            adapter_bytes=manifest.size_bytes,
            max_logit_difference=report.max_logit_difference,
        )

    def fail(self, name: str, error: MuxtuneError) -> None:
        """Ends the task for what only this executor's surroundings could tell."""
        self._fail(self._held[name], error)

    def release(self, name: str, reason: str) -> None:
        """Checkpoints and hands the task back, unharmed."""
        resident = self._held[name]
        try:
            if self._executor.tasks[name].step > resident.checkpoint_step:
                self._checkpoint(resident)
        except MuxtuneError as error:
            reason = f"{reason}; not checkpointed: {error.message}"
        self._report(resident, released=plan_pb2.TaskReleased(reason=reason))
        self._forget(name)

    def drop(self, names: list[str]) -> None:
        """Forgets tasks without committing anything: their attempt was superseded."""
        for name in names:
            if name in self._held:
                self._executor.detach(name)
                del self._held[name]
        self._results = [result for result in self._results if result.task not in names]

    def _take_in(self, task: plan_pb2.PlannedTask) -> None:
        resident = None
        try:
            with task_span("attach", task.task, task.trace_parent, **{"muxtune.attempt_epoch": task.attempt_epoch}):
                resident = Resident(task, spec_to_domain(task.spec))
                self._attach(resident)
            self._held[task.task] = resident
        except UnavailableError as error:  # the store is away: no fault of the task's; planned again, not at once
            time.sleep(_RETRY_SECONDS)
            released = plan_pb2.TaskReleased(reason=f"not taken in: {error.message}")
            self._results.append(
                plan_pb2.TaskResult(task=task.task, attempt_epoch=task.attempt_epoch, released=released)
            )
            self._ended[task.task] = task.attempt_epoch
        except MuxtuneError as error:
            self._results.append(
                plan_pb2.TaskResult(task=task.task, attempt_epoch=task.attempt_epoch, failed=to_failure(error))
            )
            self._ended[task.task] = task.attempt_epoch

    def _attach(self, resident: Resident) -> None:
        task = resident.planned
        assignment = Assignment(task.task, resident.spec, task.num_steps, task.attempt_epoch)
        if task.HasField("resume_from"):
            state, used = self._vault.get_checkpoint(task.task, task.resume_from)
            checkpointed = (task.task, state.metadata.get("trace_parent", ""))
            for link in links_to([checkpointed]):  # in an attempt before this one
                trace.get_current_span().add_link(link.context, link.attributes)
            resident.early_stop = EarlyStop(**state.metadata.get("early_stop", {}))
            resident.checkpoint_step = state.step
            self._executor.attach(assignment, state)
            if used.manifest_key != task.resume_from.manifest_key:
                why = f"goes on from step {used.step}: the checkpoint of step {task.resume_from.step} cannot be read"
                self._report(resident, resumed=plan_pb2.TaskResumed(checkpoint=used, message=why))
        elif task.initial_adapter_key:
            with self._vault.get_adapter(task.initial_adapter_key) as folder:
                self._executor.attach(assignment, None, Path(folder))
        else:
            self._executor.attach(assignment)

    def _checkpoint_is_due(self, resident: Resident, step: int) -> bool:
        is_new = step > resident.checkpoint_step
        aged = time.monotonic() - resident.checkpoint_time >= self._every_seconds
        return is_new and (aged or step - resident.checkpoint_step >= self._every_steps)

    def _checkpoint(self, resident: Resident) -> None:
        state = self._executor.checkpoint(resident.name)
        with task_span("checkpoint", resident.name, resident.planned.trace_parent, **{"muxtune.step": state.step}):
            extra = {"early_stop": vars(resident.early_stop), "trace_parent": current_trace_parent()}
            committed = self._vault.put_checkpoint(resident.name, resident.planned.attempt_epoch, state, extra)
        resident.checkpoint_step, resident.checkpoint_time = state.step, time.monotonic()
        self._report(resident, checkpoint_committed=committed)

    def _fail(self, resident: Resident, error: MuxtuneError) -> None:
        self._report(resident, failed=to_failure(error))
        self._forget(resident.name)

    def _forget(self, name: str) -> None:
        if name in self._executor.tasks:
            self._executor.detach(name)
        self._ended[name] = self._held.pop(name).planned.attempt_epoch

    def _report(self, resident: Resident, **result: object) -> None:
        epoch = resident.planned.attempt_epoch
        self._results.append(plan_pb2.TaskResult(task=resident.name, attempt_epoch=epoch, **result))  # type: ignore[arg-type]


def exported_response(finished: plan_pb2.TaskFinished) -> execution_pb2.ExportAdapterResponse:
    """What ExportAdapter answers."""
    return execution_pb2.ExportAdapterResponse(
        step=finished.step,
        adapter_key=finished.adapter_key,
        max_logit_difference=finished.max_logit_difference,
    )
