"""Work for a call ends soon after nobody waits for its answer any more."""

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import dataset_pb2
from services.alignment import dataset_store
from tests.services.admission.admission_mesh import (
    TEN_ROWS,
    TIMEOUT_SECONDS,
    Admission,
    Alignment,
    dataset_parts,
    spec,
)

ROW = TEN_ROWS.splitlines(keepends=True)[0]


class Reading:
    """Replaces the files that alignment reads: they repeat a row until `let_go`. Counts the readers."""

    def __init__(self) -> None:
        self.let_go, self.num_readers, self._changed = threading.Event(), 0, threading.Condition()

    @contextmanager
    def file(self) -> Iterator[Any]:
        with self._changed:
            self.num_readers += 1
            self._changed.notify_all()
        rows = itertools.chain([ROW], iter(lambda: b"" if self.let_go.is_set() else ROW, b""))
        try:
            yield SimpleNamespace(readline=lambda _: next(rows, b""))
        finally:
            with self._changed:
                self.num_readers -= 1
                self._changed.notify_all()

    async def has_readers(self, number: int) -> bool:
        def wait() -> bool:
            with self._changed:
                return self._changed.wait_for(lambda: self.num_readers == number, TIMEOUT_SECONDS)

        return await asyncio.to_thread(wait)


@pytest.fixture
async def reading(alignment: Alignment, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Reading]:
    reading, datasets = Reading(), alignment.servicer._datasets
    monkeypatch.setattr(dataset_store, "_verified", lambda *arguments: reading.file())
    monkeypatch.setattr(datasets._fair_queue, "slice_seconds", 0.001)
    yield reading
    reading.let_go.set()


def preflight(name: str) -> pb.PreflightDatasetRequest:
    options = dataset_pb2.PreflightOptions(backbone="tiny", training=spec(name).training)
    return pb.PreflightDatasetRequest(name=name, options=options)


def start(admission: Admission, method: str, name: str, timeout: float = TIMEOUT_SECONDS) -> "asyncio.Future[Any]":
    requests: dict[str, Any] = {
        "PreflightDataset": preflight(name),
        "CreateTask": pb.CreateTaskRequest(spec=spec(name)),
        "EstimateTask": pb.EstimateTaskRequest(spec=spec(name)),
    }
    return asyncio.ensure_future(getattr(admission.tenant(), method)(requests[method], timeout=timeout))


@pytest.mark.parametrize("method", ["PreflightDataset", "CreateTask", "EstimateTask"])
@pytest.mark.parametrize("leave", ["cancel", "deadline"])
async def test_a_dataset_is_not_read_on_for_a_caller_that_has_left(
    admission: Admission, reading: Reading, method: str, leave: str
) -> None:
    dataset = await admission.upload()
    call = start(admission, method, dataset.name, 0.5 if leave == "deadline" else TIMEOUT_SECONDS)
    if leave == "cancel":
        assert await reading.has_readers(1)
        call.cancel()
    with pytest.raises((asyncio.CancelledError, grpc.RpcError)):
        await call
    assert await reading.has_readers(0)
    assert admission.num_rows()["tasks"] == 0


async def test_work_that_another_caller_waits_for_goes_on(admission: Admission, reading: Reading) -> None:
    dataset = await admission.upload()
    calls = [start(admission, "PreflightDataset", dataset.name) for _ in range(3)]
    assert await reading.has_readers(1), "they share one job"
    for call in calls[:2]:
        call.cancel()
    await asyncio.gather(*calls[:2], return_exceptions=True)
    later = start(admission, "PreflightDataset", dataset.name)
    reading.let_go.set()
    reports = [(await call).report for call in (calls[2], later)]
    assert reports[0] == reports[1] and reports[0].num_rows > 0
    # And a job that was stopped is not joined.
    reading.let_go.clear()
    other = await admission.upload(TEN_ROWS + ROW)
    first = start(admission, "PreflightDataset", other.name)
    assert await reading.has_readers(1)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    again = start(admission, "PreflightDataset", other.name)
    assert await reading.has_readers(1)
    reading.let_go.set()
    assert (await again).report.num_rows > 0


async def test_an_uploaded_dataset_is_not_checked_on_for_a_caller_that_has_left(
    admission: Admission, alignment: Alignment, reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = alignment.servicer._datasets
    store = datasets.store

    def store_endless(tenant: str, upload: Any) -> Any:
        with reading.file() as file:
            path = SimpleNamespace(open=lambda mode: contextlib.nullcontext(file))
            received = SimpleNamespace(path=path, entry=upload.finish().entry)
            return store(tenant, SimpleNamespace(finish=lambda: received))

    monkeypatch.setattr(datasets, "store", store_endless)
    call = asyncio.ensure_future(admission.tenant().UploadDataset(dataset_parts(TEN_ROWS)))
    assert await reading.has_readers(1)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert await reading.has_readers(0)
    assert admission.files() == [] and admission.num_rows()["datasets"] == 0
