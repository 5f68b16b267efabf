"""No client's work takes the threads of the ledger, of operators or of other tenants."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import key_pb2, ledger_pb2, operator_pb2, task_pb2
from services.admission.policy import task_estimator
from services.admission.store import datasets_and_adapters
from tests.services.admission.admission_mesh import (
    BOTH_DATABASES,
    TEN_ROWS,
    TIMEOUT_SECONDS,
    Admission,
    adapter_files,
    adapter_parts,
    dataset_parts,
    executor,
    lease,
    spec,
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


async def test_estimates_are_computed_in_turns_and_delay_nobody_else(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant asks for estimates whose computation does not end; another one's tasks are created meanwhile."""
    let_go, refuse = threading.Event(), task_estimator.refuse_if_never_fits

    def slow(task: Any, *arguments: Any) -> None:
        if task.method.rank == 7:
            assert let_go.wait(TIMEOUT_SECONDS)
        refuse(task, *arguments)

    monkeypatch.setattr(task_estimator, "refuse_if_never_fits", slow)
    monkeypatch.setattr(admission.threads.check_queue, "_overrun_seconds", 0.01)
    bad, good = admission.tenant("bad"), admission.tenant("good")
    for tenant in (bad, good):
        await tenant.UploadDataset(dataset_parts(TEN_ROWS, "d"))
    slow_spec = spec("tenants/bad/datasets/d", lora=task_pb2.Lora(rank=7, alpha=8, target_modules=["q_proj"]))
    calls = [
        asyncio.ensure_future(bad.EstimateTask(pb.EstimateTaskRequest(spec=slow_spec), timeout=2 * TIMEOUT_SECONDS))
        for _ in range(30)
    ]
    while admission.threads.checks._running[BAD] < 2:  # noqa: ASYNC110  # the server does not notify of it
        await asyncio.sleep(0.001)
    for number in range(3):
        request = pb.CreateTaskRequest(spec=spec("tenants/good/datasets/d", num_steps=4 + number))
        task = (await good.CreateTask(request)).task
        assert (await good.GetTask(pb.GetTaskRequest(name=task.name))).task.name == task.name
        await admission.ledger().PutLease(lease(executor(lease_term=1)))
    assert not any(call.done() for call in calls)
    let_go.set()
    await asyncio.gather(*calls)
