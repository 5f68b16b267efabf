"""No client's work takes the threads of the ledger, of operators or of other tenants."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import key_pb2, ledger_pb2, operator_pb2
from services.admission.store import datasets_and_adapters
from tests.services.admission.admission_mesh import (
    BOTH_DATABASES,
    TIMEOUT_SECONDS,
    Admission,
    adapter_files,
    adapter_parts,
    executor,
    lease,
)

BAD = "tenants/bad"


@pytest.fixture
def let_go(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Block the lists and the deletions of one tenant, with their connections to the database, until it is set."""
    let_go, list_page = threading.Event(), datasets_and_adapters.list_page

    def slow(connection: Any, table: Any, tenant: str, *arguments: Any) -> Any:
        if tenant == BAD:
            assert let_go.wait(TIMEOUT_SECONDS)
        return list_page(connection, table, tenant, *arguments)

    monkeypatch.setattr(datasets_and_adapters, "list_page", slow)
    yield let_go
    let_go.set()


@pytest.mark.parametrize("database_url", BOTH_DATABASES, indirect=True)
async def test_a_tenants_slow_calls_delay_neither_leases_nor_operators_nor_other_tenants(
    admission: Admission, let_go: threading.Event
) -> None:
    bad, good = admission.tenant("bad"), admission.tenant("good")
    slow = [asyncio.ensure_future(bad.ListDatasets(pb.ListDatasetsRequest())) for _ in range(40)]
    slow += [asyncio.ensure_future(bad.ListAdapters(pb.ListAdaptersRequest())) for _ in range(40)]
    while admission.threads.clients._running[BAD] < 2:  # noqa: ASYNC110  # the server does not notify of it
        await asyncio.sleep(0.001)
    for _ in range(3):
        await admission.ledger().PutLease(lease(executor(lease_term=1)))
        await admission.ledger().GetSnapshot(ledger_pb2.GetSnapshotRequest())
        await admission.operator().GetQuota(operator_pb2.GetQuotaRequest(tenant="tenants/good"))
        await admission.keys().ListApiKeys(key_pb2.ListApiKeysRequest())
        await good.ListDatasets(pb.ListDatasetsRequest())
        await good.UploadAdapter(adapter_parts(adapter_files()))
        await admission.servicer.dataset_objects.remove_all_unreferenced()
    assert not any(call.done() for call in slow)
    let_go.set()
    await asyncio.gather(*slow)
