"""What only the keeper of the ledger does: it serves LedgerService, ends leases, sweeps, and looks at limits."""

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

LEDGER_SERVICE = ledger_pb2.DESCRIPTOR.services_by_name["LedgerService"].full_name
_LOOK_SECONDS = 1.0
_log = logging.getLogger(__name__)


class LedgerLeader:
    """`works`: what runs meanwhile. The health of LedgerService tells clients where the ledger is kept."""

    def __init__(
        self,
        take: Callable[[], Ledger],
        servicer: LedgerServicer,
        works: Sequence[Callable[[], Coroutine[Any, Any, None]]],
        health: health_aio.HealthServicer,
    ) -> None:
        self._take, self._servicer, self._works, self._health = take, servicer, works, health

    async def keep(self) -> None:
        """Until cancelled, or until another has taken the ledger. Raises what a work raises."""
        ledger = await asyncio.to_thread(self._take)
        _log.info("keeps the ledger in term %d", ledger.fence.term)
        with self._servicer.keeping(ledger):
            await self._health.set(LEDGER_SERVICE, health_pb2.HealthCheckResponse.SERVING)
            works = [*(work() for work in self._works), _until_superseded(ledger)]
            running = [asyncio.create_task(work) for work in works]
            try:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                await self._health.set(LEDGER_SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
                _log.info("keeps the ledger no more")


async def _until_superseded(ledger: Ledger) -> None:
    """A keeper that was slow to begin may have taken it from one that began meanwhile: then both begin again."""
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        try:
            if not await asyncio.to_thread(ledger.fence.is_current):
                return
        except UnavailableError as error:
            _log.warning("whether the ledger is still ours is not known now: %s", error)
