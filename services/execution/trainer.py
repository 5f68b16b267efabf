"""The training process: `python -m services.execution.trainer FD`, started by the executor's server.

One loop: adopt the newest plan at a round's boundary, run a microbatch of each hTask in turn, report the round.
"""

import faulthandler
import logging
import os
import queue
import signal
import sys
import threading
import time
from contextlib import suppress

import torch
from opentelemetry import propagate
from transformers.utils.logging import disable_progress_bar

from engine.alignment.microbatch import Microbatch
from engine.errors import ArtifactCorruptError, InvalidInputError, MuxtuneError, NotFoundError, WillNeverFitError
from engine.runtime.backbone import Backbone
from engine.runtime.executor import Executor
from engine.runtime.footprint import measure
from engine.runtime.out_of_memory import NoMemory, release_cache
from muxtune.v1 import alignment_pb2, execution_pb2, plan_pb2
from services.artifacts import ArtifactStore
from services.config import from_environment
from services.errors import to_failure
from services.execution.costs import Costs
from services.execution.device import choose_device, describe_backbone, describe_device, used_bytes
from services.execution.microbatches import MicrobatchStream
from services.execution.pipe import BlockingPipe, Frame, Tag
from services.execution.residents import Residents, exported_response
from services.execution.settings import ExecutionSettings
from services.execution.shortage import Shortage
from services.execution.vault import Vault
from services.execution.window import StepWindow
from services.failpoints import failpoint, tokens_allowed
from services.mesh import open_sync_channel
from services.plan_convert import cost_to_proto
from services.telemetry import configure, links_to, tracer

_RETRY_SECONDS = 1.0
_SIGN_SECONDS = 0.5
_WAIT_SECONDS = 0.2  # for a microbatch, before the pipe is heard again
_BAD_DATA = (InvalidInputError, NotFoundError, ArtifactCorruptError)
_log = logging.getLogger(__name__)


class Trainer:
    """Owns the engine's executor. Runs until its pipe closes."""

    def __init__(self, settings: ExecutionSettings, pipe: BlockingPipe) -> None:
        self._settings, self._pipe = settings, pipe
        self._device_kind = choose_device(settings)
        dtype = getattr(torch, settings.dtype)
        unloaded_bytes = used_bytes(self._device_kind)
        checkpoints = settings.activation_checkpointing
        self._executor = Executor(
            Backbone.load(settings.backbone_folder, dtype, self._device_kind, activation_checkpointing=checkpoints)
        )
        self._footprint = measure(self._executor.backbone)
        weight_bytes = self._executor.backbone.weight_bytes()
        self._process_bytes = max(unloaded_bytes, used_bytes(self._device_kind) - weight_bytes)
        self._costs = Costs(self._executor, settings.calibration_seconds)
        vault = Vault(ArtifactStore.open(settings.artifact_url))
        self._residents = Residents(self._executor, vault, settings.checkpoint_steps, settings.checkpoint_seconds)
        self._channel = open_sync_channel(settings.alignment_address, settings.mesh_secret, settings.trust("alignment"))
        self._inbox: queue.Queue[Frame | None] = queue.Queue()
        self._plan: plan_pb2.ExecutorPlan = plan_pb2.ExecutorPlan()
        self._next_plan: plan_pb2.ExecutorPlan | None = None
        self._streams: dict[int, MicrobatchStream] = {}  # by index of the hTask in the plan
        self._unfinished: list[int] = []  # hTasks whose round is not over
        self._round_members: list[str] = []
        self._window, self._shortage = StepWindow(), Shortage()
        self._is_held = self._is_draining = False
        self._last_sign = 0.0

    def run(self) -> None:
        """The trainer's life: until the pipe closes."""
        threading.Thread(target=self._receive, name="pipe", daemon=True).start()
        self._describe()
        while self._listen():
            if self._is_draining:
                self._drain()
                continue
            if not self._unfinished:
                self._begin_round()
            for index in list(self._unfinished):
                if index in self._unfinished:
                    self._run_microbatch(index)
            if not self._unfinished:
                self._end_round()

    def _begin_round(self) -> None:
        """A round's boundary: the newest plan is adopted, and streams are opened where the members changed."""
        if self._next_plan is not None:
            self._plan, self._next_plan = self._next_plan, None
            self._close_streams()
            self._residents.adopt(list(self._plan.tasks))
            self._shortage.forget_all_but(self._residents.names)
            self._report(adopted=True)
        for index, htask in enumerate(self._plan.htasks):
            names = [name for name in htask.tasks if name in self._residents.names]
            if names and index not in self._streams:
                self._streams[index] = self._open_stream(htask, names)
        self._unfinished, self._round_members = list(self._streams), self._residents.names

    def _run_microbatch(self, index: int) -> None:
        """One microbatch of one hTask, from alignment through the backbone to its tasks' optimizers."""
        self._give_sign(is_idle=False)
        try:
            microbatch = self._streams[index].next(_WAIT_SECONDS)
        except queue.Empty:
            return
        except MuxtuneError as error:
            return self._stream_broke(index, error)
        if microbatch is None:
            self._streams.pop(index).close()
            self._unfinished.remove(index)
            return
        parts, started = self._costs.parts(microbatch), time.perf_counter()
        try:
            if microbatch.num_tokens > tokens_allowed():
                raise NoMemory("said by a test")
            results = self._executor.run(microbatch)
        except NoMemory as error:
            return self._found_no_memory(index, microbatch, str(error))
        seconds = time.perf_counter() - started
        self._costs.add(microbatch, parts, seconds)
        self._window.add(microbatch, seconds, self._plan.version, self._residents.trace_parents())
        for result in results:
            self._residents.record(result)
        if microbatch.is_last_in_round:
            self._unfinished.remove(index)

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
        """Finishes and checkpoints what is due, reports; streams are opened anew where a member has left."""
        self._residents.close_round()
        if self._residents.names != self._round_members:
            self._close_streams()
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
            return MicrobatchStream(self._channel, request)  # alignment's side joins this trace

    def _stream_broke(self, index: int, error: MuxtuneError) -> None:
        """Alignment is away: wait and open again at the members' cursors. Data that is wrong fails its tasks."""
        _log.warning("microbatches of htask %d broke off: %s", index, error)
        members = self._begin_again(index)
        if isinstance(error, _BAD_DATA) and len(members) == 1:
            self._residents.fail(members[0], error)
        elif isinstance(error, _BAD_DATA):
            self._split(index)
        else:
            time.sleep(_RETRY_SECONDS)

    def _begin_again(self, index: int) -> list[str]:
        """Ends the hTask's round: what it had gathered for its members is gathered anew. Answers those."""
        self._streams.pop(index).close()
        self._unfinished.remove(index)
        members = [name for name in self._plan.htasks[index].tasks if name in self._residents.names]
        for name in members:
            self._executor.tasks[name].restart_step()
        return members

    def _split(self, index: int) -> None:
        """One member's data is wrong, and only alone will it say so: each becomes an hTask of its own."""
        htask = self._plan.htasks[index]
        alone = [
            plan_pb2.HTask(tasks=[name], token_budget=htask.token_budget, chunk_tokens=htask.chunk_tokens)
            for name in htask.tasks
            if name in self._residents.names
        ]
        others = [other for i, other in enumerate(self._plan.htasks) if i != index]
        self._close_streams()
        for name in self._residents.names:  # rounds in flight begin again
            self._executor.tasks[name].restart_step()
        del self._plan.htasks[:]
        self._plan.htasks.extend([*others, *alone])

    def _close_streams(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._streams, self._unfinished = {}, []

    def _report(self, adopted: bool = False) -> None:
        results = self._residents.take_results()
        if results or adopted:
            response = execution_pb2.RunPlanResponse(
                plan_version=self._plan.version, adopted=adopted, results=results, device=self._device()
            )
            failpoint("report.before")
            self._pipe.write(Tag.RESULTS, response)
            failpoint("report.after")
        if adopted or any(result.WhichOneof("result") in ("finished", "failed", "released") for result in results):
            self._describe()

    def _describe(self) -> None:
        backbone = self._executor.backbone
        self._pipe.write(
            Tag.DESCRIBED,
            execution_pb2.DescribeExecutorResponse(
                executor=plan_pb2.Executor(
                    name=self._settings.resource_name,
                    backbone=describe_backbone(self._settings, backbone, self._footprint, self._process_bytes),
                    device=self._device(),
                ),
                tasks=self._residents.names,
                backbone_bytes=backbone.weight_bytes(),
                task_bytes=self._executor.task_bytes(),
            ),
        )

    def _device(self) -> plan_pb2.Device:
        device = describe_device(self._settings, self._device_kind)
        device.effective_tokens_per_second = self._window.tokens_per_second
        device.cost.CopyFrom(cost_to_proto(self._costs.profile))
        return device

    def _listen(self) -> bool:
        """Takes what the server says; waits for it while there is nothing to run. False: the server is gone."""
        while True:
            has_work = bool(self._residents.names or self._next_plan) and not self._is_held
            is_idle = not (has_work or self._unfinished or self._is_draining)
            if is_idle:
                self._window.close()
            self._give_sign(is_idle)
            try:
                frame = self._inbox.get(block=is_idle)
            except queue.Empty:
                return True
            if frame is None:
                return False
            self._handle(*frame)

    def _give_sign(self, is_idle: bool) -> None:
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
            self._residents.drop(self._residents.names)
            self._close_streams()
            self._plan, self._next_plan = plan_pb2.ExecutorPlan(), None
        elif tag is Tag.EXPORT:
            self._export(execution_pb2.ExportAdapterRequest.FromString(payload).task)
        elif tag is Tag.DRAIN:
            self._is_draining, self._is_held = True, False
        elif tag in (Tag.HOLD, Tag.GO):
            self._is_held = tag is Tag.HOLD

    def _export(self, name: str) -> None:
        try:
            if name not in self._residents.names:
                raise NotFoundError(f"{name} is not resident on this executor")
            self._pipe.write(Tag.EXPORTED, exported_response(self._residents.export(name)))
        except MuxtuneError as error:
            self._pipe.write(Tag.EXPORT_FAILED, to_failure(error))

    def _drain(self) -> None:
        self._close_streams()
        for name in self._residents.names:
            self._residents.release(name, "its executor drains")
        self._report()
        self._pipe.write(Tag.DRAINED)
        self._window.close()
        self._plan, self._next_plan, self._is_draining = plan_pb2.ExecutorPlan(), None, False

    def _receive(self) -> None:
        while (frame := self._pipe.read()) is not None:
            self._inbox.put(frame)
        self._inbox.put(None)


def main() -> None:
    settings = from_environment(ExecutionSettings, os.environ)
    logging.captureWarnings(True)
    faulthandler.register(signal.SIGUSR1)  # the watchdog asks for its stacks
    disable_progress_bar()
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    provider = configure("trainer", settings)
    pipe = BlockingPipe(int(sys.argv[1]))
    try:
        Trainer(settings, pipe).run()
    except (BrokenPipeError, ConnectionResetError):
        _log.warning("the server went away: stopping")
    finally:
        provider.shutdown()


if __name__ == "__main__":
    main()
