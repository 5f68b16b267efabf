"""Hostile uploads end with a precise status and leave neither rows nor files."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import artifact_pb2
from tests.services.admission.admission_mesh import (
    DATABASES,
    MAX_DATASET_BYTES,
    MAX_UPLOAD_BYTES,
    TEN_ROWS,
    TIMEOUT_SECONDS,
    Admission,
    adapter_files,
    adapter_parts,
    dataset_parts,
    lines,
    refused,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
CHECKSUM, MALFORMED = "CHECKSUM_MISMATCH", "MALFORMED_DATASET"
SHA256 = hashlib.sha256(TEN_ROWS).hexdigest()
SIZE = len(TEN_ROWS)
both = pytest.mark.parametrize("database_url", DATABASES, indirect=True)

Parts = Iterable[Any]


@pytest.fixture
def temporary(admission: Admission) -> Path:
    """Return the folder of incomplete uploads, of admission and of alignment."""
    return admission.folder.parent / "scratch"


def header(**fields: Any) -> pb.UploadDatasetRequest:
    return pb.UploadDatasetRequest(header=artifact_pb2.UploadHeader(**fields))


def file(size_bytes: int = SIZE, sha256: str = SHA256) -> pb.UploadDatasetRequest:
    return pb.UploadDatasetRequest(file=artifact_pb2.FileHeader(size_bytes=size_bytes, sha256=sha256))


def chunk(offset: int, data: bytes) -> pb.UploadDatasetRequest:
    return pb.UploadDatasetRequest(chunk=artifact_pb2.FileChunk(offset=offset, data=data))


WHOLE = chunk(0, TEN_ROWS)
OUT_OF_ORDER: dict[str, list[pb.UploadDatasetRequest]] = {
    "nothing": [],
    "header only": [header()],
    "header twice": [header(), header(), file(), WHOLE],
    "header again after the file": [header(), file(), header(), WHOLE],
    "header again after a chunk": [header(), file(), WHOLE, header()],
    "file first": [file(), WHOLE],
    "file twice": [header(), file(), file(), WHOLE],
    "file after its chunk": [header(), file(), WHOLE, file()],
    "chunk first": [WHOLE, header(), file()],
    "chunk before file": [header(), WHOLE, file()],
    "an empty message": [pb.UploadDatasetRequest()],
    "an empty message after the header": [header(), pb.UploadDatasetRequest()],
    "an empty message among the chunks": [header(), file(), pb.UploadDatasetRequest(), WHOLE],
    "an id that is none": [header(id="No"), file(), WHOLE],
}
OTHER_BYTES: dict[str, list[pb.UploadDatasetRequest]] = {
    "no chunk": [header(), file()],
    "truncated": [header(), file(), chunk(0, TEN_ROWS[:-1])],
    "wrong hash": [header(), file(sha256="0" * 64), WHOLE],
    "no hash": [header(), file(sha256=""), WHOLE],
    "a hash that is a path": [header(), file(sha256="../../x"), WHOLE],
    "larger than announced": [header(), file(size_bytes=SIZE - 1), WHOLE],
    "smaller than announced": [header(), file(size_bytes=SIZE + 1), WHOLE],
    "negative size": [header(), file(size_bytes=-1), WHOLE],
    "no size": [header(), file(size_bytes=0), WHOLE],
    "first offset": [header(), file(), chunk(1, TEN_ROWS)],
    "negative offset": [header(), file(), chunk(-1, TEN_ROWS)],
    "a gap": [header(), file(), chunk(0, TEN_ROWS[:100]), chunk(101, TEN_ROWS[101:])],
    "an overlap": [header(), file(), chunk(0, TEN_ROWS[:100]), chunk(99, TEN_ROWS[99:])],
    "a chunk twice": [header(), file(), chunk(0, TEN_ROWS[:100]), chunk(0, TEN_ROWS[:100]), chunk(200, b"")],
    "chunks in another order": [header(), file(), chunk(100, TEN_ROWS[100:]), chunk(0, TEN_ROWS[:100])],
    "a bit changed": [header(), file(), chunk(0, TEN_ROWS.replace(b"quick", b"quack", 1))],
}
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "no JSON": (b'{"text": "a"}\n{"text": \n', "2"),
    "two values": (b'{"text": "a"} {"text": "b"}\n', "1"),
    "a list": (b'{"text": "a"}\n\n["b"]\n', "3"),
    "null": (b"null\n", "1"),
    "no known shape": (b'{"rows": 1}\n', "1"),
    "text that is none": (b'{"text": 5}\n', "1"),
    "prompt alone": (b'{"prompt": "a"}\n', "1"),
    "no messages": (lines([{"text": "a"}, {"messages": []}]), "2"),
    "messages that are none": (lines([{"messages": "hello"}]), "1"),
    "a role unknown": (lines([{"messages": [{"role": "boss", "content": "a"}]}]), "1"),
    "no content": (lines([{"messages": [{"role": "user"}]}]), "1"),
    "not UTF-8": (b'{"text": "\xff"}\n', "1"),
    "half a surrogate": (b'{"text": "\\ud800"}\n', "1"),
    "nested beyond reason": (b"[" * 100_000 + b"\n", "1"),
    "a number too long": (b'{"text": "a", "n": ' + b"9" * 10_000 + b"}\n", "1"),
}


class Untouched:
    """Checks that the block leaves the store as it was."""

    def __init__(self, admission: Admission, temporary: Path) -> None:
        self._admission, self._temporary = admission, temporary

    def snapshot(self) -> tuple[Any, ...]:
        return self._admission.num_rows(), self._admission.files(), sorted(self._temporary.glob("*/*/*"))

    def __enter__(self) -> None:
        self._before = self.snapshot()
        assert not self._before[2]

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            assert self.snapshot() == self._before


@pytest.mark.parametrize("case", OUT_OF_ORDER)
async def test_parts_out_of_order(admission: Admission, temporary: Path, case: str) -> None:
    with Untouched(admission, temporary), refused(INVALID, "INVALID_INPUT") as refusal:
        await admission.tenant().UploadDataset(iter(OUT_OF_ORDER[case]))
    assert refusal.fields


async def test_bytes_that_are_not_the_ones_announced(admission: Admission, temporary: Path) -> None:
    for case, parts in OTHER_BYTES.items():
        with Untouched(admission, temporary), refused(INVALID, CHECKSUM) as refusal:
            await admission.tenant().UploadDataset(iter(parts))
        assert refusal.message, case
    assert (await admission.upload()).num_rows == 10


async def test_lines_that_are_no_rows_are_named(admission: Admission, temporary: Path) -> None:
    for case, (data, line) in BAD_LINES.items():
        with Untouched(admission, temporary), refused(INVALID, MALFORMED) as refusal:
            await admission.upload(data)
        assert refusal.metadata.get("line") == line, case


async def test_a_dataset_without_rows(admission: Admission, temporary: Path) -> None:
    for data in (b"", b"\n", b" \n\n\t\n"):
        with Untouched(admission, temporary), refused(INVALID, MALFORMED):
            await admission.upload(data)


async def test_over_the_limit_of_bytes(admission: Admission, temporary: Path) -> None:
    for size in (MAX_DATASET_BYTES + 1, 2**63 - 1):
        with (
            Untouched(admission, temporary),
            refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED") as refusal,
        ):
            await admission.tenant().UploadDataset(dataset_parts(TEN_ROWS, size_bytes=size))
        assert refusal.has(error_details_pb2.QuotaFailure)
    row = lines([{"text": "x" * 1000}])
    data = row * (MAX_DATASET_BYTES // len(row))
    assert (await admission.upload(data, chunk_bytes=1 << 16)).size_bytes == len(data)


async def test_another_tenants_parent(admission: Admission, temporary: Path) -> None:
    admission.tenant("other")
    for parent in ("tenants/other", "tenants/none", "acme", "tenants/acme/"):
        for call, parts in (
            ("UploadDataset", iter([header(parent=parent), file(), WHOLE])),
            ("UploadAdapter", iter([pb.UploadAdapterRequest(header=artifact_pb2.UploadHeader(parent=parent))])),
        ):
            denied = refused(grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
            with Untouched(admission, temporary), denied:
                await getattr(admission.tenant(), call)(parts)


@pytest.mark.parametrize("leave", ["cancel", "deadline"])
@pytest.mark.parametrize("kind", ["dataset", "adapter"])
async def test_a_client_that_leaves_midway(admission: Admission, temporary: Path, kind: str, leave: str) -> None:
    sent, never = asyncio.Event(), asyncio.Event()

    async def half(parts: Iterator[Any]) -> AsyncIterator[Any]:
        for _ in range(4):
            yield next(parts)
        sent.set()
        await never.wait()

    untouched, tenant = Untouched(admission, temporary), admission.tenant()
    with untouched:
        before = untouched.snapshot()
        if kind == "dataset":
            method, parts = tenant.UploadDataset, half(dataset_parts(TEN_ROWS))
        else:
            method, parts = tenant.UploadAdapter, half(adapter_parts(adapter_files()))
        call = asyncio.ensure_future(method(parts, timeout=0.3 if leave == "deadline" else None))
        await sent.wait()
        if leave == "cancel":
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        else:
            with pytest.raises(grpc.RpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while untouched.snapshot() != before:
                await tenant.ListDatasets(pb.ListDatasetsRequest())
    assert (await admission.upload()).num_rows == 10


async def test_a_refusal_comes_while_the_client_still_sends(admission: Admission, temporary: Path) -> None:
    """The first chunk is wrong; the client never reaches its end."""
    never = asyncio.Event()

    async def endless() -> AsyncIterator[Any]:
        for part in OTHER_BYTES["first offset"]:
            yield part
        await never.wait()

    with Untouched(admission, temporary), refused(INVALID, CHECKSUM):
        await admission.tenant().UploadDataset(endless())


@both
async def test_the_same_id_at_once_holds_one_of_the_contents(admission: Admission) -> None:
    contents = [lines([{"text": f"row {i}"}]) for i in range(8)]
    uploads = (admission.upload(data, "one") for data in contents)
    answers = await asyncio.gather(*uploads, return_exceptions=True)
    won = [i for i, answer in enumerate(answers) if not isinstance(answer, BaseException)]
    assert len(won) == 1
    for answer in answers:
        if isinstance(answer, BaseException):
            with refused(grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS"):
                raise answer
    sha256 = hashlib.sha256(contents[won[0]]).hexdigest()
    assert admission.files() == [f"tenants/acme/datasets/{sha256}.jsonl"]
    assert admission.num_rows()["datasets"] == 1
    with refused(grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS"):
        await admission.upload(b'{"text": "more"}\n', "one")
    assert admission.files() == [f"tenants/acme/datasets/{sha256}.jsonl"]


@both
async def test_the_same_bytes_are_stored_once_and_answer_alike(admission: Admission) -> None:
    answers = await asyncio.gather(*(admission.upload(TEN_ROWS, "one") for _ in range(8)))
    assert all(answer == answers[0] for answer in answers)
    again = await admission.upload(TEN_ROWS, "one", sha256=SHA256.upper())
    assert again == answers[0]
    await admission.upload(TEN_ROWS, "two")
    assert admission.num_rows()["datasets"] == 2 and len(admission.files()) == 1


async def test_uploads_and_deletions_at_once_never_leave_a_dataset_without_its_bytes(admission: Admission) -> None:
    for _ in range(6):
        await admission.upload(TEN_ROWS, "one")
        request = pb.DeleteDatasetRequest(name="tenants/acme/datasets/one")
        work = [admission.upload(TEN_ROWS, name) for name in ("one", "two", "one")]
        await asyncio.gather(admission.tenant().DeleteDataset(request), *work, return_exceptions=True)
        held = await admission.tenant().ListDatasets(pb.ListDatasetsRequest())
        assert len(admission.files()) == (1 if held.datasets else 0)
        for dataset in held.datasets:
            await admission.tenant().DeleteDataset(pb.DeleteDatasetRequest(name=dataset.name))
        assert admission.files() == []


def adapter(part: str, **fields: Any) -> pb.UploadAdapterRequest:
    kinds: dict[str, Callable[..., Any]] = {
        "header": artifact_pb2.UploadHeader, "file": artifact_pb2.FileHeader, "chunk": artifact_pb2.FileChunk
    }  # fmt: skip
    return pb.UploadAdapterRequest(**{part: kinds[part](**fields)})


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def broken_adapters() -> Iterator[tuple[str, str, Parts]]:
    """Yield (case, reason, parts) of adapter uploads that must be refused."""
    good = list(adapter_parts(adapter_files()))
    first_chunk = good[2]
    yield "nothing", "INVALID_INPUT", []
    yield "header only", "INVALID_INPUT", good[:1]
    yield "header twice", "INVALID_INPUT", [good[0], *good]
    yield "chunk first", "INVALID_INPUT", good[2:]
    yield "chunk before file", "INVALID_INPUT", [good[0], first_chunk]
    yield "a file twice", "INVALID_INPUT", [*good, good[1]]
    yield "an empty message", "INVALID_INPUT", [good[0], pb.UploadAdapterRequest()]
    yield "an id that is none", "INVALID_INPUT", [adapter("header", id="No"), *good[1:]]
    yield "truncated", CHECKSUM, good[:-1]
    yield "a chunk left out", CHECKSUM, [*good[:2], *good[3:]]
    yield "a chunk twice", CHECKSUM, [*good[:3], *good[2:]]
    wrong = adapter("file", file_name=CONFIG, size_bytes=5, sha256="0" * 64)
    yield "wrong hash", CHECKSUM, [good[0], wrong, adapter("chunk", data=b"12345")]
    for size in (-1, -(2**62)):
        yield "negative size", "INVALID_INPUT", [good[0], adapter("file", file_name=CONFIG, size_bytes=size)]
    for name in ("", "x.bin", "../adapter_config.json", "/etc/passwd", "pytorch_model.bin"):
        yield f"file {name}", "INVALID_INPUT", [good[0], adapter("file", file_name=name, size_bytes=1)]
    files = adapter_files()
    for name in files:
        yield f"{name} alone", "INVALID_INPUT", list(adapter_parts({name: files[name]}))
    for config in (b"", b"[]", b"{", b"5", b'{"peft_type": "LORA"}', b"[" * 100_000, b'{"peft_type": "LOKR", "r": 4}'):
        yield f"configuration {config[:20]!r}", "INVALID_INPUT", list(adapter_parts({**files, CONFIG: config}))
    for rank, alpha in ((0, 1), (-1, 1), ("x", 1), (None, 1), ([], 1), (4, "x"), (1e999, 1), (4, 1e999), (4, 10**400)):
        config = json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": alpha}).encode()
        yield f"rank {rank}, alpha {alpha}", "INVALID_INPUT", list(adapter_parts({**files, CONFIG: config}))
    weights = files[WEIGHTS]
    for data in (
        b"", b"1234567", weights[:-1], weights + b"x", b"\xff" * 40, (2).to_bytes(8, "little") + b"{}",
        *(tensors(*spans) for spans in ([(0, 4), (2, 8)], [(0, 4), (6, 8)], [(8, 0)], [("a", 8)], [(0, None)], [(0,)])),
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
    ):  # fmt: skip
        yield f"weights {data[:60]!r}", "INVALID_INPUT", list(adapter_parts({**files, WEIGHTS: data}))


def tensors(*spans: Any) -> bytes:
    entries = {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": span} for i, span in enumerate(spans)}
    head = json.dumps(entries).encode()
    return len(head).to_bytes(8, "little") + head + b"\0" * 8


async def test_invalid_adapters_are_refused(admission: Admission, temporary: Path) -> None:
    for case, reason, parts in broken_adapters():
        with Untouched(admission, temporary), refused(INVALID, reason) as refusal:
            await admission.tenant().UploadAdapter(iter(parts))
        assert refusal.message, case


async def test_an_adapter_over_the_size_limit_is_refused(admission: Admission, temporary: Path) -> None:
    begin = adapter("header")
    for sizes in ((MAX_UPLOAD_BYTES + 1,), (MAX_UPLOAD_BYTES, 1), (10, 2**62)):
        files = [
            adapter("file", file_name=name, size_bytes=size)
            for name, size in zip((CONFIG, WEIGHTS), sizes, strict=False)
        ]
        with Untouched(admission, temporary), refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"):
            await admission.tenant().UploadAdapter(iter([begin, *files]))


@both
async def test_an_adapters_id_holds_one_of_the_contents(admission: Admission) -> None:
    async def upload(fill: int) -> Any:
        return (await admission.tenant().UploadAdapter(adapter_parts(adapter_files(fill=fill), "one"))).adapter

    answers = await asyncio.gather(*(upload(i % 4) for i in range(8)), return_exceptions=True)
    won = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert len(won) == 2 and won[0] == won[1]  # the same bytes answer alike
    assert len(admission.files()) == 3  # two files and their manifest
    assert admission.num_rows()["adapters"] == 1
    parts = [part async for part in admission.tenant().DownloadAdapter(pb.DownloadAdapterRequest(name=won[0].name))]
    assert [part.file.file_name for part in parts if part.WhichOneof("part") == "file"] == [CONFIG, WEIGHTS]
