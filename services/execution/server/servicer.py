"""ExecutionService. See protos/muxtune/v1/execution.proto for what each RPC promises."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from engine.errors import LeaseLostError, MuxtuneError, NotFoundError, SupersededError, UnavailableError
from muxtune.v1 import errors_pb2, execution_pb2_grpc, plan_pb2
from muxtune.v1 import execution_pb2 as pb
from services.execution.server.attempt_tracker import AttemptTracker
from services.execution.server.metrics import ExecutorMetrics
from services.execution.server.outbox import Outbox
from services.execution.server.trainer_process import TrainerProcess
from services.execution.settings import ExecutionSettings
from services.execution.trainer_pipe import Frame, Tag
from services.rpc.errors import TABLE

_LEASE_WAIT_SECONDS = 5.0
_BY_REASON = {f"ERROR_REASON_{mapped.reason}": kind for kind, mapped in TABLE.items()}
_log = logging.getLogger(__name__)


class ExecutionServicer(execution_pb2_grpc.ExecutionServiceServicer):
    """Between scheduling's stream and the trainer's pipe. Holds no task itself."""

    def __init__(self, settings: ExecutionSettings, tell_health: Callable[[bool], Awaitable[None]]) -> None:
        self._settings, self._tell_health = settings, tell_health
        self.trainer = TrainerProcess(settings, self._on_frame, self._on_death)
        self.outbox = Outbox(settings.max_unacknowledged)
        self._usage = ExecutorMetrics(settings.backbone_name)
        self.described = pb.DescribeExecutorResponse()
        self.lease_term = 0
        self.ready = asyncio.Event()
        self.is_draining = False
        self._drained = asyncio.Event()
        self._leased = asyncio.Event()
        self._attempts = AttemptTracker()
        self._plan_version = self._leader_term = 0
        self._late_plan: plan_pb2.ExecutorPlan | None = None  # came while the trainer was away
        self._stream: asyncio.Task[None] | None = None  # reads the newest stream's requests
        self._stream_ended = asyncio.Event()
        self._stream_has_plan = False
        self._exports: list[asyncio.Future[pb.ExportAdapterResponse]] = []
        self._is_held = False

    async def RunPlan(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.RunPlanResponse]:
        requests = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None:
            return
        await self._check_lease(first.lease_term)
        if first.leader_term < self._leader_term:
            raise SupersededError(f"leader term {first.leader_term} was superseded by {self._leader_term}")
        self._leader_term = first.leader_term
        if self._stream is not None:
            self._stream.cancel()  # the newest stream wins
        reading = self._stream = asyncio.create_task(self._read_requests(first, requests))
        self._stream_has_plan = False
        self._stream_ended.clear()
        responses = self.outbox.read()
        try:
            following = asyncio.ensure_future(anext(responses, None))
            while True:
                await asyncio.wait({reading, following}, return_when=asyncio.FIRST_COMPLETED)
                if self._stream is not reading:
                    raise SupersededError("a newer stream replaced this one")
                if self.lease_term != first.lease_term:
                    raise LeaseLostError(f"lease {first.lease_term} ended: take a new snapshot")
                if following.done():
                    if (response := following.result()) is None:
                        return
                    yield response
                    following = asyncio.ensure_future(anext(responses, None))
                elif reading.done():
                    return  # scheduling closed its side
        finally:
            following.cancel()
            reading.cancel()
            if self._stream is reading:
                self._stream, self._stream_has_plan = None, False
                self._stream_ended.set()
                await self._hold_or_go()

    async def ExportAdapter(self, request: pb.ExportAdapterRequest, context: Any) -> pb.ExportAdapterResponse:
        if request.task not in self.described.tasks:
            raise NotFoundError(f"{request.task} is not resident on {self._settings.resource_name}")
        answer: asyncio.Future[pb.ExportAdapterResponse] = asyncio.get_running_loop().create_future()
        self._exports.append(answer)
        await self.trainer.send(Tag.EXPORT, request)
        return await answer

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:
        await self.drain()
        return pb.DrainResponse()

    async def DescribeExecutor(self, request: pb.DescribeExecutorRequest, context: Any) -> pb.DescribeExecutorResponse:
        if not self.ready.is_set():
            raise UnavailableError("the backbone is loading")
        return self.described

    async def drain(self) -> None:
        """Every task checkpointed and released, and acknowledged if scheduling is there; or the time is over."""
        if not self.is_draining:
            self.is_draining = True
            await self.trainer.send(Tag.DRAIN)
        try:
            async with asyncio.timeout(self._settings.drain_seconds):
                if self.ready.is_set():
                    await self._drained.wait()
                await self.outbox.close()
                if self._stream is not None:
                    await _first_of(self.outbox.wait_empty(), self._stream_ended.wait())
        except TimeoutError:
            _log.warning("drain gave up after %g s", self._settings.drain_seconds)

    def take_lease(self, term: int) -> None:
        """From now on, streams of this lease are taken."""
        self.lease_term = term
        self._leased.set()

    async def lose_lease(self) -> None:
        """Drops every task and result: another executor may hold them by now. Ends the stream."""
        self.lease_term, self._plan_version, self._late_plan = 0, 0, None
        self._leased.clear()
        self._attempts.drop_all()
        await self.trainer.send(Tag.LEASE_LOST)
        await self.outbox.clear()
        if self._stream is not None:
            self._stream.cancel()

    async def _check_lease(self, term: int) -> None:
        """Scheduling may know of a lease a moment before this executor hears its answer. Raises LeaseLostError."""
        try:
            async with asyncio.timeout(_LEASE_WAIT_SECONDS):
                await self._leased.wait()
        except TimeoutError:
            _log.warning("a stream came, but no lease")
        if term != self.lease_term or term == 0:
            raise LeaseLostError(f"this executor's lease is {self.lease_term}, not {term}: take a new snapshot")

    async def _read_requests(self, first: pb.RunPlanRequest, requests: AsyncIterator[pb.RunPlanRequest]) -> None:
        await self._take(first)
        async for request in requests:
            await self._take(request)

    async def _take(self, request: pb.RunPlanRequest) -> None:
        judged = self.outbox.results_up_to(request.acknowledged_sequence)
        if stale := self._attempts.drop_stale(request.stale_tasks, judged):
            await self.trainer.send(Tag.STALE, pb.RunPlanRequest(stale_tasks=stale))
        await self.outbox.acknowledge(request.acknowledged_sequence)
        if request.HasField("plan") and not self.is_draining:
            self._stream_has_plan = True
            if request.plan.version > self._plan_version:
                self._plan_version = request.plan.version
                await self._hand_down(self._attempts.start(request.plan))
        await self._hold_or_go()

    async def _hand_down(self, plan: plan_pb2.ExecutorPlan) -> None:
        """To the trainer, or to the next one where this one has died."""
        self._late_plan = None if self.ready.is_set() else plan
        if self.ready.is_set():
            await self.trainer.send(Tag.PLAN, plan)

    async def _hold_or_go(self) -> None:
        """The trainer pauses while no stream's plan says to go on, or too much is unacknowledged."""
        must_hold = not self._stream_has_plan or self.outbox.is_full
        if must_hold != self._is_held and not self.is_draining:
            self._is_held = must_hold
            await self.trainer.send(Tag.HOLD if must_hold else Tag.GO)

    async def _on_frame(self, frame: Frame) -> None:
        tag, payload = frame
        if tag is Tag.RESULTS:
            await self._take_results(pb.RunPlanResponse.FromString(payload))
        elif tag is Tag.DESCRIBED:
            self.described = pb.DescribeExecutorResponse.FromString(payload)
            self._attempts.note_resident(self.described.tasks)
            if not self.ready.is_set():
                self.ready.set()
                await self._tell_health(not self.is_draining)
                if self._late_plan is not None:
                    await self._hand_down(self._late_plan)
                await self._hold_or_go()
        elif tag is Tag.EXPORTED and self._exports:
            self._exports.pop(0).set_result(pb.ExportAdapterResponse.FromString(payload))
        elif tag is Tag.EXPORT_FAILED and self._exports:
            failure = errors_pb2.TaskFailure.FromString(payload)
            self._exports.pop(0).set_exception(_to_error(failure))
        elif tag is Tag.DRAINED:
            self._drained.set()

    async def _take_results(self, response: pb.RunPlanResponse) -> None:
        counting = self._attempts.note(response.results)
        self._usage.add(counting)
        self._usage.tell_wait(response.device.data_wait_fraction)
        del response.results[:]
        response.results.extend(counting)
        self.described.executor.device.CopyFrom(response.device)
        if counting or response.adopted:
            await self.outbox.put(response)
            await self._hold_or_go()

    async def _on_death(self, cause: str) -> None:
        """Its tasks are handed back, to be planned anew from their last checkpoints. A plan that it was not handed yet
        waits for the next trainer."""
        self.ready.clear()
        await self._tell_health(False)
        self._is_held = False
        for waiting in self._exports:
            waiting.set_exception(UnavailableError("the trainer died"))
        self._exports.clear()
        if self._late_plan is None and (results := self._attempts.hand_back(cause)):
            response = pb.RunPlanResponse(plan_version=self._plan_version, results=results)
            response.device.CopyFrom(self.described.executor.device)
            await self.outbox.put(response)
        if self.is_draining:
            self._drained.set()


def _to_error(failure: errors_pb2.TaskFailure) -> MuxtuneError:
    return _BY_REASON.get(errors_pb2.ErrorReason.Name(failure.reason), MuxtuneError)(failure.message)


async def _first_of(*waits: Coroutine[Any, Any, Any]) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
