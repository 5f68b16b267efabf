"""Streams send the microbatches that the engine packs, not far ahead of the reader, without blocking the event loop."""

import asyncio
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.alignment import packing
from engine.alignment.dataset import num_steps, split
from engine.alignment.microbatch import Microbatch
from engine.alignment.packing import PackedTask
from engine.errors import InvalidInputError, NotFoundError, UnavailableError
from muxtune.v1 import alignment_pb2 as pb
from muxtune.v1 import alignment_pb2_grpc
from services.alignment import servicer as servicer_module
from services.conversion.microbatch import microbatch_to_domain, microbatch_to_proto
from services.conversion.task import training_to_domain
from services.rpc.client_channel import open_channel, open_sync_channel, translate_rpc_errors
from services.storage.artifact_store import ArtifactStore
from tests.services.alignment.conftest import (
    SECRET,
    TASK,
    TEN_ROWS,
    TENANT,
    Alignment,
    lines,
    training,
    upload,
)
from tests.tiny_tokenizer import write_tokenizer


def _member(sha256: str, task: str = TASK, num_steps: int = 3, cursor: int = 0, **fields: Any) -> pb.Member:
    return pb.Member(
        task=task, dataset_version=sha256, training=training(**fields), num_steps=num_steps, cursor_step=cursor
    )


def _request(*members: pb.Member, **fields: Any) -> pb.StreamMicrobatchesRequest:
    return pb.StreamMicrobatchesRequest(
        **{"backbone": "tiny", "members": members, "token_budget": 128, "chunk_tokens": 8, **fields}
    )


async def _read(alignment: Alignment, request: pb.StreamMicrobatchesRequest) -> list[pb.Microbatch]:
    return [response.microbatch async for response in alignment.stub.StreamMicrobatches(request)]


async def test_streams_what_the_engine_packs(alignment: Alignment) -> None:
    first = await alignment.store(TEN_ROWS)
    second = await alignment.store(lines({"text": "hello"}, {"prompt": "1 2", "completion": " 3"}), tenant="tenants/b")
    members = [
        _member(first.sha256, num_steps=2, cursor=1, heldout_fraction=0.2, seed=5),
        _member(second.sha256, "tenants/b/tasks/two", num_steps=2, num_epochs=2, seed=2**64 - 1),
    ]
    received = await _read(alignment, _request(*members))
    expected = []
    for member in members:
        values = training_to_domain(member.training)
        dataset = alignment.datasets.tokenized(
            member.task.rpartition("/tasks/")[0], member.dataset_version, "tiny", values
        )
        steps = num_steps(values, len(split(dataset.num_rows, values).train))
        expected.append(PackedTask(member.task, dataset, values, steps, member.cursor_step))
    assert received == [microbatch_to_proto(m) for m in packing.rounds(expected, 128, 8)]
    assert {r.task for m in received for r in m.ranges} == {TASK, "tenants/b/tasks/two"}
    assert {r.step for m in received for r in m.ranges if r.task == TASK} == {1, 2}
    for message in received:
        domain = microbatch_to_domain(message)
        assert microbatch_to_proto(domain) == message


async def test_the_same_request_streams_the_same_and_a_cursor_the_rest(alignment: Alignment) -> None:
    sha256 = (await alignment.store(TEN_ROWS)).sha256
    whole = await _read(alignment, _request(_member(sha256)))
    assert await _read(alignment, _request(_member(sha256))) == whole
    rest = await _read(alignment, _request(_member(sha256, cursor=2)))
    assert [m.token_ids for m in rest] == [m.token_ids for m in whole if m.ranges[0].step >= 2]
    assert await _read(alignment, _request(_member(sha256, cursor=3))) == []


async def test_a_trainer_without_asyncio_reads_the_same(alignment: Alignment) -> None:
    sha256 = (await alignment.store(TEN_ROWS)).sha256

    def read() -> list[pb.Microbatch]:
        with open_sync_channel(alignment.address, SECRET) as channel, translate_rpc_errors():
            stub = alignment_pb2_grpc.AlignmentServiceStub(channel)
            return [response.microbatch for response in stub.StreamMicrobatches(_request(_member(sha256)))]

    assert await asyncio.to_thread(read) == await _read(alignment, _request(_member(sha256)))


SHA = "0" * 64


@pytest.mark.parametrize(
    ("request_", "error", "text"),
    [
        (_request(), InvalidInputError, "members"),
        (_request(_member(SHA), _member(SHA)), InvalidInputError, "each task once"),
        (_request(_member(SHA), chunk_tokens=0), InvalidInputError, "chunk_tokens"),
        (_request(_member(SHA), chunk_tokens=24), InvalidInputError, "power of two"),
        (_request(_member(SHA), token_budget=0), InvalidInputError, "token_budget"),
        (_request(_member(SHA), backbone="huge"), InvalidInputError, "huge"),
        (_request(_member(SHA)), NotFoundError, SHA),
        (_request(_member("nonsense")), InvalidInputError, "is not a dataset"),
        (_request(_member(SHA, task="one")), InvalidInputError, "is not a dataset"),
        (_request(_member(SHA, global_batch_size=-2)), InvalidInputError, "global_batch_size"),
        (_request(pb.Member(task=TASK, dataset_version=SHA, num_steps=1)), InvalidInputError, "num_steps"),
    ],
)
async def test_an_invalid_stream_request_is_refused(
    alignment: Alignment, request_: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        await _read(alignment, request_)


@pytest.mark.parametrize(("steps", "cursor"), [(4, 0), (0, 0), (3, 4), (3, -1)])
async def test_counts_that_differ_from_the_datasets_are_refused(alignment: Alignment, steps: int, cursor: int) -> None:
    sha256 = (await alignment.store(TEN_ROWS)).sha256
    with pytest.raises(InvalidInputError, match=r"num_steps|cursor_step"):
        await _read(alignment, _request(_member(sha256, num_steps=steps, cursor=cursor)))


@pytest.fixture
def microbatches(monkeypatch: pytest.MonkeyPatch) -> list[Microbatch]:
    """Collects every microbatch that the service makes, sent or not."""
    collected: list[Microbatch] = []

    def counted(*arguments: Any) -> Any:
        for microbatch in packing.rounds(*arguments):
            collected.append(microbatch)
            yield microbatch

    monkeypatch.setattr(servicer_module, "rounds", counted)
    return collected


async def test_never_far_ahead_of_its_reader(alignment: Alignment, microbatches: list[Microbatch]) -> None:
    """Without backpressure the 20,000 steps of about 100 KiB each would be packed at once."""
    rows = lines(*({"text": "the quick brown fox " * 250} for _ in range(16)))
    sha256 = (await alignment.store(rows)).sha256
    member = _member(
        sha256, num_steps=20_000, num_epochs=0, global_batch_size=16, max_sequence_tokens=900, micro_batch_size=16
    )
    member.training.num_steps = 20_000
    call = alignment.stub.StreamMicrobatches(_request(member, token_budget=16_384))
    reading = aiter(call)
    await anext(reading)
    counts = [-1]
    async with asyncio.timeout(30):
        while len(microbatches) != counts[-1]:  # until it has stopped by itself
            counts.append(len(microbatches))
            await asyncio.sleep(0.5)
    size_bytes = microbatches[0].num_tokens * 8
    assert len(microbatches) * size_bytes < 32 << 20, f"{len(microbatches)} microbatches of {size_bytes} bytes ahead"
    stopped_at = len(microbatches)
    for _ in range(stopped_at + 5):
        await anext(reading)
    assert len(microbatches) > stopped_at  # reading on makes it go on
    reading.cancel()


async def test_a_reader_that_leaves_ends_the_work(alignment: Alignment, microbatches: list[Microbatch]) -> None:
    sha256 = (await alignment.store(TEN_ROWS)).sha256
    member = _member(sha256, num_steps=1_000_000)
    member.training.num_steps = 1_000_000
    reading = aiter(alignment.stub.StreamMicrobatches(_request(member)))
    for _ in range(3):
        await anext(reading)
    reading.cancel()
    count = -1
    async with asyncio.timeout(30):
        while len(microbatches) != count:
            count = len(microbatches)
            await asyncio.sleep(0.3)
    assert count < 1_000_000


async def test_closing_ends_streams_with_unavailable(alignment: Alignment) -> None:
    sha256 = (await alignment.store(TEN_ROWS)).sha256
    member = _member(sha256, num_steps=1_000_000)
    member.training.num_steps = 1_000_000
    reading = aiter(alignment.stub.StreamMicrobatches(_request(member)))
    await anext(reading)
    alignment.servicer.close()
    with pytest.raises(UnavailableError, match="stopping"):
        async with asyncio.timeout(30):
            async for _ in reading:
                pass
    with pytest.raises(UnavailableError, match="stopping"):  # before anything is tokenized
        await alignment.store(lines({"text": "new"}))


async def test_a_bad_member_does_not_harm_other_streams(alignment: Alignment) -> None:
    sha256 = (await alignment.store(TEN_ROWS)).sha256
    good, bad = _request(_member(sha256)), _request(_member(SHA))
    results = await asyncio.gather(
        *(_read(alignment, request) for request in (good, bad, good)), return_exceptions=True
    )
    assert results[0] == results[2] and isinstance(results[1], NotFoundError)


async def test_a_slice_larger_than_a_message_is_refused_with_its_task(alignment: Alignment) -> None:
    """Once packed, it ended the stream of all tasks of the hTask, each time again."""
    sha256 = (await alignment.store(lines(*({"text": "the quick brown fox"} for _ in range(10))))).sha256
    other = TASK + "-2"
    large = _member(sha256, task=other, max_sequence_tokens=1024, micro_batch_size=1024)
    await _read(alignment, _request(large))
    large.num_virtual_tokens = 1
    with pytest.raises(InvalidInputError, match=rf"{other}.*micro_batch_size.*at most 1048576"):
        await _read(alignment, _request(_member(sha256), large))


async def test_concurrent_requests_share_one_tokenization(
    alignment: Alignment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.alignment import dataset_store as catalog_module

    calls, real = itertools.count(), catalog_module.tokenize_dataset
    monkeypatch.setattr(
        catalog_module, "tokenize_dataset", lambda *arguments: (next(calls), time.sleep(0.05), real(*arguments))[2]
    )
    sha256 = (await alignment.store(TEN_ROWS)).sha256
    members = [_member(sha256, f"tenants/acme/tasks/t{i}") for i in range(4)]
    await asyncio.gather(*(_read(alignment, _request(member)) for member in members))
    assert next(calls) == 1


async def test_the_cache_is_bounded_in_bytes(alignment: Alignment, tmp_path: Path) -> None:
    from services.alignment.dataset_store import DatasetStore

    datasets = DatasetStore(ArtifactStore.open(str(alignment.folder)), {"tiny": tmp_path / "tiny"}, cache_bytes=10_000)
    values = training_to_domain(training())
    shas = [(await alignment.store(lines({"text": f"{i} " + "fox " * 400}))).sha256 for i in range(8)]
    sizes = [datasets.tokenized(TENANT, sha256, "tiny", values).num_bytes for sha256 in shas]
    assert sum(sizes) > 10_000
    assert sum(dataset.num_bytes for dataset in datasets._cache.values()) <= 10_000
    again = datasets.tokenized(TENANT, shas[-1], "tiny", values)
    assert datasets.tokenized(TENANT, shas[-1], "tiny", values) is again  # the newest stayed
    for i in range(20):  # a few bytes each, and kilobytes of objects
        datasets.tokenized(TENANT, (await alignment.store(lines({"text": f"{i} fox"}))).sha256, "tiny", values)
    assert 1 <= len(datasets._cache) < 5
    for key in list(datasets._cache):
        datasets.remove(TENANT, key.sha256)
    assert datasets._cached_bytes == 0


async def _start(folder: Path, **settings: str) -> tuple[asyncio.subprocess.Process, str]:
    ready = folder / "ready.json"
    environment = {
        **os.environ,
        "MUXTUNE_MESH_SECRET": SECRET,
        "MUXTUNE_ARTIFACT_URL": str(folder / "store"),
        "MUXTUNE_BACKBONES": f"tiny={folder / 'tiny'}",
        "MUXTUNE_READY_FILE": str(ready),
        **settings,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.alignment", env=environment, stderr=asyncio.subprocess.PIPE
    )
    while not ready.exists() and process.returncode is None:  # noqa: ASYNC110  # the file is the event
        await asyncio.sleep(0.02)
    return process, json.loads(ready.read_text())["address"] if ready.exists() else ""


@pytest.fixture
async def process(tmp_path: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    write_tokenizer(tmp_path / "tiny")
    async with asyncio.timeout(60):
        process, address = await _start(tmp_path)
    yield process, address
    if process.returncode is None:
        process.kill()
    await process.wait()


async def test_healthy_while_it_tokenizes_and_stops_at_sigterm(
    process: tuple[asyncio.subprocess.Process, str],
) -> None:
    """Health answers while a thread tokenizes for seconds; SIGTERM meanwhile exits with 0, soon."""
    running, address = process
    rows = lines(*({"text": "the quick brown fox " * 40 + str(i)} for i in range(40_000)))
    async with open_channel(address, SECRET) as channel, grpc.aio.insecure_channel(address) as plain:
        stub: Any = alignment_pb2_grpc.AlignmentServiceStub(channel)
        sha256 = (await stub.StoreDataset(upload(rows, chunk_bytes=1 << 20))).sha256
        member = _member(sha256, num_steps=10_000)
        inspecting = asyncio.create_task(anext(aiter(stub.StreamMicrobatches(_request(member)))))
        health = health_pb2_grpc.HealthStub(plain)
        waits = []
        for _ in range(20):
            started = time.monotonic()
            answer = await health.Check(health_pb2.HealthCheckRequest(service="muxtune.v1.AlignmentService"))
            waits.append(time.monotonic() - started)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            await asyncio.sleep(0.02)
        assert not inspecting.done(), "too fast to say anything: take more rows"
        assert sorted(waits)[-2] < 1.0
        started = time.monotonic()
        running.send_signal(signal.SIGTERM)
        with pytest.raises(UnavailableError):
            await inspecting
        async with asyncio.timeout(30):
            assert await running.wait() == 0
        assert time.monotonic() - started < 10


async def test_a_folder_without_a_tokenizer_is_refused_at_start(tmp_path: Path) -> None:
    async with asyncio.timeout(60):
        process, address = await _start(tmp_path)
        assert process.stderr is not None
        text = (await process.stderr.read()).decode()
        assert await process.wait() == 1
    assert address == ""
    assert "MUXTUNE_BACKBONES" in text and "has no valid tokenizer.json" in text
