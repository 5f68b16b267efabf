"""Uploads in progress are on the disk and counted; checks of adapters take turns: no tenant's uploads delay others."""

import asyncio
import hashlib
import itertools
import json
import random
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from engine.errors import OverloadedError, QuotaExceededError
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import operator_pb2
from services.admission.policy import safetensors_check
from services.admission.policy.adapter_upload import AdapterUpload
from services.admission.store.idempotency import hash_parts
from services.concurrency.byte_budget import ByteBudget
from services.rpc.call_limits import CallLimits
from tests.services.admission.admission_mesh import (
    TEN_ROWS,
    TIMEOUT_SECONDS,
    Admission,
    adapter_files,
    adapter_parts,
    dataset_parts,
    executor,
    lease,
    lines,
    refused,
)

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def weights(num_tensors: int, num_elements: int = 1, fill: bytes = b"\0") -> bytes:
    size = 4 * num_elements
    header = json.dumps(
        {
            f"t{i}": {"dtype": "F32", "shape": [num_elements], "data_offsets": [i * size, (i + 1) * size]}
            for i in range(num_tensors)
        }
    ).encode()
    return len(header).to_bytes(8, "little") + header + fill * (size * num_tensors)


class StalledUpload:
    """An upload that sends all but the last `num_left` messages, and those when it may go on."""

    def __init__(self, call: Callable[..., Any], parts: Iterator[Any], num_left: int = 1) -> None:
        self._parts, self._num_left = list(parts), num_left
        self.go_on = asyncio.Event()
        self.call = asyncio.ensure_future(call(self._requests(), timeout=3 * TIMEOUT_SECONDS))

    async def _requests(self) -> AsyncIterator[Any]:
        for part in self._parts[: len(self._parts) - self._num_left]:
            yield part
        await self.go_on.wait()
        for part in self._parts[len(self._parts) - self._num_left :]:
            yield part


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not condition():  # noqa: ASYNC110  # the disk does not notify
            await asyncio.sleep(0.005)


def scratch_bytes(admission: Admission) -> int:
    """Return the bytes of all temporary files, of admission and of alignment."""
    return sum(path.stat().st_size for path in (admission.folder.parent / "scratch").rglob("*") if path.is_file())


async def test_adapters_in_transit_are_on_the_disk_and_not_in_memory(admission: Admission) -> None:
    """Eight uploads of 12 MiB stall before their last chunk; then they are checked, stored and downloaded."""
    admission.servicer._max_upload_bytes = 16 << 20
    admission.servicer._uploads = ByteBudget("unfinished uploads", 1 << 30, 1 << 30)
    files = {CONFIG: adapter_files()[CONFIG], WEIGHTS: weights(3, 1 << 20)}
    size, bad = len(files[WEIGHTS]), admission.tenant("bad")
    parts = [list(adapter_parts(files, f"a{i}", chunk_bytes=1 << 20)) for i in range(8)]
    tracemalloc.start()
    try:
        uploads = [StalledUpload(bad.UploadAdapter, iter(each)) for each in parts]
        await until(lambda: scratch_bytes(admission) >= 8 * (size - (3 << 20)))
        assert tracemalloc.get_traced_memory()[0] < 3 * size, "eight of them are in progress"
        tracemalloc.reset_peak()
        for upload in uploads:
            upload.go_on.set()
        await asyncio.gather(*(upload.call for upload in uploads))
        request, received = pb.DownloadAdapterRequest(name="tenants/bad/adapters/a0"), 0
        async for part in bad.DownloadAdapter(request):
            received += len(part.chunk.data)
        assert received == size + len(files[CONFIG])
        assert tracemalloc.get_traced_memory()[1] < 4 * size
    finally:
        tracemalloc.stop()
    assert scratch_bytes(admission) == 0


@pytest.mark.parametrize("name", ["new", "existing"])
@pytest.mark.parametrize("kind", ["datasets", "adapters"])
async def test_bytes_of_uploads_in_progress_count_in_the_quota(admission: Admission, kind: str, name: str) -> None:
    """The quota has room for one; an upload under an existing name may repeat what is stored and is no way around."""
    bad, good = admission.tenant("bad"), admission.tenant("good")
    rows = lines([{"text": "x" * 5_000}] * 10)
    files = {CONFIG: adapter_files()[CONFIG], WEIGHTS: weights(1, 12_500)}
    size = len(rows) if kind == "datasets" else sum(map(len, files.values()))
    method = "UploadDataset" if kind == "datasets" else "UploadAdapter"

    def parts(upload_id: str) -> Iterator[Any]:
        if kind == "datasets":
            return dataset_parts(rows, upload_id, chunk_bytes=10_000)
        return adapter_parts(files, upload_id, chunk_bytes=10_000)

    if name == "existing":
        await getattr(bad, method)(adapter_parts(adapter_files(), "d") if kind == "adapters" else parts("d"))
        if kind == "datasets":  # its bytes are lost, so that they are received again
            for path in admission.folder.rglob("*.jsonl"):
                path.unlink()
    upload_id = "d" if name == "existing" else ""
    quota = operator_pb2.Quota(max_dataset_bytes=size + 100, max_adapter_bytes=size + 100)
    await admission.operator().SetQuota(operator_pb2.SetQuotaRequest(tenant="tenants/bad", quota=quota))
    first = StalledUpload(getattr(bad, method), parts(upload_id))
    await until(lambda: admission.servicer._uploads.taken("tenants/bad", kind) >= size)
    for _ in range(8):
        with refused(EXHAUSTED, "QUOTA_EXCEEDED") as refusal:
            await getattr(bad, method)(parts(upload_id))
        assert "uploads in progress" in refusal.message
    assert scratch_bytes(admission) <= size + 100
    await getattr(good, method)(parts("d"))
    first.call.cancel()
    await asyncio.gather(first.call, return_exceptions=True)
    await until(lambda: admission.servicer._uploads.taken("tenants/bad", kind) == scratch_bytes(admission) == 0)
    if kind == "datasets" or name == "new":
        await getattr(bad, method)(parts(upload_id))


async def test_uploads_of_several_tenants_leave_room_for_another(admission: Admission) -> None:
    """Three tenants open as many uploads as they can, of datasets and adapters, and stall."""
    admission.servicer._uploads = ByteBudget("unfinished uploads", 1_000_000, 400_000)
    rows, stalled = lines([{"text": "x" * 9_900}] * 10), []
    files = {CONFIG: adapter_files()[CONFIG], WEIGHTS: weights(1, 24_500)}
    uploads = admission.servicer._uploads
    for number, tenant in enumerate(("bad0", "bad1", "bad2", "bad0", "bad1", "bad2")):
        caller = admission.tenant(tenant)
        call, parts = (
            (caller.UploadDataset, partial(dataset_parts, rows, chunk_bytes=10_000))
            if number % 2
            else (caller.UploadAdapter, partial(adapter_parts, files, chunk_bytes=10_000))
        )
        while True:
            try:
                with uploads.take(f"tenants/{tenant}", "test", 100_000):
                    pass
            except (OverloadedError, QuotaExceededError):
                break
            stalled.append(StalledUpload(call, parts()))
            before = uploads._bytes.total()
            await until(lambda before=before: uploads._bytes.total() >= before + 90_000)  # type: ignore[misc]
        with pytest.raises(grpc.RpcError) as caught:
            await call(parts())
        assert caught.value.code() is EXHAUSTED  # type: ignore[attr-defined]
    assert scratch_bytes(admission) <= 1_000_000 and len(stalled) == 9
    good = admission.tenant("good")
    await good.UploadDataset(dataset_parts(rows, chunk_bytes=10_000))
    await good.UploadAdapter(adapter_parts(files, chunk_bytes=10_000))
    with refused(EXHAUSTED, "OVERLOADED") as refusal:
        await admission.tenant("last").UploadDataset(dataset_parts(rows * 3, chunk_bytes=10_000))
    assert refusal.has(error_details_pb2.RetryInfo)
    for upload in stalled:
        upload.call.cancel()
    await asyncio.gather(*(upload.call for upload in stalled), return_exceptions=True)
    await until(lambda: not uploads._bytes)


async def test_weights_of_too_many_tensors_are_refused_before_they_are_sent(admission: Admission) -> None:
    """No backbone here has so many; the client has sent the first chunk and stalls."""
    admission.servicer._max_upload_bytes = 1 << 30
    files = {CONFIG: adapter_files()[CONFIG], WEIGHTS: weights(100_000)}
    parts = list(adapter_parts({CONFIG: files[CONFIG], WEIGHTS: files[WEIGHTS]}, chunk_bytes=1000))[:5]
    upload = StalledUpload(admission.tenant("bad").UploadAdapter, iter([*parts, *parts[:1]]))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT") as refusal:
        await upload.call
    assert refusal.fields == [WEIGHTS]
    few = {CONFIG: files[CONFIG], WEIGHTS: weights(4097)}
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT") as refusal:
        await admission.tenant("bad").UploadAdapter(adapter_parts(few, chunk_bytes=1 << 20))
    assert "4097 tensors; 1 to 4096 are allowed" in refusal.message
    await admission.tenant("good").UploadAdapter(adapter_parts({**few, WEIGHTS: weights(4096)}, chunk_bytes=1 << 20))


@pytest.fixture
def let_go(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Block the checks of tensors of a thousand elements until it is set."""
    let_go, check = threading.Event(), safetensors_check._check_tensor

    def slow(entry: dict[str, Any], *arguments: int) -> int:
        if entry["shape"] == [1000]:
            assert let_go.wait(TIMEOUT_SECONDS)
        return check(entry, *arguments)

    monkeypatch.setattr(safetensors_check, "_check_tensor", slow)
    yield let_go
    let_go.set()


async def test_checks_of_many_adapters_delay_neither_leases_nor_other_tenants(
    admission: Admission, let_go: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eighty adapters are in check, and none of them ends; everything that another tenant does goes on."""
    admission.call_limits = CallLimits(max_uploads=1024)  # by default a tenant has fewer uploads at once
    await admission.restart()
    term = await admission.register()
    monkeypatch.setattr(admission.threads.check_queue, "_overrun_seconds", 0.01)
    bad, good = admission.tenant("bad"), admission.tenant("good")
    files = {CONFIG: adapter_files()[CONFIG], WEIGHTS: weights(20, 1000)}
    uploads = [asyncio.ensure_future(bad.UploadAdapter(adapter_parts(files, chunk_bytes=1 << 20))) for _ in range(80)]
    await until(lambda: admission.threads.checks._running["tenants/bad"] == 2)
    dataset = (await good.UploadDataset(dataset_parts(TEN_ROWS, "d"))).dataset
    for number in range(3):
        await admission.ledger().PutLease(lease(executor(lease_term=term)))
        await good.UploadAdapter(adapter_parts(adapter_files(), f"a{number}"))
        assert (await good.GetDataset(pb.GetDatasetRequest(name=dataset.name))).dataset == dataset
        assert len((await good.ListAdapters(pb.ListAdaptersRequest())).adapters) == number + 1
    assert not any(upload.done() for upload in uploads)
    let_go.set()
    await asyncio.gather(*uploads)


async def test_checks_of_tensors_are_made_in_turns(admission: Admission, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tenants' adapters of a thousand tensors each are checked side by side, not one after the other."""
    queue = admission.threads.check_queue
    monkeypatch.setattr(queue, "slice_seconds", 0)
    monkeypatch.setattr(queue, "_overrun_seconds", TIMEOUT_SECONDS)
    checked, check = list[int](), safetensors_check._check_tensor

    def record(entry: dict[str, Any], *rest: int) -> int:
        while not checked and not queue.has_waiting:  # the first one waits until the other one waits for its turn
            threading.Event().wait(0.001)
        checked.append(entry["shape"][0])
        return check(entry, *rest)

    monkeypatch.setattr(safetensors_check, "_check_tensor", record)
    await asyncio.gather(
        *(
            admission.tenant(tenant).UploadAdapter(
                adapter_parts({CONFIG: adapter_files()[CONFIG], WEIGHTS: weights(1000, size)}, chunk_bytes=1 << 20)
            )
            for tenant, size in (("bad", 1), ("good", 2))
        )
    )
    assert len(checked) == 2000
    assert sum(a != b for a, b in itertools.pairwise(checked)) > 500


async def test_an_adapter_whose_files_the_store_lost_is_restored(admission: Admission) -> None:
    acme = admission.tenant()
    adapter = (await acme.UploadAdapter(adapter_parts(adapter_files(), "one", request_id="r1"))).adapter
    before = admission.files()
    for request_id, damaged in (("r1", WEIGHTS), ("r2", "manifest.json"), ("r3", CONFIG)):
        for path in admission.folder.rglob(damaged):
            path.unlink()
        parts = adapter_parts(adapter_files(), "one", request_id=request_id)
        assert (await acme.UploadAdapter(parts)).adapter == adapter
        assert admission.files() == before
        received = b""
        async for part in acme.DownloadAdapter(pb.DownloadAdapterRequest(name=adapter.name)):
            received += part.chunk.data
        assert received == b"".join(adapter_files().values())


def test_the_digest_of_an_adapter_is_the_hash_of_its_parts(tmp_path: Any) -> None:
    """Uploads of earlier versions are found by it."""
    files = adapter_files()
    upload = AdapterUpload(tmp_path, 1 << 20, 10)
    for part in random.Random(1).sample([*files], 2):
        sha256 = hashlib.sha256(files[part]).hexdigest()
        upload.start_file(pb.UploadAdapterRequest(file={"file_name": part, "size_bytes": len(files[part]),
                                                        "sha256": sha256}).file)  # fmt: skip
        upload.add_chunk(pb.UploadAdapterRequest(chunk={"data": files[part]}).chunk)
        upload.write()
    assert upload.finish(lambda: None).digest == hash_parts(files[CONFIG], files[WEIGHTS])
