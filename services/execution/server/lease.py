"""The executor's lease at scheduling: taken when the trainer is ready, kept, given back; without it nothing is run.

An executor that cannot renew gives its tasks up by itself before anyone else may hold them.
"""

import asyncio
import logging
import time
import uuid

from engine.errors import LeaseLostError, MuxtuneError
from muxtune.v1 import plan_pb2, scheduling_pb2, scheduling_pb2_grpc
from services.execution.server.servicer import ExecutionServicer
from services.execution.settings import ExecutionSettings

_RETRY_SECONDS = 0.5
_log = logging.getLogger(__name__)


class LeaseKeeper:
    """Runs until cancelled; `end` gives the lease back."""

    def __init__(
        self,
        settings: ExecutionSettings,
        address: str,
        scheduling: "scheduling_pb2_grpc.SchedulingServiceAsyncStub",
        servicer: ExecutionServicer,
    ) -> None:
        self._settings, self._scheduling, self._servicer = settings, scheduling, servicer
        self._address = settings.advertise_address or address
        self._incarnation = uuid.uuid4().hex
        self._seconds = 0.0

    async def run(self) -> None:
        while True:
            await self._servicer.ready.wait()
            try:
                await self._register()
                await self._keep()
            except MuxtuneError as error:
                _log.warning("lease: %s", error)
            if self._servicer.lease_term:
                await self._servicer.lose_lease()
            await asyncio.sleep(_RETRY_SECONDS)

    async def end(self) -> None:
        request = scheduling_pb2.SchedulingServiceEndLeaseRequest(
            executor=self._settings.resource_name, incarnation=self._incarnation
        )
        try:
            await self._scheduling.EndLease(request, timeout=2)
        except MuxtuneError as error:
            _log.warning("lease not given back, it will run out: %s", error)

    async def _register(self) -> None:
        described = self._servicer.described.executor
        executor = plan_pb2.Executor(
            name=self._settings.resource_name,
            address=self._address,
            incarnation=self._incarnation,
            backbone=described.backbone,
            device=described.device,
        )
        answer = await self._scheduling.RegisterExecutor(scheduling_pb2.RegisterExecutorRequest(executor=executor))
        self._seconds = answer.lease_duration.ToTimedelta().total_seconds()
        self._servicer.take_lease(answer.lease_term)
        _log.info("lease %d for %g s", answer.lease_term, self._seconds)

    async def _keep(self) -> None:
        """Renews every third of the lease. Returns when it ran out unrenewed, before admission can think so; raises
        LeaseLostError when told so."""
        runs_out = time.monotonic() + self._seconds
        while (left := runs_out - time.monotonic()) > 0:
            await asyncio.sleep(min(left, self._seconds / 3))
            sent = time.monotonic()
            if sent >= runs_out:
                break
            try:
                await self._scheduling.KeepLease(self._request(), timeout=min(runs_out - sent, self._seconds / 3))
                runs_out = sent + self._seconds
            except LeaseLostError:
                raise
            except MuxtuneError as error:
                _log.warning("lease not renewed: %s", error)
        _log.error("lease ran out: scheduling was away for %g s", self._seconds)

    def _request(self) -> scheduling_pb2.KeepLeaseRequest:
        return scheduling_pb2.KeepLeaseRequest(
            executor=self._settings.resource_name,
            incarnation=self._incarnation,
            lease_term=self._servicer.lease_term,
            device=self._servicer.described.executor.device,
            draining=self._servicer.is_draining,
        )
