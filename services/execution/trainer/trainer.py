"""The trainer's loop: adopts the newest plan, gives the next turn to the tenants that had least time, reports.

A turn is one microbatch, or attaching or exporting one task: whatever runs, a plan is adopted within one turn.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial

import torch
from opentelemetry import propagate

from engine.alignment.microbatch import Microbatch
from engine.errors import ArtifactCorruptError, InvalidInputError, MuxtuneError, NotFoundError, WillNeverFitError
from engine.planning.device_time import DeviceTime
from engine.runtime.backbone import Backbone
from engine.runtime.cuda_graphs import CudaGraphs
from engine.runtime.executor import Executor
from engine.runtime.footprint import measure
from engine.runtime.out_of_memory import OutOfMemoryError, release_cache
from muxtune.adapters import load_adapter
from muxtune.v1 import alignment_pb2, execution_pb2, plan_pb2
from services.conversion.plan import cost_to_proto
from services.conversion.plan_parts import PlanParts
from services.conversion.results import exported_to_proto
from services.execution.settings import ExecutionSettings
from services.execution.trainer.checkpoint_store import CheckpointStore
from services.execution.trainer.cost_calibration import CostCalibration
from services.execution.trainer.device_info import choose_device, describe_backbone, describe_device, used_bytes
from services.execution.trainer.htask_streams import HTaskStreams
from services.execution.trainer.microbatch_stream import MicrobatchStream
from services.execution.trainer.oom_policy import OutOfMemoryPolicy
from services.execution.trainer.plan_edits import keep_only, split_off
from services.execution.trainer.step_spans import StepWindow
from services.execution.trainer.task_lifecycle import TaskLifecycle
from services.execution.trainer_pipe import BlockingPipe, Frame, Tag
from services.failpoints import failpoint, max_microbatch_tokens
from services.resource_names import tenant_of
from services.rpc.client_channel import open_sync_channel
from services.rpc.errors import to_failure
from services.rpc.rate_limit import RateLimit
from services.storage.artifact_store import ArtifactStore
from services.storage.scratch_folder import ScratchFolder
from services.telemetry import links_to, tracer

_RETRY_SECONDS = 1.0
_HEARTBEAT_SECONDS = 0.5
_PROGRESS_SECONDS = 5.0  # of a step before its device time is reported, and between two reports
_PLANS_PER_SECOND = 2.0  # adopted while tasks train, and in a burst those of two seconds
_MAX_ADVANCE_WAIT_SECONDS = 1.0  # before a task is attached or exported although its tenant has had more than others
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
        self._backbone_description = describe_backbone(settings, backbone, self._footprint, self._process_bytes)
        self._cost_calibration = CostCalibration(self._executor, settings.calibration_seconds)
        checkpoints = CheckpointStore(
            ArtifactStore.open(settings.artifact_url), ScratchFolder.open(settings.scratch, "trainer")
        )
        self._inbox: queue.Queue[Frame | _Wake | None] = queue.Queue()
        every = settings.checkpoint_steps, settings.checkpoint_seconds
        self._lifecycle = TaskLifecycle(self._executor, checkpoints, *every, wake=partial(self._inbox.put, _Wake()))
        self._exports: deque[Future[plan_pb2.TaskFinished]] = deque()  # being uploaded
        self._channel = open_sync_channel(
            settings.alignment_address, settings.mesh_secret, settings.client_tls("alignment")
        )
        self._streams = HTaskStreams(self._open_stream)
        self._next_plan: plan_pb2.ExecutorPlan | None = None
        self._plan_parts = PlanParts()
        self._device_time = DeviceTime()
        self._weighted_names: list[str] = []
        self._described_names: list[str] | None = None
        self._step_window, self._oom_policy = StepWindow(), OutOfMemoryPolicy()
        self._is_paused = self._is_draining = False
        self._last_heartbeat = self._last_advance = self._last_progress = 0.0
        self._plan_rate = RateLimit(_PLANS_PER_SECOND)

    def run(self) -> None:
        """Gives turns to the tenants' tasks until the pipe closes."""
        threading.Thread(target=self._receive, name="pipe", daemon=True).start()
        self._send_description()
        while self._process_inbox():
            if self._is_draining and self._lifecycle.is_empty:
                self._report_drained()
            self._adopt_plan()
            self._streams.open_for(self._lifecycle.names, self._device_time.hold)
            self._take_turn()
            self._report_results()

    def _adopt_plan(self) -> None:
        """Adopts the newest plan, between two microbatches. Steps that it does not end go on where they were.

        Of many plans that follow each other quickly, two a second are adopted: tasks that come and go do not interrupt
        others all the time.
        """
        if self._next_plan is not None and (not self._lifecycle.names or self._plan_rate.try_acquire("plan")):
            plan, self._next_plan = self._next_plan, None
            self._lifecycle.adopt(list(plan.tasks))
            self._oom_policy.forget_all_but([task.task for task in plan.tasks])
            self._streams.adopt(plan)
            self._weighted_names = []
            self._report(adopted=True)
        if (names := self._lifecycle.all_names) != self._weighted_names:
            self._weighted_names, weights = names, self._streams.plan.tenant_weights
            self._device_time.set_weights({tenant_of(name): weights.get(tenant_of(name), 1.0) for name in names})

    def _take_turn(self) -> None:
        """Gives the device to the tenants that had least of it: to run a microbatch, or to attach or export a task."""
        index = None
        if not self._is_paused:
            index = self._streams.choose(self._device_time.charged)
        name = self._lifecycle.next_ready(lambda task: self._device_time.charged([tenant_of(task)]))
        if name is not None and self._goes_first(tenant_of(name), index):
            with self._charged_to([tenant_of(name)]):
                self._lifecycle.advance(name)
            self._answer_exports()
            self._last_advance = time.monotonic()
        elif index is not None:
            self._run_microbatch(index)

    def _goes_first(self, tenant: str, index: int | None) -> bool:
        """Returns whether the tenant may attach or export a task before the hTask at `index` runs.

        An hTask that it shares may keep others behind it, so once a second it may do so in any case.
        """
        if index is None or time.monotonic() - self._last_advance > _MAX_ADVANCE_WAIT_SECONDS:
            return True
        others = self._streams.tenants(index)
        return self._device_time.charged([tenant]) <= self._device_time.charged(others)

    @contextmanager
    def _charged_to(self, tenants: Sequence[str]) -> Iterator[None]:
        """Charges the time of this context to the tenants, in equal parts."""
        self._device_time.begin_turn(tenants)
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            for tenant in tenants:
                self._device_time.charge(tenant, seconds / len(tenants))

    def _run_microbatch(self, index: int) -> None:
        """Runs the next microbatch of one hTask through the backbone and its tasks' optimizers."""
        self._send_heartbeat(is_idle=False)
        try:
            microbatch = self._next_microbatch(index)
        except queue.Empty:
            return
        except MuxtuneError as error:
            return self._handle_stream_error(index, error)
        if microbatch is None:
            self._streams.close(index)
            return
        if names := self._executor.unexpected(microbatch):
            return self._handle_unexpected_data(index, names)
        parts, started = self._cost_calibration.parts(microbatch), time.perf_counter()
        try:
            if microbatch.num_tokens > max_microbatch_tokens():
                raise OutOfMemoryError("a test set a limit")
            results = self._executor.run(microbatch)
        except OutOfMemoryError as error:
            return self._handle_out_of_memory(index, microbatch, error)
        seconds = time.perf_counter() - started
        for range_ in microbatch.ranges:
            self._device_time.charge(tenant_of(range_.task), seconds * range_.num_tokens / microbatch.num_tokens)
        self._cost_calibration.add(microbatch, parts, seconds)
        self._step_window.add(microbatch, seconds, self._streams.plan.version, self._lifecycle.trace_parents())
        for result in results:
            self._lifecycle.record(result)

    def _next_microbatch(self, index: int) -> Microbatch | None:
        """Returns the hTask's next microbatch. The device is kept for its tenants meanwhile."""
        started = time.perf_counter()
        try:
            with self._charged_to(self._streams.tenants(index)):
                return self._streams.next(index)
        finally:
            self._step_window.add_wait(time.perf_counter() - started)

    def _handle_unexpected_data(self, index: int, names: Sequence[str]) -> None:
        """Begins the steps of these tasks again: alignment, an older version perhaps, did not go on where they were."""
        _log.warning("Alignment repeated or left out data of %s: their steps begin again.", ", ".join(names))
        self._streams.interrupt(index)
        for name in names:
            self._executor.tasks[name].restart_step()

    def _handle_out_of_memory(self, index: int, microbatch: Microbatch, error: OutOfMemoryError) -> None:
        """Begins the steps in the hTask again with smaller microbatches or fewer tasks. A task that does not fit alone
        fails."""
        _log.warning("No memory for %d tokens of hTask %d: %s", microbatch.num_tokens, index, error)
        release_cache(self._device_kind)
        members = self._streams.close(index)
        for name in members:
            self._executor.tasks[name].restart_step()
        plan = self._streams.plan
        keep_only(plan.htasks[index], members)
        failed = self._oom_policy.reduce_memory(plan, index, microbatch)
        if failed is not None:
            num_tokens, limit = microbatch.num_tokens, f"{self._device().memory_bytes} bytes of memory"
            message = f"A sequence of {num_tokens} tokens does not fit in {limit} with no other task: {error}."
            remedy = "Shorten the sequences, or reduce `rank` or `target_modules`."
            self._lifecycle.fail(failed, WillNeverFitError(f"{message} {remedy}", tokens=num_tokens))

    def _open_stream(self, htask: plan_pb2.HTask, names: list[str], is_delayed: bool) -> MicrobatchStream:
        version = self._streams.plan.version
        round_tokens = dict(zip(htask.tasks, htask.round_tokens, strict=False))
        request = alignment_pb2.StreamMicrobatchesRequest(
            backbone=self._settings.backbone_name,
            plan_version=version,
            members=[self._lifecycle.member(name, round_tokens.get(name, 0)) for name in names],
            token_budget=self._oom_policy.token_budget(htask),
            chunk_tokens=htask.chunk_tokens,
        )
        attributes = {"muxtune.plan_version": version, "muxtune.num_tasks": len(names)}
        cycle = propagate.extract({"traceparent": self._streams.plan.trace_parent})
        links = links_to(pair for pair in self._lifecycle.trace_parents() if pair[0] in names)
        with tracer().start_as_current_span("open microbatches", cycle, links=links, attributes=attributes):
            # alignment's spans join this trace
            delay = _RETRY_SECONDS if is_delayed else 0.0
            return MicrobatchStream(self._channel, request, self._executor.stage, delay)

    def _handle_stream_error(self, index: int, error: MuxtuneError) -> None:
        """Opens the stream again later, at its members' positions.

        Bad data fails its task; to find that task, members are split off until one is alone.
        """
        _log.warning("The stream of hTask %d failed: %s", index, error)
        members = self._streams.members(index)
        if not isinstance(error, _BAD_DATA):
            self._streams.interrupt(index)
        elif len(members) == 1:
            self._streams.close(index)
            self._lifecycle.fail(members[0], error)
        else:
            self._streams.close(index)
            split_off(self._streams.plan, index, members[1:])

    def _report_results(self) -> None:
        """Reports results, and every few seconds the work on steps that take longer."""
        if time.monotonic() - self._last_progress >= _PROGRESS_SECONDS:
            self._last_progress = time.monotonic()
            self._lifecycle.report_work_in_progress(_PROGRESS_SECONDS)
        self._report()

    def _report(self, adopted: bool = False) -> None:
        results = self._lifecycle.pop_results()
        if results or adopted:
            response = execution_pb2.RunPlanResponse(
                plan_version=self._streams.plan.version, adopted=adopted, results=results, device=self._device()
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
                    backbone=self._backbone_description,
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
            is_idle = not (has_work or is_drained or self._lifecycle.next_ready())
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
                self._answer_exports()
            else:
                self._handle_frame(*frame)

    def _send_heartbeat(self, is_idle: bool) -> None:
        """Sends a heartbeat for the server's watchdog."""
        if is_idle or time.monotonic() - self._last_heartbeat >= _HEARTBEAT_SECONDS:
            self._last_heartbeat = time.monotonic()
            with suppress(BrokenPipeError, ConnectionResetError):  # the server is gone, which the inbox reports next
                self._pipe.write(Tag.IDLE if is_idle else Tag.ALIVE)

    def _handle_frame(self, tag: Tag, payload: bytes) -> None:
        if tag is Tag.PLAN_PART:
            self._plan_parts.add(plan_pb2.ExecutorPlan.FromString(payload))
        elif tag is Tag.PLAN:
            plan = self._plan_parts.finish(plan_pb2.ExecutorPlan.FromString(payload))
            newest = self._next_plan or self._streams.plan
            if plan.version > newest.version:
                self._next_plan = plan
        elif tag is Tag.STALE:
            self._lifecycle.drop(list(execution_pb2.RunPlanRequest.FromString(payload).stale_tasks))
        elif tag is Tag.LEASE_LOST:
            self._lifecycle.drop(self._lifecycle.all_names)
            self._streams.close_all()
            self._next_plan = None
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
                self._pipe.write(Tag.EXPORTED, exported_to_proto(self._exports.popleft().result()))
            except MuxtuneError as error:
                self._pipe.write(Tag.EXPORT_FAILED, to_failure(error))

    def _drain(self) -> None:
        self._is_draining, self._is_paused = True, False
        self._streams.close_all()
        self._next_plan = None
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
