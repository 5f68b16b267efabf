"""Runs microbatches of many tasks on one backbone: the fused training step.

`Executor.run` is the whole step: forward, loss and backward of all tasks together (`_forward_backward`), sums over each
task's step (`_accumulate`), then clip, optimizer and schedule of each task with a complete step (`_finish_steps`).

Legend: T tokens of the packed stream, H hidden, M target positions of the microbatch.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from engine.alignment.microbatch import IGNORE, Microbatch, MicrobatchKind, Range
from engine.errors import MuxtuneError, NonFiniteError, WillNeverFitError
from engine.kernels.segment_cross_entropy import segment_cross_entropy
from engine.kernels.transfer import to_device
from engine.results import EvaluationResult, Result, StepResult, TaskFailure, WorkInProgress
from engine.runtime import export
from engine.runtime.backbone import Backbone
from engine.runtime.checkpoint import CheckpointState
from engine.runtime.cuda_graphs import CudaGraphs
from engine.runtime.graph_buckets import RowLosses
from engine.runtime.out_of_memory import OutOfMemoryError, release_cache, retry_after_release, within_memory
from engine.runtime.staging import Copy, copier_to, on_device, stage
from engine.runtime.step_accumulator import AloneStep, StepAccumulator
from engine.runtime.task_state import OptimizerStep, TaskAssignment, TaskTrainingState, take_steps

StepOutcome = OptimizerStep | MuxtuneError  # an error ends the task


class Executor:
    """Holds resident tasks and runs their microbatches. Not thread-safe: one thread makes all calls but `stage`."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        clock: Callable[[], float] = time.perf_counter,
        copy: Copy | None = None,
        graphs: CudaGraphs | None = None,
        tenant_loader: export.TenantLoader | None = None,
    ) -> None:
        """`graphs`: replays small microbatches where it can; None: every microbatch runs eagerly.
        `tenant_loader`: loads exports in formats that PEFT does not have, to check them; None: such an export raises.
        """
        self.backbone, self._graphs = backbone, graphs
        self._is_eager = False
        self._tenant_loader = tenant_loader
        self.tasks: dict[str, TaskTrainingState] = {}
        self._clock, self._copy = clock, copy or copier_to(backbone.device)

    def attach(
        self, assignment: TaskAssignment, state: CheckpointState | None = None, initial_adapter: Path | None = None
    ) -> None:
        """Mounts the task's adapters: new, from an initial adapter, or exactly as in a checkpoint.

        Raises InvalidInputError (the target modules or the initial adapter do not fit), ArtifactCorruptError or
        OutOfMemoryError; then it mounts nothing.
        """
        if assignment.task in self.tasks:
            raise ValueError(f"{assignment.task} is attached already")

        def build() -> TaskTrainingState:
            task_state = TaskTrainingState(assignment, self.backbone)
            if state is not None:
                state.restore(task_state)
            elif initial_adapter is not None:
                export.load_initial_adapter(initial_adapter, task_state, self.backbone)
            return task_state

        task_state = retry_after_release(build, self._release_caches)
        for name, adapter in task_state.adapters.items():
            self.backbone.mounted[name].adapters[assignment.task] = adapter
        self.tasks[assignment.task] = task_state

    def detach(self, task: str) -> None:
        """Unmounts the task and releases its memory. In later microbatches its tokens pass the backbone alone."""
        task_state = self.tasks.pop(task)
        if self._graphs is not None:
            self._graphs.forget(task_state)
        for name in task_state.adapters:
            del self.backbone.mounted[name].adapters[task]

    def checkpoint(self, task: str) -> CheckpointState:
        """Returns a copy of the task between two steps: parameters, optimizer, step. Raises OutOfMemoryError."""
        return retry_after_release(lambda: CheckpointState.of(self.tasks[task]), self._release_caches)

    def export(self, task: str, folder: Path) -> export.ExportReport:
        """Exports the adapter to a folder and checks it. Raises ExportMismatchError, OutOfMemoryError."""
        work = partial(export.export, self.backbone, self.tasks[task], folder, self._tenant_loader)
        return retry_after_release(work, self._release_caches)

    def work_in_progress(self, task: str) -> WorkInProgress:
        """Returns the totals of the task's current step or evaluation."""
        totals = self.tasks[task].accumulated
        tokens = totals.num_effective_tokens, totals.num_padding_tokens
        return WorkInProgress(self.tasks[task].step, totals.is_evaluation, totals.seconds, *tokens)

    def task_bytes(self) -> dict[str, int]:
        """Returns the bytes that each resident task holds: parameters, gradients, optimizer."""
        return {name: task_state.num_bytes() for name, task_state in self.tasks.items()}

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Runs every microbatch eagerly in this context: no graph is captured or replayed."""
        self._is_eager = True
        try:
            yield
        finally:
            self._is_eager = False

    def unexpected(self, microbatch: Microbatch) -> list[str]:
        """Returns the resident tasks whose range is of another step, repeats a part of their step or leaves one out."""
        residents = [(self.tasks[r.task], r) for r in microbatch.ranges if r.task in self.tasks]
        return [
            range_.task
            for state, range_ in residents
            if range_.step != state.step or not state.accumulated.continues_with(range_, microbatch.kind)
        ]

    def stage(self, microbatch: Microbatch) -> Microbatch:
        """Starts to copy the microbatch to the device while others run there. Optional; on any thread."""
        return microbatch if self._copy is None else stage(microbatch, self._copy)

    def run(self, microbatch: Microbatch) -> list[Result]:
        """Runs forward, loss and backward, then clip, optimizer and schedule of each task with a complete step.

        Raises OutOfMemoryError before any task has taken its step: the caller must restart the steps of its tasks.
        """
        started = self._clock()
        resident = frozenset(self.tasks)
        trains = microbatch.kind is MicrobatchKind.TRAIN

        def forward_backward() -> None:
            graphs = None if self._is_eager else self._graphs
            replayed = None if graphs is None else graphs.run(microbatch, self.tasks)
            losses = replayed or self._forward_backward(microbatch, resident)
            self._accumulate(microbatch, losses, self._clock() - started)

        try:
            within_memory(forward_backward)
        except OutOfMemoryError:
            self._release_caches()
            raise
        failures = self._verify(microbatch) if trains else []
        complete = [r for r in microbatch.ranges if r.is_last and r.task in self.tasks]
        finished = self._finish_steps(complete) if trains else [self._finish_evaluation(r) for r in complete]
        return [*failures, *finished]

    def _forward_backward(self, microbatch: Microbatch, resident: frozenset[str]) -> RowLosses:
        """Runs forward and loss, and backward for a training microbatch, which adds to the tasks' gradients.

        Waits for the device.
        """
        trains = microbatch.kind is MicrobatchKind.TRAIN
        rows_M, weights_M = self._target_rows(microbatch, resident)
        device_rows_M = to_device(rows_M, self.backbone.device)
        targets_M = on_device(microbatch, self.backbone.device)[1][device_rows_M]
        with torch.set_grad_enabled(trains):
            hidden_TH = self.backbone.hidden(microbatch, resident)
        loss_M, dhidden_MH = segment_cross_entropy(
            self.backbone.head, hidden_TH.detach()[device_rows_M], targets_M, weights_M if trains else None
        )
        if dhidden_MH is not None and hidden_TH.requires_grad:
            for name in resident.intersection(range_.task for range_ in microbatch.ranges):
                self.tasks[name].gradient.allocate()
            torch.autograd.backward(hidden_TH, torch.zeros_like(hidden_TH).index_copy_(0, device_rows_M, dhidden_MH))
        return RowLosses(rows_M, loss_M.double().cpu())

    def _target_rows(self, microbatch: Microbatch, resident: frozenset[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the rows [M] that bear a resident task's loss, on the host, and their weights, on the device.

        A weight is 1 / (targets of the task's whole step).
        """
        targets_T = torch.from_numpy(microbatch.targets_T)
        weights_T = torch.zeros(microbatch.num_tokens, dtype=torch.float64)
        for range_ in microbatch.ranges:
            if range_.task in resident:
                weights_T[_slice(range_)] = 1 / max(1, range_.num_step_target_tokens)
        rows_M = torch.nonzero((targets_T != IGNORE) & (weights_T > 0)).squeeze(1)
        return rows_M, to_device(weights_T[rows_M], self.backbone.device)

    def _accumulate(self, microbatch: Microbatch, losses: RowLosses, seconds: float) -> None:
        """Adds losses, token counts, seconds and digests of the microbatch to its tasks' current steps."""
        loss_T = torch.zeros(microbatch.num_tokens, dtype=torch.float64)
        loss_T[losses.rows_M] = losses.loss_M
        names = {r.task for r in microbatch.ranges}
        for range_ in microbatch.ranges:
            if (task_state := self.tasks.get(range_.task)) is None:
                continue
            totals, targets_L = task_state.accumulated, microbatch.targets_T[_slice(range_)]
            totals.loss += loss_T[_slice(range_)].sum().item() / max(1, range_.num_step_target_tokens)
            totals.num_target_tokens += int((targets_L != IGNORE).sum())
            totals.num_effective_tokens += range_.num_effective_tokens
            totals.num_padding_tokens += range_.num_tokens - range_.num_effective_tokens
            totals.seconds += seconds * range_.num_tokens / microbatch.num_tokens
            totals.neighbours |= names - {range_.task}
            totals.add_done(range_)
            totals.is_evaluation = microbatch.kind is MicrobatchKind.EVALUATE
            if microbatch.kind is MicrobatchKind.TRAIN:
                totals.digest.add(microbatch, range_)

    def _finish_steps(self, complete: Sequence[Range]) -> list[StepResult | TaskFailure]:
        """Runs clip, optimizer and schedule of all tasks at once. A task fails alone if its loss or gradient is NaN."""
        outcomes = self._take_steps([self.tasks[range_.task] for range_ in complete])
        return [self._finish_step(*pair) for pair in zip(complete, outcomes, strict=True)]

    def _take_steps(self, task_states: Sequence[TaskTrainingState]) -> Sequence[StepOutcome]:
        """Steps all tasks at once; one after the other if that runs out of memory."""
        try:
            return within_memory(lambda: take_steps(task_states))
        except OutOfMemoryError:
            self._release_caches()
        return [self._take_step(task_state) for task_state in task_states]

    def _take_step(self, task_state: TaskTrainingState) -> StepOutcome:
        """Steps one task; returns WillNeverFitError if even that runs out of memory."""
        try:
            return within_memory(lambda: take_steps([task_state]))[0]
        except OutOfMemoryError as error:
            return _will_never_fit(
                f"optimizer step {task_state.step + 1}", task_state, error, "Reduce `rank` or `target_modules`."
            )

    def _finish_step(self, range_: Range, outcome: StepOutcome) -> StepResult | TaskFailure:
        task_state = self.tasks[range_.task]
        if isinstance(outcome, MuxtuneError):
            return self._fail(range_, outcome)
        totals, task_state.accumulated = task_state.accumulated, StepAccumulator()
        return StepResult(
            task=range_.task,
            step=task_state.step,
            loss=totals.loss,
            learning_rate=outcome.learning_rate,
            grad_norm=outcome.grad_norm,
            num_effective_tokens=totals.num_effective_tokens,
            num_target_tokens=totals.num_target_tokens,
            num_padding_tokens=totals.num_padding_tokens,
            seconds=totals.seconds,
            num_neighbours=len(totals.neighbours),
            input_digest=totals.digest.of(task_state.training, range_.step, task_state.assignment.spec.method.dropout),
            shadow_check=totals.shadow_check,
        )

    def _finish_evaluation(self, range_: Range) -> EvaluationResult | TaskFailure:
        task_state = self.tasks[range_.task]
        totals = task_state.accumulated
        if not math.isfinite(totals.loss):
            message = f"The held-out loss after step {range_.step} is {totals.loss}. Lower the learning rate."
            return self._fail(range_, NonFiniteError(message, step=range_.step))
        task_state.evaluated_step, task_state.accumulated = range_.step, StepAccumulator()
        return EvaluationResult(
            task=range_.task,
            step=range_.step,
            loss=totals.loss,
            num_effective_tokens=totals.num_effective_tokens,
            num_target_tokens=totals.num_target_tokens,
            num_padding_tokens=totals.num_padding_tokens,
            seconds=totals.seconds,
        )

    def _fail(self, range_: Range, error: MuxtuneError) -> TaskFailure:
        work = self.work_in_progress(range_.task)
        self.detach(range_.task)
        return TaskFailure(range_.task, range_.step, error, work)

    def _verify(self, microbatch: Microbatch) -> list[TaskFailure]:
        """Runs the ranges of steps that are to be verified again, each alone. A task without memory for it fails."""
        failures = []
        for range_ in microbatch.ranges:
            task_state = self.tasks.get(range_.task)
            if task_state is None or not task_state.is_verified:
                continue
            work = partial(self._run_alone, task_state, microbatch.alone(range_))
            try:
                retry_after_release(work, self._release_caches)
            except OutOfMemoryError as error:
                part = f"repetition of step {task_state.step + 1} that verifies it"
                remedy = "Set `verify_every_steps` to 0."
                failures.append(self._fail(range_, _will_never_fit(part, task_state, error, remedy)))
        return failures

    def _run_alone(self, task_state: TaskTrainingState, microbatch: Microbatch) -> None:
        """Runs a microbatch of the task again without neighbours. Restores the gradient of the fused step."""
        started, gradient_P, totals = self._clock(), task_state.gradient_P, task_state.accumulated
        fused_P, alone = gradient_P.clone(), totals.alone or AloneStep(torch.zeros_like(gradient_P))
        try:
            gradient_P.zero_()
            losses = self._forward_backward(microbatch, frozenset({task_state.assignment.task}))
            alone.gradient_P.add_(gradient_P)
        finally:
            gradient_P.copy_(fused_P)
        alone.loss += losses.loss_M.sum().item() / max(1, microbatch.ranges[0].num_step_target_tokens)
        totals.alone = alone
        if microbatch.ranges[0].is_last:
            totals.shadow_check = alone.compare(totals.loss, fused_P)
            totals.alone = None
        totals.seconds += self._clock() - started

    def _release_caches(self) -> None:
        """Releases the graphs and the allocator's cache."""
        if self._graphs is not None:
            self._graphs.clear()
        release_cache(self.backbone.device.type)


def _will_never_fit(
    part: str, task_state: TaskTrainingState, error: OutOfMemoryError, remedy: str
) -> WillNeverFitError:
    num_bytes = task_state.num_bytes()
    message = f"The {part} does not fit in memory beside the {num_bytes} bytes that the task holds: {error}."
    return WillNeverFitError(f"{message} {remedy}", bytes=num_bytes)


def _slice(range_: Range) -> slice:
    return slice(range_.start, range_.start + range_.num_tokens)
