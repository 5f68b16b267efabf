"""Serves ExecutionService; protos/muxtune/v1/execution.proto documents each RPC."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from typing import Any

from engine.errors import LeaseLostError, MuxtuneError, NotFoundError, SupersededError, UnavailableError
from muxtune.v1 import errors_pb2, execution_pb2_grpc, plan_pb2
from muxtune.v1 import execution_pb2 as pb
from services.conversion.plan_parts import PlanParts, split_plan
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
    """Connects scheduling's stream with the trainer's pipe. Holds no task itself."""

    def __init__(self, settings: ExecutionSettings, set_health: Callable[[bool], Awaitable[None]]) -> None:
        self._settings, self._set_health = settings, set_health
        self.trainer = TrainerProcess(settings, self._on_frame, self._on_death)
        self.outbox = Outbox(settings.max_unacknowledged)
        self._metrics = ExecutorMetrics(settings.backbone_name)
        self.description = pb.DescribeExecutorResponse()
        self.lease_term = 0
        self.ready = asyncio.Event()
        self.is_draining = False
        self._drained = asyncio.Event()
        self._leased = asyncio.Event()
        self._attempts = AttemptTracker()
        self._plan_version = self._leader_term = 0
        self._plan_parts = PlanParts()
        self._pending_plan: plan_pb2.ExecutorPlan | None = None  # received while there was no trainer
        self._stream: asyncio.Task[None] | None = None  # reads the requests of the newest stream
        self._stream_ended = asyncio.Event()
        self._stream_has_plan = False
        self.unreported_deaths: list[plan_pb2.TaskResult] = []  # of the trainer, which a registration reports
        self._exports: list[asyncio.Future[pb.ExportAdapterResponse]] = []
        self._is_paused = False

    async def RunPlan(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.RunPlanResponse]:
        requests = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None:
            return
        await self._check_lease(first.lease_term)
        if first.leader_term < self._leader_term:
            raise SupersededError(f"leader term {first.leader_term} was superseded by leader term {self._leader_term}")
        self._leader_term = first.leader_term
        if self._stream is not None:
            self._stream.cancel()  # the newest stream wins
        self._plan_parts = PlanParts()
        reading = self._stream = asyncio.create_task(self._read_requests(first, requests))
        self._stream_has_plan = False
        self._stream_ended.clear()
        responses = self.outbox.read()
        try:
            following = asyncio.ensure_future(anext(responses, None))
            while True:
                await asyncio.wait({reading, following}, return_when=asyncio.FIRST_COMPLETED)
                if self._stream is not reading:
                    raise SupersededError("a newer stream replaced this stream")
                if self.lease_term != first.lease_term:
                    raise LeaseLostError(f"lease term {first.lease_term} has ended: take a new snapshot")
                if following.done():
                    if (response := following.result()) is None:
                        return
                    yield response
                    following = asyncio.ensure_future(anext(responses, None))
                elif reading.done():
                    return  # scheduling closed its side of the stream
        finally:
            following.cancel()
            reading.cancel()
            if self._stream is reading:
                self._stream, self._stream_has_plan = None, False
                self._stream_ended.set()
                await self._pause_or_resume()

    async def ExportAdapter(self, request: pb.ExportAdapterRequest, context: Any) -> pb.ExportAdapterResponse:
        if request.task not in self.description.tasks:
            raise NotFoundError(f"{request.task} is not resident on {self._settings.resource_name}")
        response: asyncio.Future[pb.ExportAdapterResponse] = asyncio.get_running_loop().create_future()
        self._exports.append(response)
        await self.trainer.send(Tag.EXPORT, request)
        return await response

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:
        await self.drain()
        return pb.DrainResponse()

    async def DescribeExecutor(self, request: pb.DescribeExecutorRequest, context: Any) -> pb.DescribeExecutorResponse:
        if not self.ready.is_set():
            raise UnavailableError("the executor is loading its backbone: retry later")
        return self.description

    async def drain(self) -> None:
        """Checkpoints and releases every task, for at most `drain_seconds`.

        Waits until scheduling has acknowledged the results, if it is connected.
        """
        if not self.is_draining:
            self.is_draining = True
            await self.trainer.send(Tag.DRAIN)
        try:
            async with asyncio.timeout(self._settings.drain_seconds):
                if self.ready.is_set():
                    await self._drained.wait()
                await self.outbox.close()
                if self._stream is not None:
                    await _wait_for_first(self.outbox.wait_empty(), self._stream_ended.wait())
        except TimeoutError:
            _log.warning("The drain was not complete after %g s.", self._settings.drain_seconds)

    def accept_lease(self, term: int) -> None:
        """Accepts streams of this lease term from now on."""
        self.lease_term = term
        self._leased.set()

    async def lose_lease(self) -> None:
        """Drops every task and result, which another executor may hold by now, and ends the stream."""
        self.lease_term, self._plan_version, self._pending_plan = 0, 0, None
        self._leased.clear()
        self._attempts.drop_all()
        await self.trainer.send(Tag.LEASE_LOST)
        self._keep_deaths(await self.outbox.clear())
        if self._stream is not None:
            self._stream.cancel()

    async def _check_lease(self, term: int) -> None:
        """Raises LeaseLostError unless `term` is the lease's.

        Waits for a lease at first: scheduling may open a stream before this executor has read the response that grants
        the lease.
        """
        try:
            async with asyncio.timeout(_LEASE_WAIT_SECONDS):
                await self._leased.wait()
        except TimeoutError:
            _log.warning("A stream was opened, but this executor has no lease.")
        if term != self.lease_term or term == 0:
            raise LeaseLostError(f"this executor's lease term is {self.lease_term}, not {term}: take a new snapshot")

    async def _read_requests(self, first: pb.RunPlanRequest, requests: AsyncIterator[pb.RunPlanRequest]) -> None:
        await self._accept_request(first)
        async for request in requests:
            await self._accept_request(request)

    async def _accept_request(self, request: pb.RunPlanRequest) -> None:
        acknowledged = self.outbox.results_up_to(request.acknowledged_sequence)
        if stale := self._attempts.drop_stale(request.stale_tasks, acknowledged):
            await self.trainer.send(Tag.STALE, pb.RunPlanRequest(stale_tasks=stale))
        await self.outbox.acknowledge(request.acknowledged_sequence)
        if request.HasField("plan") and request.plan_continues:
            self._plan_parts.add(request.plan)
        elif request.HasField("plan") and not self.is_draining:
            plan = self._plan_parts.finish(request.plan)
            self._stream_has_plan = True
            if plan.version > self._plan_version:
                self._plan_version = plan.version
                await self._send_plan(self._attempts.start(plan))
        await self._pause_or_resume()

    async def _send_plan(self, plan: plan_pb2.ExecutorPlan) -> None:
        """Sends the plan to the trainer, or to the next one if this one has died."""
        self._pending_plan = None if self.ready.is_set() else plan
        if self.ready.is_set():
            *parts, last = split_plan(plan)
            for part in parts:
                await self.trainer.send(Tag.PLAN_PART, part)
            await self.trainer.send(Tag.PLAN, last)

    async def _pause_or_resume(self) -> None:
        """Pauses the trainer while no stream has sent a plan or the outbox is full; resumes it otherwise."""
        must_pause = not self._stream_has_plan or self.outbox.is_full
        if must_pause != self._is_paused and not self.is_draining:
            self._is_paused = must_pause
            await self.trainer.send(Tag.PAUSE if must_pause else Tag.RESUME)

    async def _on_frame(self, frame: Frame) -> None:
        tag, payload = frame
        if tag is Tag.RESULTS:
            await self._forward_results(pb.RunPlanResponse.FromString(payload))
        elif tag is Tag.DESCRIBED:
            self.description = pb.DescribeExecutorResponse.FromString(payload)
            self._attempts.record_resident(self.description.tasks)
            if not self.ready.is_set():
                self.ready.set()
                await self._set_health(not self.is_draining)
                if self._pending_plan is not None:
                    await self._send_plan(self._pending_plan)
                await self._pause_or_resume()
        elif tag is Tag.EXPORTED and self._exports:
            self._exports.pop(0).set_result(pb.ExportAdapterResponse.FromString(payload))
        elif tag is Tag.EXPORT_FAILED and self._exports:
            failure = errors_pb2.TaskFailure.FromString(payload)
            self._exports.pop(0).set_exception(_to_error(failure))
        elif tag is Tag.DRAINED:
            self._drained.set()

    async def _forward_results(self, response: pb.RunPlanResponse) -> None:
        valid = self._attempts.record_results(response.results)
        self._metrics.record_results(valid)
        self._metrics.record_wait(response.device.data_wait_fraction)
        del response.results[:]
        response.results.extend(valid)
        self.description.executor.device.CopyFrom(response.device)
        if valid or response.adopted:
            await self.outbox.put(response)
            await self._pause_or_resume()

    async def _on_death(self, cause: str) -> None:
        """Releases the dead trainer's tasks, which scheduling plans again from their last checkpoints.

        A plan that the trainer has not received waits for the next trainer.
        """
        self.ready.clear()
        await self._set_health(False)
        self._is_paused = False
        for export in self._exports:
            export.set_exception(UnavailableError("the trainer died during the export: retry later"))
        self._exports.clear()
        results = self._attempts.release_all(cause) if self._pending_plan is None else []
        if not self.lease_term:
            self._keep_deaths(results)
        elif results:
            response = pb.RunPlanResponse(plan_version=self._plan_version, results=results)
            response.device.CopyFrom(self.description.executor.device)
            await self.outbox.put(response)
        if self.is_draining:
            self._drained.set()

    def _keep_deaths(self, results: Iterable[plan_pb2.TaskResult]) -> None:
        """Keeps the results that name suspects: without a lease none can be sent."""
        self.unreported_deaths += [result for result in results if result.released.num_suspects]


def _to_error(failure: errors_pb2.TaskFailure) -> MuxtuneError:
    return _BY_REASON.get(errors_pb2.ErrorReason.Name(failure.reason), MuxtuneError)(failure.message)


async def _wait_for_first(*waits: Coroutine[Any, Any, Any]) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
