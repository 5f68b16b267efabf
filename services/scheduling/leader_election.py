"""Of several schedulers one works; the others stand by, and one of them takes over when it is gone."""

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
    """Asks the ledger who leads, every third of the lease. `place`: where this scheduler runs, as no other does at the
    same time. While the ledger is away the leader stays who it is: without the ledger nobody can take over, and nothing
    that anybody does counts."""

    def __init__(self, ledger: "ledger_pb2_grpc.LedgerServiceAsyncStub", place: str, seconds: float) -> None:
        self._ledger, self._place, self._seconds = ledger, place, seconds
        self._incarnation = uuid.uuid4().hex

    async def run(self, work: Callable[[int], Coroutine[Any, Any, None]]) -> None:
        """Until cancelled: stands by, then runs `work(term)` as long as it leads. Raises what that raises."""
        while True:
            term = await self._until_led()
            working = asyncio.create_task(work(term), name="leader")
            following = asyncio.create_task(self._until_superseded(term), name="leadership")
            try:
                done, _ = await asyncio.wait({working, following}, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                working.cancel()
                following.cancel()
                await asyncio.gather(working, following, return_exceptions=True)

    async def resign(self) -> None:
        """So that another takes over at once."""
        try:
            await self._ask(0.0)
        except MuxtuneError as error:
            _log.warning("leadership not given back, it will run out: %s", error)

    async def _until_led(self) -> int:
        stood_by = False
        while True:
            answer = await self._asked()
            if answer.incarnation == self._incarnation:
                _log.info("leads in term %d", answer.leader_term)
                return answer.leader_term
            if not stood_by:
                _log.info("stands by: %s leads in term %d", answer.leader, answer.leader_term)
                stood_by = True
            await asyncio.sleep(self._seconds / 3)

    async def _until_superseded(self, term: int) -> None:
        while True:
            await asyncio.sleep(self._seconds / 3)
            answer = await self._asked()
            if (answer.incarnation, answer.leader_term) != (self._incarnation, term):
                _log.warning("does not lead any more: %s does, in term %d", answer.leader, answer.leader_term)
                return

    async def _asked(self) -> ledger_pb2.LeadSchedulingResponse:
        while True:
            try:
                return await self._ask(self._seconds)
            except MuxtuneError as error:
                _log.warning("who leads is not known now: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _ask(self, seconds: float) -> ledger_pb2.LeadSchedulingResponse:
        duration = Duration()
        duration.FromTimedelta(timedelta(seconds=seconds))
        request = ledger_pb2.LeadSchedulingRequest(
            scheduler=self._place, incarnation=self._incarnation, duration=duration
        )
        return await self._ledger.LeadScheduling(request, timeout=max(1.0, self._seconds))
