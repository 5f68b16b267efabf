"""The replica that leads the ledger: it serves LedgerService, ends leases, collects garbage and checks limits."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

from engine.errors import UnavailableError
from muxtune.v1 import ledger_pb2
from services.admission.api.servicer import LedgerServicer
from services.admission.ledger.ledger import Ledger
from services.admission.ledger.replicas import Replicas, SingleReplica
from services.concurrency.threads import Threads

LEDGER_SERVICE = ledger_pb2.DESCRIPTOR.services_by_name["LedgerService"].full_name
_CHECK_SECONDS = 1.0
_log = logging.getLogger(__name__)


class LedgerLeader:
    """`jobs` run while this process leads. LedgerService's health shows clients which replica leads.

    The overall health is that of the ledger, as far as this replica knows: a replica that does not lead is healthy
    while another one leads.
    """

    def __init__(
        self,
        acquire: Callable[[], Ledger],
        servicer: LedgerServicer,
        jobs: Sequence[Callable[[], Coroutine[Any, Any, None]]],
        health: health_aio.HealthServicer,
        threads: Threads,
        replicas: Replicas | SingleReplica,
    ) -> None:
        self._acquire, self._servicer, self._jobs, self._health = acquire, servicer, jobs, health
        self._threads, self._replicas = threads, replicas
        self._is_leading, self._leader_seen_at = False, time.monotonic()

    async def lead(self) -> None:
        """Lead until cancelled, or until another process acquires the ledger. Raises what a job raises."""
        ledger = await self._threads.run(self._acquire)
        _log.info("leads the ledger in term %d", ledger.fence.term)
        with self._servicer.serve_ledger(ledger):
            await self._health.set(LEDGER_SERVICE, health_pb2.HealthCheckResponse.SERVING)
            self._is_leading = True
            await self._report_health()
            jobs = [*(job() for job in self._jobs), self._wait_until_superseded(ledger)]
            running = [asyncio.create_task(job) for job in jobs]
            try:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                await self._health.set(LEDGER_SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
                self._is_leading = False
                await self._report_health()
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
                _log.info("no longer leads the ledger")

    async def watch_health(self) -> None:
        """Report the overall health until cancelled."""
        was_healthy = True
        while True:
            is_healthy = await self._report_health()
            if was_healthy and not is_healthy:
                _log.warning("No admission leads the ledger: no task is scheduled, and the service is not healthy.")
            was_healthy = is_healthy
            await asyncio.sleep(_CHECK_SECONDS)

    async def _report_health(self) -> bool:
        """Report NOT_SERVING if no replica has been seen to lead for longer than a failover takes, else SERVING."""
        now = time.monotonic()
        if self._is_leading or self._replicas.sees_other_leader:
            self._leader_seen_at = now
        is_healthy = now - self._leader_seen_at <= self._replicas.failover_seconds
        states = health_pb2.HealthCheckResponse
        await self._health.set("", states.SERVING if is_healthy else states.NOT_SERVING)
        return is_healthy

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
