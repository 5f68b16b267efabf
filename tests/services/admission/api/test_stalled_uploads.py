"""An upload that waits for its client's bytes keeps nobody from deleting, and bytes that a dataset needs stay."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
import pytest

from engine.errors import QuotaExceededError
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import operator_pb2
from services.admission.cleanup import garbage_collection_loop
from services.admission.cleanup.garbage_collection_loop import GarbageCollectionLoop
from services.admission.cleanup.garbage_collector import GarbageCollector
from services.storage.artifact_layout import CheckpointFolder
from tests.services.admission.admission_mesh import (
    BOTH_DATABASES,
    DATABASES,
    ROWS,
    TEN_ROWS,
    TIMEOUT_SECONDS,
    Admission,
    Alignment,
    dataset_parts,
    lines,
    refused,
    spec,
)

SHA256 = hashlib.sha256(TEN_ROWS).hexdigest()
BAD_BYTES = f"tenants/bad/datasets/{SHA256}.jsonl"


class StalledUpload:
    """Uploads a dataset; waits after a number of messages until it may go on."""

    def __init__(self, admission: Admission, tenant: str, dataset_id: str, num_sent: int | None) -> None:
        self._parts, self._num_sent = list(dataset_parts(TEN_ROWS, dataset_id)), num_sent
        self.sent, self.go_on = asyncio.Event(), asyncio.Event()
        self.call = asyncio.ensure_future(admission.tenant(tenant).UploadDataset(self._requests()))

    async def _requests(self) -> AsyncIterator[Any]:
        num_sent = len(self._parts) if self._num_sent is None else self._num_sent
        for part in self._parts[:num_sent]:
            yield part
        self.sent.set()
        await self.go_on.wait()
        for part in self._parts[num_sent:]:
            yield part


async def delete(admission: Admission, tenant: str, dataset_id: str) -> None:
    request = pb.DeleteDatasetRequest(name=f"tenants/{tenant}/datasets/{dataset_id}")
    await admission.tenant(tenant).DeleteDataset(request)


async def until(condition: Any) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not condition():  # noqa: ASYNC110  # the store does not notify of a deletion
            await asyncio.sleep(0.01)


@pytest.fixture
def collection(admission: Admission, monkeypatch: pytest.MonkeyPatch) -> GarbageCollectionLoop:
    """Return admission's garbage collection, with an interval of milliseconds."""
    monkeypatch.setattr(garbage_collection_loop, "_INTERVAL_SECONDS", 0.02)
    collector = GarbageCollector(admission.database, admission.artifacts)
    remove = admission.servicer.dataset_objects.remove_all_unreferenced
    return GarbageCollectionLoop(collector, remove, admission.threads.cleanup, lambda: iter(()))


@pytest.mark.parametrize("database_url", BOTH_DATABASES, indirect=True)
@pytest.mark.parametrize("num_sent", [2, 5, None], ids=["headers only", "some bytes", "all bytes but the end"])
async def test_a_stalled_upload_holds_up_neither_the_sweep_nor_a_deletion(
    admission: Admission, collection: GarbageCollectionLoop, num_sent: int | None
) -> None:
    await admission.tenant("bad").UploadDataset(dataset_parts(TEN_ROWS, "d"))
    stalled = StalledUpload(admission, "bad", "d2", num_sent)
    await stalled.sent.wait()
    sweeping = asyncio.create_task(collection.run())
    # What another tenant left: bytes without a dataset, and the checkpoints of a task that has ended.
    await admission.tenant("good").UploadDataset(dataset_parts(TEN_ROWS, "d"))
    request = pb.CreateTaskRequest(task_id="t", spec=spec("tenants/good/datasets/d"))
    task = (await admission.tenant("good").CreateTask(request)).task.name
    await admission.tenant("good").CancelTask(pb.CancelTaskRequest(name=task))
    unread = f"tenants/good/datasets/{'0' * 64}.jsonl"
    admission.artifacts.put(unread, b"{}")
    for step in range(3):
        admission.artifacts.commit_folder(CheckpointFolder(task, step, 1).key, {"state": b"x"}, {})
    await until(lambda: not admission.artifacts.exists(unread) and not admission.artifacts.list(f"{task}/checkpoints"))
    await delete(admission, "bad", "d")
    assert BAD_BYTES not in admission.files()
    stalled.go_on.set()
    assert (await stalled.call).dataset.num_rows == 10
    sweeping.cancel()
    with suppress(asyncio.CancelledError):
        await sweeping
    assert BAD_BYTES in admission.files()
    await delete(admission, "bad", "d2")
    assert BAD_BYTES not in admission.files()


@pytest.fixture
async def storing(
    alignment: Alignment, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[asyncio.Event, asyncio.Event]]:
    """Return (stored, go_on): alignment has stored bytes, and does not answer before `go_on`."""
    stored, go_on, loop = asyncio.Event(), asyncio.Event(), asyncio.get_running_loop()
    store = alignment.servicer._datasets.store

    def slow(*arguments: Any) -> Any:
        answer = store(*arguments)
        loop.call_soon_threadsafe(stored.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(TIMEOUT_SECONDS)
        return answer

    monkeypatch.setattr(alignment.servicer._datasets, "store", slow)
    yield stored, go_on
    go_on.set()


@pytest.mark.parametrize("end", ["stored", "refused", "cancelled"])
async def test_bytes_between_alignment_and_their_row_are_kept_until_the_upload_ends(
    admission: Admission, alignment: Alignment, storing: Any, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, go_on = storing
    go_on.set()
    await admission.tenant("bad").UploadDataset(dataset_parts(TEN_ROWS, "d"))
    stored.clear()
    go_on.clear()
    upload = asyncio.ensure_future(admission.tenant("bad").UploadDataset(dataset_parts(TEN_ROWS, "d2")))
    await stored.wait()
    await delete(admission, "bad", "d")
    await admission.servicer.dataset_objects.remove_all_unreferenced()
    assert BAD_BYTES in admission.files(), "the upload has not written its row yet"

    def refuse(*_: Any) -> None:
        raise QuotaExceededError("nothing more")

    if end == "cancelled":
        upload.cancel()
    elif end == "refused":
        monkeypatch.setattr(admission.controller, "check_dataset_bytes", refuse)
    go_on.set()
    if end == "stored":
        await upload
        assert BAD_BYTES in admission.files()
    elif end == "refused":
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"):
            await upload
        assert BAD_BYTES not in admission.files()
    await until(lambda: not admission.servicer.dataset_objects.num_holds)
    await until(lambda: (BAD_BYTES in admission.files()) == (end == "stored"))


@pytest.mark.parametrize("database_url", DATABASES, indirect=True)
@pytest.mark.parametrize("damage", ["lost", "cut short", "changed"])
async def test_an_upload_restores_bytes_that_the_store_lost(admission: Admission, damage: str) -> None:
    dataset = await admission.upload(TEN_ROWS, "one", request_id="r1")
    path = admission.folder / admission.files()[0]
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(TEN_ROWS[:-9] if damage == "cut short" else TEN_ROWS.replace(b"quick", b"quack"))
    await admission.operator().SetQuota(quota_of(len(TEN_ROWS)))  # full: the dataset counts already
    assert await admission.upload(TEN_ROWS, "one", request_id="r1") == dataset
    assert path.read_bytes() == TEN_ROWS and admission.num_rows()["datasets"] == 1
    path.unlink()
    await admission.operator().SetQuota(quota_of(2 * len(TEN_ROWS)))
    await admission.upload(TEN_ROWS, "two")  # other datasets of these bytes are restored with it
    assert path.read_bytes() == TEN_ROWS
    with refused(grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS"):
        await admission.upload(lines(ROWS[:2]), "one")


def quota_of(max_dataset_bytes: int) -> Any:
    quota = operator_pb2.Quota(max_dataset_bytes=max_dataset_bytes)
    return operator_pb2.SetQuotaRequest(tenant="tenants/acme", quota=quota)
