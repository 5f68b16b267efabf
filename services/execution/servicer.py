"""ExecutionService. See protos/muxtune/v1/execution.proto for what each RPC promises."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from engine.errors import (
    IllegalTransitionError,
    LeaseLostError,
    NotFoundError,
    StaleEpochError,
    UnavailableError,
)
from muxtune.v1 import errors_pb2, execution_pb2_grpc, plan_pb2
from muxtune.v1 import execution_pb2 as pb
from services.execution.outbox import Outbox
from services.execution.pipe import Frame, Tag
from services.execution.process import TrainerProcess
from services.execution.settings import ExecutionSettings

_log = logging.getLogger(__name__)


class ExecutionServicer(execution_pb2_grpc.ExecutionServiceServicer):
    """Between scheduling's stream and the trainer's pipe. Holds no task itself."""

    def __init__(self, settings: ExecutionSettings) -> None:
        self._settings = settings
        self.trainer = TrainerProcess(settings, self._on_frame, self._on_death)
        self.outbox = Outbox(settings.max_unacknowledged)
        self.described = pb.DescribeExecutorResponse()
        self.lease_epoch = 0
        self.ready = asyncio.Event()
        self.is_draining = False
        self._drained = asyncio.Event()
        self._plan: plan_pb2.ExecutorPlan | None = None
        self._stream: asyncio.Task[None] | None = None  # reads the newest stream's requests
        self._exports: list[asyncio.Future[pb.ExportAdapterResponse]] = []
        self._is_held = False

    async def RunPlan(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.RunPlanResponse]:
        requests = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None or first.lease_epoch != self.lease_epoch or self.lease_epoch == 0:
            raise LeaseLostError(f"this executor's lease is {self.lease_epoch}: take a new snapshot")
        if self._stream is not None:
            self._stream.cancel()  # the newest stream wins
        reading = self._stream = asyncio.create_task(self._read_requests(first, requests))
        responses = self.outbox.read()
        try:
            following = asyncio.ensure_future(anext(responses, None))
            while True:
                await asyncio.wait({reading, following}, return_when=asyncio.FIRST_COMPLETED)
                if reading.cancelled() or self._stream is not reading:
                    raise StaleEpochError("a newer stream replaced this one")
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
        """Every task checkpointed, released and acknowledged, or the time for it is over."""
        if not self.is_draining:
            self.is_draining = True
            await self.trainer.send(Tag.DRAIN)
        try:
            async with asyncio.timeout(self._settings.drain_seconds):
                if self.ready.is_set():
                    await self._drained.wait()
                await self.outbox.close()
                await self.outbox.wait_empty()
        except TimeoutError:
            _log.warning("drain gave up after %g s", self._settings.drain_seconds)

    async def lose_lease(self) -> None:
        """Drops every task and result: another executor may hold them by now."""
        self.lease_epoch, self._plan = 0, None
        await self.trainer.send(Tag.LEASE_LOST)
        await self.outbox.clear()

    async def _read_requests(self, first: pb.RunPlanRequest, requests: AsyncIterator[pb.RunPlanRequest]) -> None:
        await self._take(first)
        async for request in requests:
            await self._take(request)

    async def _take(self, request: pb.RunPlanRequest) -> None:
        await self.outbox.acknowledge(request.acknowledged_sequence)
        if request.stale_tasks:
            await self.trainer.send(Tag.STALE, request)
        if request.HasField("plan") and not self.is_draining:
            self._plan = request.plan
            await self.trainer.send(Tag.PLAN, request.plan)
        await self._hold_or_go()

    async def _hold_or_go(self) -> None:
        """The trainer pauses while too much is unacknowledged."""
        if self.outbox.is_full != self._is_held and not self.is_draining:
            self._is_held = self.outbox.is_full
            await self.trainer.send(Tag.HOLD if self._is_held else Tag.GO)

    async def _on_frame(self, frame: Frame) -> None:
        tag, payload = frame
        if tag is Tag.RESULTS:
            await self.outbox.put(pb.RunPlanResponse.FromString(payload))
            await self._hold_or_go()
        elif tag is Tag.DESCRIBED:
            self.described = pb.DescribeExecutorResponse.FromString(payload)
            if not self.ready.is_set():
                self.ready.set()
        elif tag is Tag.EXPORTED and self._exports:
            self._exports.pop(0).set_result(pb.ExportAdapterResponse.FromString(payload))
        elif tag is Tag.EXPORT_FAILED and self._exports:
            failure = errors_pb2.TaskFailure.FromString(payload)
            self._exports.pop(0).set_exception(IllegalTransitionError(failure.message))
        elif tag is Tag.DRAINED:
            self._drained.set()

    async def _on_death(self, code: int) -> None:
        """Its tasks are handed back, to be planned anew from their last checkpoints."""
        self.ready.clear()
        self._is_held = False
        for waiting in self._exports:
            waiting.set_exception(UnavailableError("the trainer died"))
        self._exports.clear()
        if self._plan is not None:
            released = plan_pb2.TaskReleased(reason=f"its trainer ended with status {code}")
            results = [
                plan_pb2.TaskResult(task=task.task, attempt_epoch=task.attempt_epoch, released=released)
                for task in self._plan.tasks
            ]
            await self.outbox.put(pb.RunPlanResponse(plan_version=self._plan.version, results=results))
            self._plan = None
        if self.is_draining:
            self._drained.set()
