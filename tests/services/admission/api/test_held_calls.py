"""A tenant holds calls open, by stalled uploads and unread watches: other tenants, operators and the ledger go on."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import pytest

from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import artifact_pb2, key_pb2, ledger_pb2, operator_pb2
from tests.services.admission.admission_mesh import (
    TEN_ROWS,
    TIMEOUT_SECONDS,
    Admission,
    adapter_files,
    adapter_parts,
    dataset_parts,
    executor,
    finished,
    lease,
    spec,
    step,
)

HELD_UPLOADS = (29, 26, 23, 20, 18, 16, 14, 13, 11, 10)  # by each of ten tenants that come one after another
HELD_WATCHES = (114, 102, 90, 80, 71, 63, 56, 50, 45, 40)
NUM_UPLOADS, NUM_WATCHES = 300, 400  # tests/test_mesh_stalled_clients.py has 1,024 watches


class HeldCalls:
    """Opens calls of a tenant and holds them."""

    def __init__(self, admission: Admission, tenant: str) -> None:
        self._admission, self._tenant = admission, tenant
        self._open: set[asyncio.Future[grpc.StatusCode]] = set()

    async def hold_uploads(self, method: str, num_calls: int, num_held: int) -> None:
        """Begin uploads that stall after their headers; check that the server holds some and refuses the others."""
        requests = [self._stalled(method) for _ in range(num_calls)]
        await self._hold([getattr(self._admission.tenant(self._tenant), method)(each) for each in requests], num_held)

    async def hold_watches(self, task: str, num_calls: int, num_held: int) -> None:
        """Begin watches and read nothing; check that the server holds some and refuses the others."""
        tenant, request = self._admission.tenant(self._tenant), pb.WatchTaskRequest(name=task)
        await self._hold([tenant.WatchTask(request).code() for _ in range(num_calls)], num_held)

    async def _hold(self, outcomes: Sequence[Awaitable[Any]], num_held: int) -> None:
        begun = {asyncio.ensure_future(_code(outcome)) for outcome in outcomes}
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while len(begun) > num_held:
                done, begun = await asyncio.wait(begun, return_when=asyncio.FIRST_COMPLETED)
                assert {call.result() for call in done} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert len(begun) == num_held
        self._open |= begun

    async def close(self) -> None:
        for call in self._open:
            call.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    @staticmethod
    async def _stalled(method: str) -> AsyncIterator[Any]:
        make = pb.UploadDatasetRequest if method == "UploadDataset" else pb.UploadAdapterRequest
        name = "" if method == "UploadDataset" else "adapter_config.json"
        yield make(header=artifact_pb2.UploadHeader())
        yield make(file=artifact_pb2.FileHeader(file_name=name, size_bytes=1000, sha256="0" * 64))
        await asyncio.Event().wait()


async def _code(outcome: Awaitable[Any]) -> grpc.StatusCode:
    try:
        result = await outcome
    except grpc.aio.AioRpcError as error:
        return error.code()
    return result if isinstance(result, grpc.StatusCode) else grpc.StatusCode.OK


Hold = Callable[[str], HeldCalls]


@pytest.fixture
async def hold(admission: Admission) -> AsyncIterator[Hold]:
    held: list[HeldCalls] = []

    def of_tenant(tenant: str) -> HeldCalls:
        held.append(HeldCalls(admission, tenant))
        return held[-1]

    yield of_tenant
    for calls in held:
        await calls.close()


async def check_others(admission: Admission) -> None:
    """Check what another tenant, the operator, and scheduling for its ledger get: everything, within the deadline."""
    good, ledger = admission.tenant("good"), admission.ledger()
    uploaded = (await good.UploadDataset(dataset_parts(TEN_ROWS))).dataset
    await good.UploadAdapter(adapter_parts(adapter_files(), "mine"))
    task = (await good.CreateTask(pb.CreateTaskRequest(spec=spec(uploaded.name)))).task.name
    assert (await good.GetTask(pb.GetTaskRequest(name=task))).task.name == task
    downloaded = good.DownloadAdapter(pb.DownloadAdapterRequest(name="tenants/good/adapters/mine"))
    assert [part.file.file_name async for part in downloaded if part.WhichOneof("part") == "file"]
    hints = ledger.WatchChanges(ledger_pb2.WatchChangesRequest())
    assert (await anext(aiter(hints))).revision == 1
    hints.cancel()
    await ledger.PutLease(lease(executor(lease_term=1)))
    (attempt,) = await admission.run(task)
    watch = good.WatchTask(pb.WatchTaskRequest(name=task))
    assert await admission.commit(step(task, attempt, 1), finished(task, attempt)) == ["COMMITTED"] * 2
    assert [event.event.WhichOneof("event") async for event in watch][-2:] == ["step_done", "state_changed"]
    assert (await admission.keys().CreateApiKey(key_pb2.CreateApiKeyRequest(tenant="tenants/good"))).secret
    await admission.operator().GetQuota(operator_pb2.GetQuotaRequest(tenant="tenants/good"))


@pytest.mark.parametrize("method", ["UploadDataset", "UploadAdapter"])
async def test_stalled_uploads_of_one_tenant_stop_nobody_else(admission: Admission, hold: Hold, method: str) -> None:
    await hold("bad").hold_uploads(method, NUM_UPLOADS, HELD_UPLOADS[0])
    await check_others(admission)


async def test_unread_watches_of_one_tenant_stop_nobody_else(admission: Admission, hold: Hold) -> None:
    await hold("bad").hold_watches(await create(admission, "bad"), NUM_WATCHES, HELD_WATCHES[0])
    await check_others(admission)


async def test_ten_tenants_that_hold_all_they_can_stop_nobody_else(admission: Admission, hold: Hold) -> None:
    tenants = [f"bad{number}" for number in range(10)]
    tasks = [await create(admission, tenant) for tenant in tenants]
    for tenant, task, num_uploads, num_watches in zip(tenants, tasks, HELD_UPLOADS, HELD_WATCHES, strict=True):
        await hold(tenant).hold_uploads("UploadDataset", 40, num_uploads)
        await hold(tenant).hold_watches(task, 120, num_watches)
    await check_others(admission)


async def create(admission: Admission, tenant: str) -> str:
    data = (await admission.tenant(tenant).UploadDataset(dataset_parts(TEN_ROWS))).dataset.name
    return (await admission.tenant(tenant).CreateTask(pb.CreateTaskRequest(spec=spec(data)))).task.name


async def test_a_tenants_watches_share_one_rate_and_leave_others_theirs(admission: Admission) -> None:
    """One tenant watches a task of hundreds of events many times over; another's watch is complete long before."""
    admission.watch_events_per_second = 300.0
    await admission.restart()
    await admission.register(incarnation="i2")
    bad, good = await create(admission, "bad"), await create(admission, "good")
    await admission.run(bad, good, lease_term=2)
    steps = [step(bad, 1, number) for number in range(1, 301)]
    await admission.commit(*steps, step(good, 1, 1), finished(good, 1), lease_term=2)
    watches = [admission.tenant("bad").WatchTask(pb.WatchTaskRequest(name=bad)) for _ in range(20)]
    reading = [asyncio.ensure_future(_read(watch, 300)) for watch in watches]
    await asyncio.gather(*(watch.initial_metadata() for watch in watches))
    events = [event async for event in admission.tenant("good").WatchTask(pb.WatchTaskRequest(name=good))]
    assert events[-1].event.WhichOneof("event") == "state_changed"
    assert not any(each.done() for each in reading)
    for watch in watches:
        watch.cancel()
    await asyncio.gather(*reading, return_exceptions=True)


async def _read(watch: Any, num_events: int) -> None:
    """Read so many events."""
    events = aiter(watch)
    for _ in range(num_events):
        await anext(events)
