"""Keeps the executor's lease at scheduling: acquires it when the trainer is ready, renews it, ends it at shutdown.

Nothing runs without a lease. An executor that cannot renew it drops its tasks before another executor may hold them.
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
    """Acquires and renews the lease until it is cancelled; `end` returns the lease to scheduling."""

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
        self._lease_seconds = 0.0

    async def run(self) -> None:
        while True:
            await self._servicer.ready.wait()
            try:
                await self._register()
                await self._renew()
            except MuxtuneError as error:
                _log.warning("The executor has no lease: %s", error)
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
            _log.warning("The lease could not be ended and will expire: %s", error)

    async def _register(self) -> None:
        description = self._servicer.description.executor
        executor = plan_pb2.Executor(
            name=self._settings.resource_name,
            address=self._address,
            incarnation=self._incarnation,
            backbone=description.backbone,
            device=description.device,
        )
        response = await self._scheduling.RegisterExecutor(scheduling_pb2.RegisterExecutorRequest(executor=executor))
        self._lease_seconds = response.lease_duration.ToTimedelta().total_seconds()
        self._servicer.accept_lease(response.lease_term)
        _log.info("The executor has lease term %d for %g s.", response.lease_term, self._lease_seconds)

    async def _renew(self) -> None:
        """Renews the lease every third of its duration.

        Returns when the lease has expired, which admission notices later than this executor. Raises LeaseLostError when
        scheduling says that the lease is lost.
        """
        expiry = time.monotonic() + self._lease_seconds
        while (remaining := expiry - time.monotonic()) > 0:
            await asyncio.sleep(min(remaining, self._lease_seconds / 3))
            sent = time.monotonic()
            if sent >= expiry:
                break
            try:
                await self._scheduling.KeepLease(self._request(), timeout=min(expiry - sent, self._lease_seconds / 3))
                expiry = sent + self._lease_seconds
            except LeaseLostError:
                raise
            except MuxtuneError as error:
                _log.warning("The lease was not renewed: %s", error)
        _log.error("The lease expired: scheduling did not answer for %g s.", self._lease_seconds)

    def _request(self) -> scheduling_pb2.KeepLeaseRequest:
        return scheduling_pb2.KeepLeaseRequest(
            executor=self._settings.resource_name,
            incarnation=self._incarnation,
            lease_term=self._servicer.lease_term,
            device=self._servicer.description.executor.device,
            draining=self._servicer.is_draining,
        )
