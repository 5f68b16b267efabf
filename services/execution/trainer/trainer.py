"""The trainer's loop: adopts the newest plan between rounds, runs one microbatch of each hTask in turn, reports the
round."""

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
from services.execution.trainer.task_lifecycle import TaskLifecycle, exported_response
from services.execution.trainer_pipe import BlockingPipe, Frame, Tag
from services.failpoints import failpoint, max_microbatch_tokens
from services.rpc.client_channel import open_sync_channel
from services.rpc.errors import to_failure
from services.storage.artifact_store import ArtifactStore
from services.telemetry import links_to, tracer

_RETRY_SECONDS = 1.0
_SIGN_SECONDS = 0.5
_WAIT_SECONDS = 0.2  # for a microbatch, before the pipe is heard again
_BAD_DATA = (InvalidInputError, NotFoundError, ArtifactCorruptError)
_log = logging.getLogger(__name__)


class _Wake:
    """In the inbox: something is done at the store."""


class Trainer:
    """Owns the engine's executor. Runs until its pipe closes."""

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
        self._costs = CostCalibration(self._executor, settings.calibration_seconds)
        vault = CheckpointStore(ArtifactStore.open(settings.artifact_url))
        self._inbox: queue.Queue[Frame | _Wake | None] = queue.Queue()
        every = settings.checkpoint_steps, settings.checkpoint_seconds
        self._residents = TaskLifecycle(self._executor, vault, *every, wake=partial(self._inbox.put, _Wake()))
        self._exports: deque[Future[plan_pb2.TaskFinished]] = deque()  # on their way to the store
        self._channel = open_sync_channel(
            settings.alignment_address, settings.mesh_secret, settings.client_tls("alignment")
        )
        self._plan: plan_pb2.ExecutorPlan = plan_pb2.ExecutorPlan()
        self._next_plan: plan_pb2.ExecutorPlan | None = None
        self._streams: dict[int, MicrobatchStream] = {}  # by index of the hTask in the plan
        self._unfinished: list[int] = []  # hTasks whose round is not over
        self._late: set[int] = set()  # hTasks whose microbatches are waited for: the others' rounds go on
        self._served: set[str] = set()  # tasks whose data alignment is known to have
        self._interrupted: set[str] = set()  # tasks whose stream is opened again, not at once
        self._round_members: list[str] = []
        self._described: list[str] | None = None
        self._window, self._shortage = StepWindow(), OutOfMemoryPolicy()
        self._is_held = self._is_draining = False
        self._last_sign = 0.0

    def run(self) -> None:
        """The trainer's life: until the pipe closes."""
        threading.Thread(target=self._receive, name="pipe", daemon=True).start()
        self._describe()
        while self._listen():
            if self._is_draining and self._residents.is_empty:
                self._drained()
            if not self._unfinished:
                self._begin_round()
            for index in list(self._unfinished):
                if index in self._unfinished:
                    self._run_microbatch(index)
            if self._late.issuperset(self._unfinished):
                self._end_round()

    def _begin_round(self) -> None:
        """A round's boundary: the newest plan is adopted; streams are opened anew where members came or left."""
        if self._next_plan is not None:
            self._plan, self._next_plan = self._next_plan, None
            self._close_streams()
            self._residents.adopt(list(self._plan.tasks))
            held = [task.task for task in self._plan.tasks]
            self._shortage.forget_all_but(held)
            self._served.intersection_update(held)
            self._interrupted.intersection_update(held)
            self._report(adopted=True)
        if self._residents.names != self._round_members:
            self._close_streams()
        for index, htask in enumerate(self._plan.htasks):
            names = [name for name in htask.tasks if name in self._residents.names]
            if names and index not in self._streams:
                self._streams[index] = self._open_stream(htask, names)
                if not self._interrupted.isdisjoint(names):
                    self._late.add(index)
        self._unfinished, self._round_members = list(self._streams), self._residents.names

    def _run_microbatch(self, index: int) -> None:
        """One microbatch of one hTask, from alignment through the backbone to its tasks' optimizers."""
        self._send_heartbeat(is_idle=False)
        try:
            microbatch = self._next_microbatch(index)
        except queue.Empty:
            self._late.add(index)
            return
        except MuxtuneError as error:
            return self._stream_broke(index, error)
        self._late.discard(index)
        if microbatch is None:
            self._streams.pop(index).close()
            self._unfinished.remove(index)
            return
        parts, started = self._costs.parts(microbatch), time.perf_counter()
        try:
            if microbatch.num_tokens > max_microbatch_tokens():
                raise OutOfMemoryError("said by a test")
            results = self._executor.run(microbatch)
        except OutOfMemoryError as error:
            return self._found_no_memory(index, microbatch, str(error))
        seconds = time.perf_counter() - started
        self._costs.add(microbatch, parts, seconds)
        self._window.add(microbatch, seconds, self._plan.version, self._residents.trace_parents())
        for result in results:
            self._residents.record(result)
        if microbatch.is_last_in_round:
            self._unfinished.remove(index)

    def _next_microbatch(self, index: int) -> Microbatch | None:
        """Waits a moment for it, unless it is late: then only where there is nothing else to run."""
        is_waited_for = index not in self._late or self._late.issuperset(self._streams)
        started = time.perf_counter()
        try:
            microbatch = self._streams[index].next(_WAIT_SECONDS if is_waited_for else 0.0)
        finally:
            self._window.add_wait(time.perf_counter() - started)
        if microbatch is not None:
            names = {range_.task for range_ in microbatch.ranges}
            self._served |= names
            self._interrupted -= names
        return microbatch

    def _found_no_memory(self, index: int, microbatch: Microbatch, shortage: str) -> None:
        """The round begins again with less at once; a task that finds no memory alone fails."""
        _log.warning("no memory for %d tokens of htask %d: %s", microbatch.num_tokens, index, shortage)
        release_cache(self._device_kind)
        self._plan.htasks[index].tasks[:] = self._begin_again(index)
        if (name := self._shortage.relieve(self._plan, index, microbatch)) is not None:
            longest, limit = microbatch.num_tokens, self._device().memory_bytes
            why = f"a sequence of it, {longest} tokens, finds no memory even alone on {limit} bytes: {shortage}"
            self._residents.fail(
                name, WillNeverFitError(f"{why}; shorten its sequences, or adapt less", tokens=longest)
            )

    def _end_round(self) -> None:
        """Finishes and checkpoints what is due, reports."""
        self._unfinished = []
        self._residents.close_round()
        self._report()

    def _open_stream(self, htask: plan_pb2.HTask, names: list[str]) -> MicrobatchStream:
        request = alignment_pb2.StreamMicrobatchesRequest(
            backbone=self._settings.backbone_name,
            plan_version=self._plan.version,
            members=[self._residents.member(name) for name in names],
            token_budget=self._shortage.token_budget(htask),
            chunk_tokens=htask.chunk_tokens,
        )
        attributes = {"muxtune.plan_version": self._plan.version, "muxtune.num_tasks": len(names)}
        cycle = propagate.extract({"traceparent": self._plan.trace_parent})
        links = links_to(pair for pair in self._residents.trace_parents() if pair[0] in names)
        with tracer().start_as_current_span("open microbatches", cycle, links=links, attributes=attributes):
            delay = 0.0 if self._interrupted.isdisjoint(names) else _RETRY_SECONDS
            # alignment's side joins this trace
            return MicrobatchStream(self._channel, request, self._executor.stage, delay)

    def _stream_broke(self, index: int, error: MuxtuneError) -> None:
        """Alignment is away: it is opened again at the members' cursors, later. Data that is wrong fails its tasks.

        Who was never served may be why: those who were do not wait for it. Nor can members whose data is wrong be told
        from others, but alone.
        """
        _log.warning("microbatches of htask %d broke off: %s", index, error)
        members = self._begin_again(index)
        newcomers = [name for name in members if name not in self._served]
        if isinstance(error, _BAD_DATA) and len(members) == 1:
            self._residents.fail(members[0], error)
        elif isinstance(error, _BAD_DATA):
            self._set_apart(index, members[1:])
        elif 0 < len(newcomers) < len(members):
            self._set_apart(index, newcomers)
            self._interrupted.update(newcomers)
        else:
            self._interrupted.update(members)

    def _begin_again(self, index: int) -> list[str]:
        """Ends the hTask's round: what it had gathered for its members is gathered anew. Answers those."""
        self._streams.pop(index).close()
        self._unfinished.remove(index)
        self._late.discard(index)
        members = [name for name in self._plan.htasks[index].tasks if name in self._residents.names]
        for name in members:
            self._executor.tasks[name].restart_step()
        return members

    def _set_apart(self, index: int, names: list[str]) -> None:
        """Each of them becomes an hTask of its own, at the plan's end."""
        htask = self._plan.htasks[index]
        for name in names:
            htask.tasks.remove(name)
            self._plan.htasks.add(tasks=[name], token_budget=htask.token_budget, chunk_tokens=htask.chunk_tokens)

    def _close_streams(self) -> None:
        """What is in flight is begun again."""
        for stream in self._streams.values():
            stream.close()
        self._streams, self._unfinished = {}, []
        self._late.clear()
        for name in self._residents.names:
            self._executor.tasks[name].restart_step()

    def _report(self, adopted: bool = False) -> None:
        results = self._residents.take_results()
        if results or adopted:
            response = execution_pb2.RunPlanResponse(
                plan_version=self._plan.version, adopted=adopted, results=results, device=self._device()
            )
            failpoint("report.before")
            self._pipe.write(Tag.RESULTS, response)
            failpoint("report.after")
        if adopted or self._described != self._residents.names:
            self._describe()

    def _describe(self) -> None:
        backbone, self._described = self._executor.backbone, self._residents.names
        self._pipe.write(
            Tag.DESCRIBED,
            execution_pb2.DescribeExecutorResponse(
                executor=plan_pb2.Executor(
                    name=self._settings.resource_name,
                    backbone=describe_backbone(self._settings, backbone, self._footprint, self._process_bytes),
                    device=self._device(),
                ),
                tasks=self._described,
                backbone_bytes=backbone.held_bytes(),
                task_bytes=self._executor.task_bytes(),
            ),
        )

    def _device(self) -> plan_pb2.Device:
        device = describe_device(self._settings, self._device_kind)
        device.effective_tokens_per_second = self._window.tokens_per_second
        device.data_wait_fraction = self._window.wait_fraction
        device.cost.CopyFrom(cost_to_proto(self._costs.profile))
        return device

    def _listen(self) -> bool:
        """Takes what the server says and what the store has done; waits for them while there is nothing to run. False:
        the server is gone."""
        while True:
            has_work = bool(self._residents.names or self._next_plan) and not self._is_held
            is_drained = self._is_draining and self._residents.is_empty
            is_idle = not (has_work or self._unfinished or is_drained)
            if is_idle:
                self._window.close()
            self._send_heartbeat(is_idle)
            try:
                frame = self._inbox.get(is_idle, self._residents.seconds_to_retry())
            except queue.Empty:
                return True
            if frame is None:
                return False
            if isinstance(frame, _Wake):
                self._settle()
            else:
                self._handle(*frame)

    def _settle(self) -> None:
        """Something came back from the store."""
        self._residents.settle()
        self._answer_exports()
        self._report()

    def _send_heartbeat(self, is_idle: bool) -> None:
        """Of life, for the server's watchdog."""
        if is_idle or time.monotonic() - self._last_sign >= _SIGN_SECONDS:
            self._last_sign = time.monotonic()
            with suppress(BrokenPipeError, ConnectionResetError):  # the server is gone: the inbox says so next
                self._pipe.write(Tag.IDLE if is_idle else Tag.ALIVE)

    def _handle(self, tag: Tag, payload: bytes) -> None:
        if tag is Tag.PLAN:
            plan = plan_pb2.ExecutorPlan.FromString(payload)
            if plan.version > max(self._plan.version, self._next_plan.version if self._next_plan else 0):
                self._next_plan = plan
        elif tag is Tag.STALE:
            self._residents.drop(list(execution_pb2.RunPlanRequest.FromString(payload).stale_tasks))
        elif tag is Tag.LEASE_LOST:
            self._residents.drop(self._residents.held)
            self._close_streams()
            self._plan, self._next_plan = plan_pb2.ExecutorPlan(), None
        elif tag is Tag.EXPORT:
            self._export(execution_pb2.ExportAdapterRequest.FromString(payload).task)
        elif tag is Tag.DRAIN:
            self._drain()
        elif tag in (Tag.HOLD, Tag.GO):
            self._is_held = tag is Tag.HOLD

    def _export(self, name: str) -> None:
        try:
            if name not in self._residents.names:
                raise NotFoundError(f"{name} is not resident on this executor")
            exported = self._residents.export(name)
        except MuxtuneError as error:
            exported = Future()
            exported.set_exception(error)
        self._exports.append(exported)
        self._answer_exports()

    def _answer_exports(self) -> None:
        """In the order in which they were asked for."""
        while self._exports and self._exports[0].done():
            try:
                self._pipe.write(Tag.EXPORTED, exported_response(self._exports.popleft().result()))
            except MuxtuneError as error:
                self._pipe.write(Tag.EXPORT_FAILED, to_failure(error))

    def _drain(self) -> None:
        self._is_draining, self._is_held = True, False
        self._close_streams()
        self._plan, self._next_plan = plan_pb2.ExecutorPlan(), None
        for name in self._residents.held:
            self._residents.release(name, "its executor drains")

    def _drained(self) -> None:
        """The store has what was handed back."""
        self._report()
        self._pipe.write(Tag.DRAINED)
        self._window.close()
        self._is_draining = False

    def _receive(self) -> None:
        while (frame := self._pipe.read()) is not None:
            self._inbox.put(frame)
        self._inbox.put(None)
