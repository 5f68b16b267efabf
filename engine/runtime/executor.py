"""Runs microbatches of many tasks on one backbone: the fused training step.

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
from engine.results import EvaluationResult, Result, ShadowCheck, StepResult, TaskFailure
from engine.runtime import export
from engine.runtime.backbone import Backbone
from engine.runtime.checkpoint import CheckpointState
from engine.runtime.cuda_graphs import CudaGraphs
from engine.runtime.out_of_memory import OutOfMemoryError, release_cache, with_second_try, within_memory
from engine.runtime.staging import Copy, copy_to, on_device, stage
from engine.runtime.task_state import StepAccumulator, TaskAssignment, TaskTrainingState, take_steps

Taken = tuple[float, float] | MuxtuneError  # (learning rate, gradient norm), or why the task ends


class Executor:
    """Holds resident tasks and runs what it is given. Not thread-safe: one caller, between microbatches."""

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
        self.backbone, self._graphs, self._is_eager = backbone, graphs, False
        self._tenant_loader = tenant_loader
        self.tasks: dict[str, TaskTrainingState] = {}
        self._clock, self._copy = clock, copy or copy_to(backbone.device)

    def stage(self, microbatch: Microbatch) -> Microbatch:
        """The same, on its way to the device while others run there. On any thread; nobody has to."""
        return microbatch if self._copy is None else stage(microbatch, self._copy)

    def run(self, microbatch: Microbatch) -> list[Result]:
        """Forward, loss, backward; then, for each task whose step is complete, its own clip, optimizer and schedule.

        Raises NoMemory before any task has taken its step: what this one's tasks have gathered is to be gathered anew.
        """
        started = self._clock()
        resident = frozenset(self.tasks)
        trains = microbatch.kind is MicrobatchKind.TRAIN

        def gather() -> None:
            graphs = None if self._is_eager else self._graphs
            replayed = None if graphs is None else graphs.run(microbatch, self.tasks)
            rows_M, loss_M = replayed or self._forward_backward(microbatch, resident)
            self._gather(microbatch, rows_M, loss_M, self._clock() - started)

        try:
            within_memory(gather)
        except OutOfMemoryError:
            self._release()
            raise
        complete = [r for r in microbatch.ranges if r.is_last and r.task in resident]
        return self._finish_steps(complete) if trains else [self._finish_evaluation(r) for r in complete]

    def _forward_backward(self, microbatch: Microbatch, resident: frozenset[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows [M] that bear a loss, losses [M]), on the host: the device is done. Where it trains, gradients go
        to the tasks' own."""
        trains = microbatch.kind is MicrobatchKind.TRAIN
        rows_M, weights_M = self._target_rows(microbatch, resident)
        there_M = to_device(rows_M, self.backbone.device)
        targets_M = on_device(microbatch, self.backbone.device)[1][there_M]
        with torch.set_grad_enabled(trains):
            hidden_TH = self.backbone.hidden(microbatch, resident)
        loss_M, dhidden_MH = segment_cross_entropy(
            self.backbone.head, hidden_TH.detach()[there_M], targets_M, weights_M if trains else None
        )
        if dhidden_MH is not None and hidden_TH.requires_grad:
            for name in resident.intersection(range_.task for range_ in microbatch.ranges):
                self.tasks[name].gradient.take()
            torch.autograd.backward(hidden_TH, torch.zeros_like(hidden_TH).index_copy_(0, there_M, dhidden_MH))
        return rows_M, loss_M.double().cpu()

    def attach(
        self, assignment: TaskAssignment, state: CheckpointState | None = None, initial_adapter: Path | None = None
    ) -> None:
        """Mounts the task's adapters, fresh, from an initial adapter, or exactly as a checkpoint left them.

        Raises InvalidInputError (targets, an adapter that does not fit), ArtifactCorruptError or NoMemory; nothing is
        mounted.
        """
        if assignment.task in self.tasks:
            raise ValueError(f"{assignment.task} is attached already")

        def make() -> TaskTrainingState:
            run = TaskTrainingState(assignment, self.backbone)
            if state is not None:
                state.restore(run)
            elif initial_adapter is not None:
                export.load_initial_adapter(initial_adapter, run, self.backbone)
            return run

        run = with_second_try(make, self._release)
        for name, adapter in run.adapters.items():
            self.backbone.mounted[name].adapters[assignment.task] = adapter
        self.tasks[assignment.task] = run

    def detach(self, task: str) -> None:
        """Unmounts the task; its memory is given back. Tokens of it still in the stream run through the bare model."""
        run = self.tasks.pop(task)
        if self._graphs is not None:
            self._graphs.forget(run)
        for name in run.adapters:
            del self.backbone.mounted[name].adapters[task]

    def checkpoint(self, task: str) -> CheckpointState:
        """A copy of the task between two steps: parameters, optimizer, step. Raises NoMemory."""
        return with_second_try(lambda: CheckpointState.of(self.tasks[task]), self._release)

    def export(self, task: str, folder: Path) -> export.ExportReport:
        """The adapter as a PEFT folder, loaded again and compared. Raises ExportMismatchError, NoMemory."""
        work = partial(export.export, self.backbone, self.tasks[task], folder, self._tenant_loader)
        return with_second_try(work, self._release)

    def task_bytes(self) -> dict[str, int]:
        """Bytes held for each resident task: parameters, gradients, optimizer."""
        return {name: run.num_bytes() for name, run in self.tasks.items()}

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Nothing is captured or replayed in this context."""
        self._is_eager = True
        try:
            yield
        finally:
            self._is_eager = False

    def _release(self) -> None:
        """Gives back what is kept for later: graphs, and the allocator's cache."""
        if self._graphs is not None:
            self._graphs.clear()
        release_cache(self.backbone.device.type)

    def _target_rows(self, microbatch: Microbatch, resident: frozenset[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [M] that bear a resident task's loss, on the host, and 1 / (targets of that task's whole step) for
        each, on the device."""
        targets_T = torch.from_numpy(microbatch.targets_T)
        weights_T = torch.zeros(microbatch.num_tokens, dtype=torch.float64)
        for range_ in microbatch.ranges:
            if range_.task in resident:
                weights_T[_slice(range_)] = 1 / max(1, range_.num_step_target_tokens)
        rows_M = torch.nonzero((targets_T != IGNORE) & (weights_T > 0)).squeeze(1)
        return rows_M, to_device(weights_T[rows_M], self.backbone.device)

    def _gather(self, microbatch: Microbatch, rows_M: torch.Tensor, loss_M: torch.Tensor, seconds: float) -> None:
        loss_T = torch.zeros(microbatch.num_tokens, dtype=torch.float64)
        loss_T[rows_M] = loss_M
        names = {r.task for r in microbatch.ranges}
        for range_ in microbatch.ranges:
            if (run := self.tasks.get(range_.task)) is None:
                continue
            gathered, targets_L = run.gathered, microbatch.targets_T[_slice(range_)]
            gathered.loss += loss_T[_slice(range_)].sum().item() / max(1, range_.num_step_target_tokens)
            gathered.num_target_tokens += int((targets_L != IGNORE).sum())
            gathered.num_effective_tokens += range_.num_effective_tokens
            gathered.num_padding_tokens += range_.num_tokens - range_.num_effective_tokens
            gathered.seconds += seconds * range_.num_tokens / microbatch.num_tokens
            gathered.neighbours |= names - {range_.task}
            if microbatch.kind is MicrobatchKind.TRAIN:
                gathered.digest.add(microbatch, range_)
                if run.is_verified:
                    gathered.alone.append(microbatch.alone(range_))

    def _finish_steps(self, complete: Sequence[Range]) -> list[Result]:
        """Clip, optimizer and schedule of each task, all of them at once; a sick one fails alone."""
        results: list[Result] = []
        checked: list[tuple[Range, ShadowCheck | None]] = []
        for range_ in complete:
            try:
                checked.append((range_, self._verified(self.tasks[range_.task])))
            except WillNeverFitError as error:
                results.append(self._fail(range_, error))
        taken = self._take_steps([self.tasks[range_.task] for range_, _ in checked])
        return results + [self._finish_step(*each, step) for each, step in zip(checked, taken, strict=True)]

    def _take_steps(self, runs: Sequence[TaskTrainingState]) -> Sequence[Taken]:
        """Where all at once find no memory, one after the other."""
        try:
            return within_memory(lambda: take_steps(runs))
        except OutOfMemoryError:
            self._release()
        return [self._take_step(run) for run in runs]

    def _take_step(self, run: TaskTrainingState) -> Taken:
        try:
            return within_memory(lambda: take_steps([run]))[0]
        except OutOfMemoryError as error:
            return _no_room(f"optimizer's step {run.step + 1}", run, error, "adapt less")

    def _verified(self, run: TaskTrainingState) -> ShadowCheck | None:
        """The check of the step in flight, where one is due. Raises WillNeverFitError."""
        if not run.gathered.alone:
            return None
        try:
            return with_second_try(lambda: self._run_alone(run), self._release)
        except OutOfMemoryError as error:
            raise _no_room(
                f"step {run.step + 1}, run again to verify it,", run, error, "verify_every_steps: 0 asks for less"
            ) from None

    def _fail(self, range_: Range, error: MuxtuneError) -> TaskFailure:
        self.detach(range_.task)
        return TaskFailure(range_.task, range_.step, error)

    def _finish_step(self, range_: Range, shadow_check: ShadowCheck | None, taken: Taken) -> StepResult | TaskFailure:
        run = self.tasks[range_.task]
        if isinstance(taken, MuxtuneError):
            return self._fail(range_, taken)
        done, run.gathered = run.gathered, StepAccumulator()
        return StepResult(
            task=range_.task,
            step=run.step,
            loss=done.loss,
            learning_rate=taken[0],
            grad_norm=taken[1],
            num_effective_tokens=done.num_effective_tokens,
            num_target_tokens=done.num_target_tokens,
            num_padding_tokens=done.num_padding_tokens,
            seconds=done.seconds,
            num_neighbours=len(done.neighbours),
            input_digest=done.digest.of(run.training, range_.step, run.assignment.spec.method.dropout),
            shadow_check=shadow_check,
        )

    def _run_alone(self, run: TaskTrainingState) -> ShadowCheck:
        """The step again with no neighbour in the batch. The gradient stays the one of the fused step."""
        started, gradient_P = self._clock(), run.gradient_P
        fused_P, loss = gradient_P.clone(), 0.0
        try:
            gradient_P.zero_()
            for microbatch in run.gathered.alone:
                _, loss_M = self._forward_backward(microbatch, frozenset({run.assignment.task}))
                loss += loss_M.sum().item() / max(1, microbatch.ranges[0].num_step_target_tokens)
            norm = torch.linalg.vector_norm(gradient_P).item()
            difference = torch.linalg.vector_norm(gradient_P.neg_().add_(fused_P)).item()
        finally:
            gradient_P.copy_(fused_P)
        run.gathered.seconds += self._clock() - started
        return ShadowCheck(_relative(run.gathered.loss - loss, loss), _relative(difference, norm))

    def _finish_evaluation(self, range_: Range) -> EvaluationResult | TaskFailure:
        run = self.tasks[range_.task]
        done, run.gathered = run.gathered, StepAccumulator()
        if not math.isfinite(done.loss):
            error = NonFiniteError(f"held-out loss after step {range_.step} is {done.loss}", step=range_.step)
            return self._fail(range_, error)
        return EvaluationResult(range_.task, range_.step, done.loss, done.num_target_tokens)


def _no_room(what: str, run: TaskTrainingState, error: OutOfMemoryError, remedy: str) -> WillNeverFitError:
    held = run.num_bytes()
    return WillNeverFitError(
        f"its {what} finds no memory beside the {held} bytes that it holds: {error}; {remedy}", bytes=held
    )


def _slice(range_: Range) -> slice:
    return slice(range_.start, range_.start + range_.num_tokens)


def _relative(difference: float, value: float) -> float:
    """|difference| / |value|; 0 where neither is there."""
    return abs(difference) / abs(value) if value else float(difference != 0)
