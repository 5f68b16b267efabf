"""Tenants share computation fairly: no tenant's load stops the others."""

import asyncio
import itertools
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.alignment.tokenizer import BackboneTokenizer, EncodedPieces, TextPiece
from muxtune.v1 import alignment_pb2 as pb
from muxtune.v1 import dataset_pb2
from services.alignment.fair_queue import FairQueue
from tests.services.alignment.conftest import TASK, TEN_ROWS, TENANT, Alignment, lines, training
from tests.thoroughness import examples

HOG = "tenants/hog"


@given(
    jobs=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5)), min_size=1, max_size=8),
    num_slots=st.integers(1, 3),
)
@settings(max_examples=examples(50), deadline=None)
def test_few_jobs_run_at_once_and_one_of_each_tenant(jobs: list[tuple[str, int]], num_slots: int) -> None:
    queue, running, most = FairQueue(num_slots, slice_seconds=0), Counter[str](), [0]
    lock, done = threading.Lock(), list[str]()

    def work(tenant: str, num_slices: int) -> None:
        with queue.slot(tenant) as slot:
            for _ in range(num_slices):
                with lock:
                    running[tenant] += 1
                    most[0] = max(most[0], running.total())
                    assert running[tenant] == 1
                threading.Event().wait(0.0001)
                with lock:
                    running[tenant] -= 1
                slot.yield_to_waiting()
        done.append(tenant)

    with ThreadPoolExecutor(len(jobs)) as threads:
        for future in [threads.submit(work, *job) for job in jobs]:
            future.result()
    assert most[0] <= num_slots and len(done) == len(jobs)
    assert not queue.has_waiting and not queue._running


def test_a_tenant_with_many_jobs_gets_every_other_turn() -> None:
    queue, order, ready = FairQueue(num_slots=1, slice_seconds=0), list[str](), threading.Barrier(6)

    def work(tenant: str) -> None:
        ready.wait()
        with queue.slot(tenant) as slot:
            for _ in range(20):
                order.append(tenant)
                slot.yield_to_waiting()

    queue.acquire("first")  # until all of them wait
    with ThreadPoolExecutor(6) as threads:
        futures = [threads.submit(work, tenant) for tenant in (*["many"] * 4, "one", "other")]
        while sum(map(len, queue._waiting.values())) < 6:
            threading.Event().wait(0.001)
        queue.release("first")
        for future in futures:
            future.result()
    together = order[: max(i for i, tenant in enumerate(order) if tenant == "one")]
    gaps = [len(list(group)) for tenant, group in itertools.groupby(together, lambda t: t == "one") if not tenant]
    assert max(gaps) == 2, "between two of its queue each other tenant has one"
    assert Counter(order) == {"many": 80, "one": 20, "other": 20}


def test_a_slot_is_kept_while_no_job_waits_and_waiting_is_not_counted() -> None:
    now = iter(range(0, 1000, 10))
    queue = FairQueue(num_slots=1, slice_seconds=15, monotonic=lambda: float(next(now)))
    with queue.slot("a") as slot:  # at 0
        assert [slot.yield_to_waiting() for _ in range(3)] == [10, 20, 30]
        other = threading.Thread(target=lambda: (queue.acquire("b"), queue.release("b")))
        other.start()
        while not queue.has_waiting:
            threading.Event().wait(0.001)
        assert slot.yield_to_waiting() == 40  # handed on, and back at 50
        other.join()
        assert slot.yield_to_waiting() == 40 + 10


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
