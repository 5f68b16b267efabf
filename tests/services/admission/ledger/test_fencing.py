"""A superseded leader of the ledger commits nothing, on both databases, whatever it tries to commit."""

from collections.abc import Callable, Iterator

import grpc
import pytest
import sqlalchemy as sa

from engine.errors import UnavailableError
from muxtune.v1 import ledger_pb2, plan_pb2
from services.admission.ledger.ledger import Ledger
from services.admission.store.tables import metadata
from tests.services.admission.admission_mesh import DATABASES, Admission, executor, refused

pytestmark = pytest.mark.parametrize("database_url", DATABASES, indirect=True)
TASK = "tenants/acme/tasks/t"


def _writes(ledger: Ledger) -> Iterator[Callable[[], object]]:
    """Yield all commits of a leader."""
    started = ledger_pb2.AttemptStart(task=TASK, expected_attempt=0)
    yield ledger.snapshot_pages
    yield lambda: ledger.put_lease(executor("executors/one", "i1"), 30)
    yield lambda: ledger.put_lease(executor("executors/two", "i1"), 30)
    yield lambda: ledger.end_lease("executors/one", "i1")
    yield lambda: ledger.commit_plan(
        ledger_pb2.CommitPlanRequest(executor="executors/one", lease_term=1, version=9, starts=[started])
    )
    yield lambda: ledger.commit_results("executors/one", 1, [plan_pb2.TaskResult(task=TASK, attempt=1)])
    yield lambda: ledger.revoke_attempts("executors/one", [TASK], "why not")
    yield lambda: ledger.scheduler_lease.acquire("a", "a1", 6.0)


async def test_a_superseded_leader_commits_nothing(admission: Admission) -> None:
    task = (await admission.create((await admission.upload()).name, "t")).name
    assert task == TASK and await admission.run(task) == [1]
    stale, clock = Ledger(admission.database, admission.clock), admission.clock
    clock.seconds += 1000  # its leases have all run out, and it would end them
    Ledger(admission.database, clock)

    def stored() -> list[object]:
        with admission.database.read() as connection:
            tables = [table for table in metadata.sorted_tables if table.name != "audit_events"]
            return [connection.execute(sa.select(table)).all() for table in tables]

    before = stored()
    for write in (*_writes(stale), stale.end_expired_leases):
        with pytest.raises(UnavailableError, match="another admission leads the ledger"):
            write()
    assert stored() == before
    with refused(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"):  # the server's own is superseded too
        await admission.register("executors/two")
