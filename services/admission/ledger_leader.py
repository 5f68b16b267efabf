"""The replica that leads the ledger: it serves LedgerService, ends leases, collects garbage and checks limits."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

from engine.errors import UnavailableError
from muxtune.v1 import ledger_pb2
from services.admission.api.servicer import LedgerServicer
from services.admission.ledger.ledger import Ledger
from services.concurrency.threads import Threads

LEDGER_SERVICE = ledger_pb2.DESCRIPTOR.services_by_name["LedgerService"].full_name
_CHECK_SECONDS = 1.0
_log = logging.getLogger(__name__)


class LedgerLeader:
    """`jobs` run while this process leads. LedgerService's health shows clients which replica leads."""

    def __init__(
        self,
        acquire: Callable[[], Ledger],
        servicer: LedgerServicer,
        jobs: Sequence[Callable[[], Coroutine[Any, Any, None]]],
        health: health_aio.HealthServicer,
        threads: Threads,
    ) -> None:
        self._acquire, self._servicer, self._jobs, self._health = acquire, servicer, jobs, health
        self._threads = threads

    async def lead(self) -> None:
        """Lead until cancelled, or until another process acquires the ledger. Raises what a job raises."""
        ledger = await self._threads.run(self._acquire)
        _log.info("leads the ledger in term %d", ledger.fence.term)
        with self._servicer.serve_ledger(ledger):
            await self._health.set(LEDGER_SERVICE, health_pb2.HealthCheckResponse.SERVING)
            jobs = [*(job() for job in self._jobs), self._wait_until_superseded(ledger)]
            running = [asyncio.create_task(job) for job in jobs]
            try:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                await self._health.set(LEDGER_SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
                _log.info("no longer leads the ledger")

    async def _wait_until_superseded(self, ledger: Ledger) -> None:
        """Return when another process has acquired the ledger. A leader that was slow to start may have acquired it
        from one that started meanwhile; then both start again."""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            try:
                if not await self._threads.run(ledger.fence.is_current):
                    return
            except UnavailableError as error:
                _log.warning("cannot check who leads the ledger, will be retried: %s", error)
