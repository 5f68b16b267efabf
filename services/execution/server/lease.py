"""Keeps the executor's lease at scheduling: acquires it when the trainer is ready, renews it, ends it at shutdown.

Nothing runs without a lease. An executor that cannot renew it drops its tasks before another executor may hold them.
When it registers, it reports what it knows of deaths before (docs/adr/0017), so that no task counts as the cause of one
that there was not.
"""

import asyncio
import logging
import time
import uuid

from engine.errors import LeaseLostError, MuxtuneError, NotFoundError
from muxtune.v1 import plan_pb2, scheduling_pb2, scheduling_pb2_grpc
from muxtune.v1.executor_history_pb2 import ExecutorHistory
from services.execution.server.servicer import ExecutionServicer
from services.execution.settings import ExecutionSettings
from services.storage.artifact_layout import stop_record_of
from services.storage.artifact_store import ArtifactStore

_RETRY_SECONDS, _RECORD_SECONDS = 0.5, 5.0
_log = logging.getLogger(__name__)


class LeaseKeeper:
    """Acquires and renews the lease until it is cancelled; `end` returns the lease to scheduling."""

    def __init__(
        self,
        settings: ExecutionSettings,
        address: str,
        scheduling: "scheduling_pb2_grpc.SchedulingServiceAsyncStub",
        servicer: ExecutionServicer,
        artifacts: ArtifactStore,
    ) -> None:
        self._settings, self._scheduling, self._servicer = settings, scheduling, servicer
        self._artifacts, self._stopped_incarnation = artifacts, ""
        self._address = settings.advertise_address or address
        self._incarnation = uuid.uuid4().hex
        self._lease_seconds = 0.0

    async def run(self) -> None:
        self._stopped_incarnation = await self._read_stop()
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

    async def record_stop(self) -> None:
        """Records that this process was asked to stop, for the one that follows it: scheduling may be away by then."""
        key = stop_record_of(self._settings.resource_name)
        try:
            async with asyncio.timeout(_RECORD_SECONDS):
                await asyncio.to_thread(self._artifacts.put, key, self._incarnation.encode())
        except (MuxtuneError, TimeoutError) as error:
            _log.warning("The stop was not recorded, and may count as a crash: %s", error)

    async def _read_stop(self) -> str:
        """Returns the incarnation that recorded its stop last; "" if there is none or the store is away."""
        try:
            record = await asyncio.to_thread(self._artifacts.get, stop_record_of(self._settings.resource_name))
        except NotFoundError:
            return ""
        except MuxtuneError as error:
            _log.warning("How this executor ended the last time is not known: %s", error)
            return ""
        return record.decode(errors="replace")

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
        deaths = list(self._servicer.unreported_deaths)
        history = ExecutorHistory(trainer_deaths=deaths, stopped_incarnation=self._stopped_incarnation)
        request = scheduling_pb2.RegisterExecutorRequest(executor=executor, history=history)
        response = await self._scheduling.RegisterExecutor(request)
        del self._servicer.unreported_deaths[: len(deaths)]
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
