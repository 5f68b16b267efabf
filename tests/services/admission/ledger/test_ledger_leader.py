"""The overall health of a replica tells whether any replica leads the ledger, as far as this one knows.

tests/test_up.py and tests/test_mesh_replicas.py have it with real admissions.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from services.admission import ledger_leader as module
from services.admission.ledger_leader import LEDGER_SERVICE, LedgerLeader
from services.concurrency.threads import Threads

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SECONDS = 20.0


@pytest.fixture(autouse=True)
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHECK_SECONDS", 0.01)


@dataclass
class Replicas:
    failover_seconds: float
    sees_other_leader: bool = False


class Ledger:
    """Stands for the ledger, its fence and its servicer."""

    term = 1

    def __init__(self) -> None:
        self.is_superseded, self.fence = False, self

    def is_current(self) -> bool:
        return not self.is_superseded

    @contextmanager
    def serve_ledger(self, ledger: "Ledger") -> Iterator[None]:
        yield


@dataclass
class Health:
    """Records the status of each service; `changed` after each change."""

    statuses: dict[str, int] = field(default_factory=dict)

    async def set(self, service: str, status: int) -> None:
        self.statuses[service] = status


@asynccontextmanager
async def reporting(replicas: Replicas, ledger: Ledger) -> AsyncIterator[tuple[LedgerLeader, Health]]:
    health: Any = Health()
    servicer: Any = ledger
    leader = LedgerLeader(lambda: servicer, servicer, (), health, Threads("ledger", 1), replicas)  # type: ignore[arg-type]
    watching = asyncio.create_task(leader.watch_health())
    yield leader, health
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not holds():  # noqa: ASYNC110  # nothing else reports it
            await asyncio.sleep(0.01)


async def test_an_admission_alone_is_healthy_only_while_it_leads() -> None:
    ledger = Ledger()
    async with reporting(Replicas(failover_seconds=0.0), ledger) as (leader, health):
        await until(lambda: health.statuses == {"": NOT_SERVING})
        leading = asyncio.create_task(leader.lead())
        await until(lambda: health.statuses == {"": SERVING, LEDGER_SERVICE: SERVING})
        ledger.is_superseded = True
        await asyncio.wait_for(leading, SECONDS)
        assert health.statuses == {"": NOT_SERVING, LEDGER_SERVICE: NOT_SERVING}


async def test_a_replica_that_does_not_lead_is_healthy_while_another_leads_or_may_soon() -> None:
    replicas = Replicas(failover_seconds=0.3, sees_other_leader=True)
    async with reporting(replicas, Ledger()) as (_, health):
        await until(lambda: health.statuses == {"": SERVING})
        replicas.sees_other_leader = False
        await asyncio.sleep(0.1)  # a failover takes longer than that
        assert health.statuses == {"": SERVING}
        await until(lambda: health.statuses == {"": NOT_SERVING})
        replicas.sees_other_leader = True
        await until(lambda: health.statuses == {"": SERVING})
