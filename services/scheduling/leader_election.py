"""Elects the leader among several schedulers: one plans, the others stand by and take over when it is gone."""

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration

from engine.errors import MuxtuneError
from muxtune.v1 import ledger_pb2, ledger_pb2_grpc

_RETRY_SECONDS = 0.2
_log = logging.getLogger(__name__)


class LeaderElection:
    """Takes part in the election by asking the ledger for the leader's lease, three times in its `lease_seconds`.

    `scheduler`: a name that no other running scheduler has. While the ledger is unavailable the leader stays leader:
    no other scheduler can become leader then, and nothing that a scheduler does is committed.
    """

    def __init__(self, ledger: "ledger_pb2_grpc.LedgerServiceAsyncStub", scheduler: str, lease_seconds: float) -> None:
        self._ledger, self._scheduler, self._lease_seconds = ledger, scheduler, lease_seconds
        self._incarnation = uuid.uuid4().hex

    async def run(self, work: Callable[[int], Coroutine[Any, Any, None]]) -> None:
        """Stand by, run `work(term)` while leading, and repeat until cancelled. Raises what `work` raises."""
        while True:
            term = await self._wait_until_leading()
            working = asyncio.create_task(work(term), name="leader")
            watching = asyncio.create_task(self._wait_until_superseded(term), name="leadership")
            try:
                done, _ = await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                working.cancel()
                watching.cancel()
                await asyncio.gather(working, watching, return_exceptions=True)

    async def resign(self) -> None:
        """End the lease, so that another scheduler takes over at once."""
        try:
            await self._request_lease(0.0)
        except MuxtuneError as error:
            _log.warning("The leader's lease could not be ended and will expire: %s", error)

    async def _wait_until_leading(self) -> int:
        is_standing_by = False
        while True:
            answer = await self._request_lease_with_retries()
            if answer.incarnation == self._incarnation:
                _log.info("This scheduler leads in term %d", answer.leader_term)
                return answer.leader_term
            if not is_standing_by:
                _log.info("This scheduler stands by; %s leads in term %d", answer.leader, answer.leader_term)
                is_standing_by = True
            await asyncio.sleep(self._lease_seconds / 3)

    async def _wait_until_superseded(self, term: int) -> None:
        while True:
            await asyncio.sleep(self._lease_seconds / 3)
            answer = await self._request_lease_with_retries()
            if (answer.incarnation, answer.leader_term) != (self._incarnation, term):
                _log.warning("This scheduler no longer leads; %s leads in term %d", answer.leader, answer.leader_term)
                return

    async def _request_lease_with_retries(self) -> ledger_pb2.LeadSchedulingResponse:
        while True:
            try:
                return await self._request_lease(self._lease_seconds)
            except MuxtuneError as error:
                _log.warning("The ledger did not answer the request to lead; retrying: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _request_lease(self, seconds: float) -> ledger_pb2.LeadSchedulingResponse:
        duration = Duration()
        duration.FromTimedelta(timedelta(seconds=seconds))
        request = ledger_pb2.LeadSchedulingRequest(
            scheduler=self._scheduler, incarnation=self._incarnation, duration=duration
        )
        return await self._ledger.LeadScheduling(request, timeout=max(1.0, self._lease_seconds))
