"""Tenants share computation fairly: no tenant's load stops the others."""

import asyncio
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from engine.alignment import jsonl_rows
from engine.alignment.tokenizer import BackboneTokenizer, EncodedPieces, TextPiece
from engine.errors import MalformedDatasetError
from engine.task import Training
from muxtune.v1 import alignment_pb2 as pb
from muxtune.v1 import dataset_pb2
from services.storage.artifact_store import FileEntry
from tests.services.alignment.conftest import TASK, TEN_ROWS, TENANT, Alignment, lines, training

HOG, SECONDS = "tenants/hog", 20.0


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Block the hog's batches in the tokenizer until `held` is set, as work that does not end."""
    held, encode = threading.Event(), BackboneTokenizer.encode

    def encode_later(self: BackboneTokenizer, pieces: list[TextPiece]) -> EncodedPieces:
        if any("oink" in piece.text for piece in pieces):
            held.wait()
        return encode(self, pieces)

    monkeypatch.setattr(BackboneTokenizer, "encode", encode_later)
    yield held
    held.set()


@pytest.fixture
def arrived(alignment: Alignment, monkeypatch: pytest.MonkeyPatch) -> asyncio.Queue[str]:
    """Collect the tenant of every call that requests long work."""
    arrived, threads = asyncio.Queue[str](), alignment.servicer._threads.long
    run = threads.run

    async def record_and_run(tenant: str, *arguments: Any) -> Any:
        arrived.put_nowait(tenant)
        return await run(tenant, *arguments)

    monkeypatch.setattr(threads, "run", record_and_run)
    return arrived


async def test_endless_inspections_do_not_block_other_tenants(
    alignment: Alignment, held: threading.Event, arrived: asyncio.Queue[str]
) -> None:
    """While one tenant has a hundred datasets in progress, cancelled calls included, another tenant's are served."""
    sha256 = (await alignment.store(lines({"text": "oink oink"}), tenant=HOG)).sha256

    def hog(limit: int) -> Any:
        options = dataset_pb2.PreflightOptions(backbone="tiny", training=training(max_sequence_tokens=limit))
        return alignment.stub.InspectDataset(pb.InspectDatasetRequest(tenant=HOG, sha256=sha256, options=options))

    left = [hog(1000 + i) for i in range(80)]
    async with asyncio.timeout(60):
        assert [await arrived.get() for _ in range(1 + 80)] == [HOG] * 81
        for call in left:
            call.cancel()
        under_work = [hog(2000 + i) for i in range(20)]
        assert [await arrived.get() for _ in range(20)] == [HOG] * 20
        stored = await alignment.store(TEN_ROWS)
        options = dataset_pb2.PreflightOptions(backbone="tiny", training=training())
        request = pb.InspectDatasetRequest(tenant=TENANT, sha256=stored.sha256, options=options)
        assert (await alignment.stub.InspectDataset(request)).report.num_rows == 10
        member = pb.Member(task=TASK, dataset_version=stored.sha256, training=training(), num_steps=3)
        streams = (
            alignment.stub.StreamMicrobatches(
                pb.StreamMicrobatchesRequest(backbone="tiny", members=[member], token_budget=128, chunk_tokens=8)
            )
            for _ in range(20)
        )
        read = [[response.microbatch async for response in stream] for stream in streams]
        assert all(len(microbatches) >= 3 for microbatches in read)
    assert not any(call.done() for call in under_work)
    held.set()
    async with asyncio.timeout(60):
        assert all(answer.report.num_rows == 1 for answer in await asyncio.gather(*under_work))


class EndlessFile(io.RawIOBase):
    """An uploaded file that repeats a line until it is told to end, and tells when it was first read."""

    def __init__(self, line: bytes) -> None:
        self.started, self.let_go, self._line = threading.Event(), threading.Event(), line

    def readline(self, size: int | None = -1, /) -> bytes:
        self.started.set()
        return b"" if self.let_go.is_set() else self._line

    def finish(self) -> Any:
        """Act as UploadedFile."""
        path = SimpleNamespace(open=lambda mode: self)
        return SimpleNamespace(path=path, entry=FileEntry("0" * 64, 1))


@pytest.mark.parametrize("line", [b"\n", b" \t\r\n", b'{"text":"row"}\n'], ids=["blank", "white", "rows"])
async def test_datasets_without_end_leave_other_tenants_their_turns(
    alignment: Alignment, line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tenants hold both slots, each with a dataset of lines that never ends; a third one's upload is served."""
    monkeypatch.setattr(jsonl_rows, "MAX_BLANK_LINES", 1 << 60)
    monkeypatch.setattr(jsonl_rows, "MAX_ROWS", 1 << 60)
    monkeypatch.setattr(alignment.datasets._fair_queue, "slice_seconds", 0.001)
    files: list[Any] = [EndlessFile(line), EndlessFile(line)]
    with ThreadPoolExecutor(2) as threads:
        try:
            for number, file in enumerate(files):
                threads.submit(alignment.datasets.store, f"tenants/bad{number}", file)
                assert await asyncio.to_thread(file.started.wait, SECONDS)
            async with asyncio.timeout(SECONDS):
                stored = await alignment.store(TEN_ROWS)
                options = dataset_pb2.PreflightOptions(backbone="tiny", training=training())
                request = pb.InspectDatasetRequest(tenant=TENANT, sha256=stored.sha256, options=options)
                assert (await alignment.stub.InspectDataset(request)).report.num_rows == 10
        finally:
            for file in files:
                file.let_go.set()


def test_blank_lines_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl_rows, "MAX_BLANK_LINES", 3)
    row = b'{"text":"a"}\n'
    assert len(list(jsonl_rows.parse_lines([row, b"\n"] * 3))) == 3
    with pytest.raises(MalformedDatasetError, match="line 8 is one of over 3 blank lines"):
        list(jsonl_rows.parse_lines([row, b"\n"] * 9))


async def test_a_preview_of_many_samples_is_made_in_turns(alignment: Alignment) -> None:
    stored = await alignment.store(TEN_ROWS)
    spec = Training(learning_rate=1e-3, num_epochs=1)
    dataset = alignment.datasets.tokenized(TENANT, stored.sha256, "tiny", spec)
    offered, queue = list[str](), alignment.datasets._fair_queue
    queue.slice_seconds = 0

    def check_wanted() -> None:
        offered.append("turn")

    queue.check_wanted = check_wanted  # type: ignore[method-assign]
    alignment.datasets.inspect(TENANT, "tiny", dataset, spec, 10)
    assert len(offered) >= 10, "at least one for each sample"
