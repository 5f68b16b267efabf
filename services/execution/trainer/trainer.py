"""The trainer's loop: adopts the newest plan between rounds, runs hTasks' microbatches in turn, reports."""

import logging
import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

import torch
from opentelemetry import propagate

from engine.alignment.microbatch import Microbatch
from engine.errors import ArtifactCorruptError, InvalidInputError, MuxtuneError, NotFoundError, WillNeverFitError
from engine.runtime.backbone import Backbone
from engine.runtime.cuda_graphs import CudaGraphs
from engine.runtime.executor import Executor
from engine.runtime.footprint import measure
from engine.runtime.out_of_memory import OutOfMemoryError, release_cache
from muxtune.adapters import load_adapter
from muxtune.v1 import alignment_pb2, execution_pb2, plan_pb2
from services.conversion.plan import cost_to_proto
from services.execution.settings import ExecutionSettings
from services.execution.trainer.checkpoint_store import CheckpointStore
from services.execution.trainer.cost_calibration import CostCalibration
from services.execution.trainer.device_info import choose_device, describe_backbone, describe_device, used_bytes
from services.execution.trainer.microbatch_stream import MicrobatchStream
from services.execution.trainer.oom_policy import OutOfMemoryPolicy
from services.execution.trainer.step_spans import StepWindow
from services.execution.trainer.task_lifecycle import TaskLifecycle
from services.execution.trainer_pipe import BlockingPipe, Frame, Tag
from services.failpoints import failpoint, max_microbatch_tokens
from services.rpc.client_channel import open_sync_channel
from services.rpc.errors import to_failure
from services.storage.artifact_store import ArtifactStore
from services.telemetry import links_to, tracer

_RETRY_SECONDS = 1.0
_HEARTBEAT_SECONDS = 0.5
_WAIT_SECONDS = 0.2  # for a microbatch, before the inbox is read again
_BAD_DATA = (InvalidInputError, NotFoundError, ArtifactCorruptError)
_log = logging.getLogger(__name__)


class _Wake:
    """Marks in the inbox that a background call is done."""


class Trainer:
    """Runs the engine's executor until the pipe closes."""

    def __init__(self, settings: ExecutionSettings, pipe: BlockingPipe) -> None:
        self._settings, self._pipe = settings, pipe
        self._device_kind = choose_device(settings)
        dtype = getattr(torch, settings.dtype)
        unloaded_bytes = used_bytes(self._device_kind)
        backbone = Backbone.load(
            settings.backbone_folder, dtype, self._device_kind,
            activation_checkpointing=settings.activation_checkpointing, packs_weights=settings.pack_weights,
        )  # fmt: skip
        self._executor = Executor(
            backbone, graphs=CudaGraphs.of(backbone, settings.cuda_graphs), tenant_loader=load_adapter
        )
        self._footprint = measure(self._executor.backbone)
        self._process_bytes = max(unloaded_bytes, used_bytes(self._device_kind) - backbone.held_bytes())
        self._cost_calibration = CostCalibration(self._executor, settings.calibration_seconds)
        checkpoints = CheckpointStore(ArtifactStore.open(settings.artifact_url))
        self._inbox: queue.Queue[Frame | _Wake | None] = queue.Queue()
        every = settings.checkpoint_steps, settings.checkpoint_seconds
        self._lifecycle = TaskLifecycle(self._executor, checkpoints, *every, wake=partial(self._inbox.put, _Wake()))
        self._exports: deque[Future[plan_pb2.TaskFinished]] = deque()  # being uploaded
        self._channel = open_sync_channel(
            settings.alignment_address, settings.mesh_secret, settings.client_tls("alignment")
        )
        self._plan: plan_pb2.ExecutorPlan = plan_pb2.ExecutorPlan()
        self._next_plan: plan_pb2.ExecutorPlan | None = None
        self._streams: dict[int, MicrobatchStream] = {}  # by the hTask's index in the plan
        self._unfinished: list[int] = []  # indices of the hTasks that have not ended their round
        self._late: set[int] = set()  # indices of hTasks with no microbatch yet: the others' rounds continue
        self._served: set[str] = set()  # tasks of which alignment has sent a microbatch
        self._interrupted: set[str] = set()  # tasks whose stream is opened again after a delay
        self._round_members: list[str] = []
        self._described_names: list[str] | None = None
        self._step_window, self._oom_policy = StepWindow(), OutOfMemoryPolicy()
        self._is_paused = self._is_draining = False
        self._last_heartbeat = 0.0

    def run(self) -> None:
        """Runs rounds until the pipe closes."""
        threading.Thread(target=self._receive, name="pipe", daemon=True).start()
        self._send_description()
        while self._process_inbox():
            if self._is_draining and self._lifecycle.is_empty:
                self._report_drained()
            if not self._unfinished:
                self._begin_round()
            for index in list(self._unfinished):
                if index in self._unfinished:
                    self._run_microbatch(index)
            if self._late.issuperset(self._unfinished):
                self._end_round()

    def _begin_round(self) -> None:
        """Begins a round: adopts the newest plan, and opens streams anew if members came or left."""
        if self._next_plan is not None:
            self._plan, self._next_plan = self._next_plan, None
            self._close_streams()
            self._lifecycle.adopt(list(self._plan.tasks))
            planned = [task.task for task in self._plan.tasks]
            self._oom_policy.forget_all_but(planned)
            self._served.intersection_update(planned)
            self._interrupted.intersection_update(planned)
            self._report(adopted=True)
        if self._lifecycle.names != self._round_members:
            self._close_streams()
        for index, htask in enumerate(self._plan.htasks):
            names = [name for name in htask.tasks if name in self._lifecycle.names]
            if names and index not in self._streams:
                self._streams[index] = self._open_stream(htask, names)
                if not self._interrupted.isdisjoint(names):
                    self._late.add(index)
        self._unfinished, self._round_members = list(self._streams), self._lifecycle.names

    def _run_microbatch(self, index: int) -> None:
        """Runs the next microbatch of one hTask through the backbone and its tasks' optimizers."""
        self._send_heartbeat(is_idle=False)
        try:
            microbatch = self._next_microbatch(index)
        except queue.Empty:
            self._late.add(index)
            return
        except MuxtuneError as error:
            return self._handle_stream_error(index, error)
        self._late.discard(index)
        if microbatch is None:
            self._streams.pop(index).close()
            self._unfinished.remove(index)
            return
        parts, started = self._cost_calibration.parts(microbatch), time.perf_counter()
        try:
            if microbatch.num_tokens > max_microbatch_tokens():
                raise OutOfMemoryError("a test set a limit")
            results = self._executor.run(microbatch)
        except OutOfMemoryError as error:
            return self._handle_out_of_memory(index, microbatch, error)
        seconds = time.perf_counter() - started
        self._cost_calibration.add(microbatch, parts, seconds)
        self._step_window.add(microbatch, seconds, self._plan.version, self._lifecycle.trace_parents())
        for result in results:
            self._lifecycle.record(result)
        if microbatch.is_last_in_round:
            self._unfinished.remove(index)

    def _next_microbatch(self, index: int) -> Microbatch | None:
        """Returns the hTask's next microbatch. Waits a moment for it, but not for a late one while others can run."""
        may_wait = index not in self._late or self._late.issuperset(self._streams)
        started = time.perf_counter()
        try:
            microbatch = self._streams[index].next(_WAIT_SECONDS if may_wait else 0.0)
        finally:
            self._step_window.add_wait(time.perf_counter() - started)
        if microbatch is not None:
            names = {range_.task for range_ in microbatch.ranges}
            self._served |= names
            self._interrupted -= names
        return microbatch

    def _handle_out_of_memory(self, index: int, microbatch: Microbatch, error: OutOfMemoryError) -> None:
        """Restarts the hTask's round with smaller microbatches or fewer tasks. A task that does not fit alone fails."""
        _log.warning("No memory for %d tokens of hTask %d: %s", microbatch.num_tokens, index, error)
        release_cache(self._device_kind)
        self._plan.htasks[index].tasks[:] = self._restart_round(index)
        if (name := self._oom_policy.reduce_memory(self._plan, index, microbatch)) is not None:
            num_tokens, limit = microbatch.num_tokens, f"{self._device().memory_bytes} bytes of memory"
            message = f"A sequence of {num_tokens} tokens does not fit in {limit} with no other task: {error}."
            remedy = "Shorten the sequences, or reduce `rank` or `target_modules`."
            self._lifecycle.fail(name, WillNeverFitError(f"{message} {remedy}", tokens=num_tokens))

    def _end_round(self) -> None:
        """Ends the round: finishes and checkpoints the tasks that are due, and reports."""
        self._unfinished = []
        self._lifecycle.close_round()
        self._report()

    def _open_stream(self, htask: plan_pb2.HTask, names: list[str]) -> MicrobatchStream:
        request = alignment_pb2.StreamMicrobatchesRequest(
            backbone=self._settings.backbone_name,
            plan_version=self._plan.version,
            members=[self._lifecycle.member(name) for name in names],
            token_budget=self._oom_policy.token_budget(htask),
            chunk_tokens=htask.chunk_tokens,
        )
        attributes = {"muxtune.plan_version": self._plan.version, "muxtune.num_tasks": len(names)}
        cycle = propagate.extract({"traceparent": self._plan.trace_parent})
        links = links_to(pair for pair in self._lifecycle.trace_parents() if pair[0] in names)
        with tracer().start_as_current_span("open microbatches", cycle, links=links, attributes=attributes):
            delay = 0.0 if self._interrupted.isdisjoint(names) else _RETRY_SECONDS
            # alignment's spans join this trace
            return MicrobatchStream(self._channel, request, self._executor.stage, delay)

    def _handle_stream_error(self, index: int, error: MuxtuneError) -> None:
        """Restarts the hTask's round after its stream failed.

        The stream is opened again later, at the members' cursors.

        A member that alignment has never served may be the cause, so those it has served do not wait for it. Bad data
        fails its task; to find that task, members are split off until one is alone.
        """
        _log.warning("The stream of hTask %d failed: %s", index, error)
        members = self._restart_round(index)
        unserved = [name for name in members if name not in self._served]
        if isinstance(error, _BAD_DATA) and len(members) == 1:
            self._lifecycle.fail(members[0], error)
        elif isinstance(error, _BAD_DATA):
            self._split_off(index, members[1:])
        elif 0 < len(unserved) < len(members):
            self._split_off(index, unserved)
            self._interrupted.update(unserved)
        else:
            self._interrupted.update(members)

    def _restart_round(self, index: int) -> list[str]:
        """Restarts the hTask's round: discards what its microbatches have accumulated. Returns its members."""
        self._streams.pop(index).close()
        self._unfinished.remove(index)
        self._late.discard(index)
        members = [name for name in self._plan.htasks[index].tasks if name in self._lifecycle.names]
        for name in members:
            self._executor.tasks[name].restart_step()
        return members

    def _split_off(self, index: int, names: list[str]) -> None:
        """Makes each of the tasks an hTask of its own, at the end of the plan."""
        htask = self._plan.htasks[index]
        for name in names:
            htask.tasks.remove(name)
            self._plan.htasks.add(tasks=[name], token_budget=htask.token_budget, chunk_tokens=htask.chunk_tokens)

    def _close_streams(self) -> None:
        """Closes all streams and discards the steps in flight."""
        for stream in self._streams.values():
            stream.close()
        self._streams, self._unfinished = {}, []
        self._late.clear()
        for name in self._lifecycle.names:
            self._executor.tasks[name].restart_step()

    def _report(self, adopted: bool = False) -> None:
        results = self._lifecycle.pop_results()
        if results or adopted:
            response = execution_pb2.RunPlanResponse(
                plan_version=self._plan.version, adopted=adopted, results=results, device=self._device()
            )
            failpoint("report.before")
            self._pipe.write(Tag.RESULTS, response)
            failpoint("report.after")
        if adopted or self._described_names != self._lifecycle.names:
            self._send_description()

    def _send_description(self) -> None:
        backbone, self._described_names = self._executor.backbone, self._lifecycle.names
        self._pipe.write(
            Tag.DESCRIBED,
            execution_pb2.DescribeExecutorResponse(
                executor=plan_pb2.Executor(
                    name=self._settings.resource_name,
                    backbone=describe_backbone(self._settings, backbone, self._footprint, self._process_bytes),
                    device=self._device(),
                ),
                tasks=self._described_names,
                backbone_bytes=backbone.held_bytes(),
                task_bytes=self._executor.task_bytes(),
            ),
        )

    def _device(self) -> plan_pb2.Device:
        device = describe_device(self._settings, self._device_kind)
        device.effective_tokens_per_second = self._step_window.tokens_per_second
        device.data_wait_fraction = self._step_window.wait_fraction
        device.cost.CopyFrom(cost_to_proto(self._cost_calibration.profile))
        return device

    def _process_inbox(self) -> bool:
        """Handles the server's messages and completed background calls; waits for them while there is nothing to run.
        Returns False when the server is gone."""
        while True:
            has_work = bool(self._lifecycle.names or self._next_plan) and not self._is_paused
            is_drained = self._is_draining and self._lifecycle.is_empty
            is_idle = not (has_work or self._unfinished or is_drained)
            if is_idle:
                self._step_window.close()
            self._send_heartbeat(is_idle)
            try:
                frame = self._inbox.get(is_idle, self._lifecycle.seconds_to_retry())
            except queue.Empty:
                return True
            if frame is None:
                return False
            if isinstance(frame, _Wake):
                self._advance_tasks()
            else:
                self._handle_frame(*frame)

    def _advance_tasks(self) -> None:
        """Advances the tasks after a background call is done."""
        self._lifecycle.advance()
        self._answer_exports()
        self._report()

    def _send_heartbeat(self, is_idle: bool) -> None:
        """Sends a heartbeat for the server's watchdog."""
        if is_idle or time.monotonic() - self._last_heartbeat >= _HEARTBEAT_SECONDS:
            self._last_heartbeat = time.monotonic()
            with suppress(BrokenPipeError, ConnectionResetError):  # the server is gone, which the inbox reports next
                self._pipe.write(Tag.IDLE if is_idle else Tag.ALIVE)

    def _handle_frame(self, tag: Tag, payload: bytes) -> None:
        if tag is Tag.PLAN:
            plan = plan_pb2.ExecutorPlan.FromString(payload)
            if plan.version > max(self._plan.version, self._next_plan.version if self._next_plan else 0):
                self._next_plan = plan
        elif tag is Tag.STALE:
            self._lifecycle.drop(list(execution_pb2.RunPlanRequest.FromString(payload).stale_tasks))
        elif tag is Tag.LEASE_LOST:
            self._lifecycle.drop(self._lifecycle.all_names)
            self._close_streams()
            self._plan, self._next_plan = plan_pb2.ExecutorPlan(), None
        elif tag is Tag.EXPORT:
            self._export(execution_pb2.ExportAdapterRequest.FromString(payload).task)
        elif tag is Tag.DRAIN:
            self._drain()
        elif tag in (Tag.PAUSE, Tag.RESUME):
            self._is_paused = tag is Tag.PAUSE

    def _export(self, name: str) -> None:
        try:
            if name not in self._lifecycle.names:
                raise NotFoundError(f"{name} is not resident on this executor")
            exported = self._lifecycle.export(name)
        except MuxtuneError as error:
            exported = Future()
            exported.set_exception(error)
        self._exports.append(exported)
        self._answer_exports()

    def _answer_exports(self) -> None:
        """Answers completed exports, in the order of their requests."""
        while self._exports and self._exports[0].done():
            try:
                self._pipe.write(Tag.EXPORTED, _exported_response(self._exports.popleft().result()))
            except MuxtuneError as error:
                self._pipe.write(Tag.EXPORT_FAILED, to_failure(error))

    def _drain(self) -> None:
        self._is_draining, self._is_paused = True, False
        self._close_streams()
        self._plan, self._next_plan = plan_pb2.ExecutorPlan(), None
        for name in self._lifecycle.all_names:
            self._lifecycle.release(name, "its executor is draining")

    def _report_drained(self) -> None:
        """Reports that every released task is in the store."""
        self._report()
        self._pipe.write(Tag.DRAINED)
        self._step_window.close()
        self._is_draining = False

    def _receive(self) -> None:
        while (frame := self._pipe.read()) is not None:
            self._inbox.put(frame)
        self._inbox.put(None)


def _exported_response(finished: plan_pb2.TaskFinished) -> execution_pb2.ExportAdapterResponse:
    """Returns the response of ExportAdapter."""
    return execution_pb2.ExportAdapterResponse(
        step=finished.step,
        adapter_key=finished.adapter_key,
        max_logit_difference=finished.max_logit_difference,
    )
