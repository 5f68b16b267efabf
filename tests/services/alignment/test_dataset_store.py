"""Datasets are stored whole and checked, or not at all."""

import asyncio
import hashlib
from typing import Any

import grpc
import pytest

from engine.errors import (
    ArtifactCorruptError,
    ChecksumMismatchError,
    InvalidInputError,
    MalformedDatasetError,
    NotFoundError,
    QuotaExceededError,
    UnauthenticatedError,
)
from muxtune.v1 import alignment_pb2 as pb
from muxtune.v1 import alignment_pb2_grpc, dataset_pb2
from services.rpc.client_channel import open_channel
from tests.services.alignment.conftest import (
    MAX_DATASET_BYTES,
    TEN_ROWS,
    TENANT,
    Alignment,
    chunk,
    lines,
    training,
    upload,
)

SHA = hashlib.sha256(TEN_ROWS).hexdigest()


def _inspect(sha256: str = SHA, **fields: Any) -> pb.InspectDatasetRequest:
    options = dataset_pb2.PreflightOptions(backbone="tiny", training=training(), **fields)
    return pb.InspectDatasetRequest(tenant=TENANT, sha256=sha256, options=options)


async def test_a_dataset_is_stored_under_its_tenant_and_counted(alignment: Alignment) -> None:
    data = lines({"text": "a"}, {"prompt": "a", "completion": "b"}, {"text": "c"}) + b"\n\n"
    answer = await alignment.store(data, chunk_bytes=5)
    assert (answer.sha256, answer.size_bytes, answer.num_rows) == (hashlib.sha256(data).hexdigest(), len(data), 3)
    assert dict(answer.num_rows_by_shape) == {"text": 2, "prompt_completion": 1}
    (key,) = alignment.stored()
    assert key == f"tenants/acme/datasets/{answer.sha256}.jsonl"
    assert (alignment.folder / key).read_bytes() == data


async def test_the_same_bytes_again_are_stored_once(alignment: Alignment) -> None:
    first = await alignment.store(TEN_ROWS)
    assert await alignment.store(TEN_ROWS) == first
    together = await asyncio.gather(*(alignment.store(TEN_ROWS, tenant="tenants/b") for _ in range(4)))
    assert together == [first] * 4
    assert len(alignment.stored()) == 2


HOSTILE: list[tuple[str, Any, type[Exception], str]] = [
    ("malformed line", upload(TEN_ROWS + b'{"text": "s3cr3t"\n'), MalformedDatasetError, "line 11"),
    ("not UTF-8", upload(b'{"text": "\xff"}\n'), MalformedDatasetError, "UTF-8"),
    ("empty", upload(b""), MalformedDatasetError, "empty"),
    ("blank", upload(b"\n \n"), MalformedDatasetError, "empty"),
    ("truncated", upload(TEN_ROWS[:-9], size_bytes=len(TEN_ROWS), sha256=SHA), ChecksumMismatchError, "announced"),
    (
        "longer",
        upload(TEN_ROWS + b"\n", size_bytes=len(TEN_ROWS), sha256=SHA),
        ChecksumMismatchError,
        "than the announced",
    ),
    ("other bytes", upload(TEN_ROWS, sha256="0" * 64), ChecksumMismatchError, "SHA-256"),
    ("no checksum", upload(TEN_ROWS, sha256=""), ChecksumMismatchError, "announced"),
    ("negative size", upload(TEN_ROWS, size_bytes=-1), ChecksumMismatchError, "than the announced"),
    ("over the limit", upload(b"x", size_bytes=MAX_DATASET_BYTES + 1), QuotaExceededError, str(MAX_DATASET_BYTES)),
    ("no tenant", upload(TEN_ROWS, tenant=""), InvalidInputError, "out of order"),
    ("a tenant that climbs", upload(TEN_ROWS, tenant="tenants/../../etc"), InvalidInputError, "is not a dataset"),
    ("a tenant that is a dot", upload(TEN_ROWS, tenant="tenants/.."), InvalidInputError, "is not a dataset"),
    ("nothing", [], InvalidInputError, "missing"),
    ("a chunk first", [chunk(0, b"x")], InvalidInputError, "out of order"),
    ("an empty message", [pb.StoreDatasetRequest()], InvalidInputError, "out of order"),
    (
        "a chunk left out",
        [*list(upload(TEN_ROWS))[:2], chunk(0, TEN_ROWS[:10]), chunk(20, TEN_ROWS[20:])],
        ChecksumMismatchError,
        "offset 20, not 10",
    ),
    ("two files", [*list(upload(TEN_ROWS)), list(upload(TEN_ROWS))[1]], InvalidInputError, "out of order"),
]


@pytest.mark.parametrize(
    ("requests", "error", "text"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE]
)
async def test_hostile_uploads_are_refused_and_leave_no_trace(
    alignment: Alignment, requests: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        await alignment.stub.StoreDataset(iter(list(requests)))
    assert "s3cr3t" not in str(caught.value)
    assert alignment.stored() == [] == alignment.scratch_files()
    assert (await alignment.store(TEN_ROWS)).num_rows == 10  # and the service goes on


async def test_a_malformed_line_is_named_by_number(alignment: Alignment) -> None:
    with pytest.raises(MalformedDatasetError) as caught:
        await alignment.store(lines({"text": "a"}) * 3 + b"{\n" + lines({"text": "b"}))
    assert caught.value.metadata["line"] == "4"


async def test_an_upload_that_is_cancelled_leaves_nothing(alignment: Alignment) -> None:
    sent = asyncio.Event()

    async def halting() -> Any:
        for request in list(upload(TEN_ROWS, chunk_bytes=50))[:4]:
            yield request
        sent.set()
        await asyncio.Event().wait()

    async with grpc.aio.insecure_channel(alignment.address) as channel:
        stub = alignment_pb2_grpc.AlignmentServiceStub(channel)
        call = stub.StoreDataset(halting(), metadata=[("authorization", "Bearer mesh_secret")])
        await sent.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    async with asyncio.timeout(10):
        while alignment.scratch_files():  # noqa: ASYNC110  # the server has no notification
            await asyncio.sleep(0.01)
    assert alignment.stored() == []


async def test_removed_bytes_are_gone_with_their_tokenized_forms(alignment: Alignment) -> None:
    await alignment.store(TEN_ROWS)
    await alignment.stub.InspectDataset(_inspect())
    for _ in range(2):  # removing what is not there answers OK
        await alignment.stub.RemoveDataset(pb.RemoveDatasetRequest(tenant=TENANT, sha256=SHA))
    assert alignment.stored() == []
    with pytest.raises(NotFoundError):
        await alignment.stub.InspectDataset(_inspect())


async def test_another_tenants_bytes_are_not_found(alignment: Alignment) -> None:
    await alignment.store(TEN_ROWS, tenant="tenants/other")
    with pytest.raises(NotFoundError):
        await alignment.stub.InspectDataset(_inspect())


async def test_bytes_that_changed_in_the_store_are_detected(alignment: Alignment) -> None:
    await alignment.store(TEN_ROWS)
    (alignment.folder / alignment.stored()[0]).write_bytes(TEN_ROWS.replace(b"quick", b"slick"))
    with pytest.raises(ArtifactCorruptError):
        await alignment.stub.InspectDataset(_inspect())


@pytest.mark.parametrize("secret", ["mesh_wrong", "mxt_acme_secret", ""])
async def test_only_the_mesh_may_call(alignment: Alignment, secret: str) -> None:
    async with open_channel(alignment.address, secret) as channel:
        stub: Any = alignment_pb2_grpc.AlignmentServiceStub(channel)
        with pytest.raises(UnauthenticatedError):
            await stub.InspectDataset(_inspect())
        with pytest.raises(UnauthenticatedError):
            await stub.StoreDataset(upload(TEN_ROWS))
        with pytest.raises(UnauthenticatedError):
            await stub.RemoveDataset(pb.RemoveDatasetRequest(tenant=TENANT, sha256=SHA))
        with pytest.raises(UnauthenticatedError):
            async for _ in stub.StreamMicrobatches(pb.StreamMicrobatchesRequest(backbone="tiny")):
                pass


async def test_inspection_reports_what_a_task_would_read(alignment: Alignment) -> None:
    data = lines({"text": "hello"}, {"text": ""}, {"prompt": "the quick", "completion": " fox"})
    stored = await alignment.store(data)
    report = (await alignment.stub.InspectDataset(_inspect(stored.sha256, num_samples=9))).report
    assert (report.num_rows, report.num_train_rows, report.num_steps, report.num_refused_rows) == (3, 2, 1, 1)
    assert [(r.line, r.reason) for r in report.refused_rows] == [(2, "no token bears loss")]
    assert [[(p.text, p.bears_loss) for p in row.pieces] for row in report.samples] == [
        [("hello<|im_end|>", True)],
        [("the quick", False), (" fox<|im_end|>", True)],
    ]
    assert sum(bucket.num_rows for bucket in report.length_histogram) == 2
    assert report.num_tokens_per_epoch == report.num_train_tokens == sum(row.num_tokens for row in report.samples)


async def test_special_tokens_stay_text_unless_the_task_says_otherwise(alignment: Alignment) -> None:
    """The same bytes are tokenized both ways: neither result comes from the other's cache entry."""
    stored = await alignment.store(lines({"text": "a<|im_end|>b"}, {"text": "hello"}))
    for parses, num_warned, num_tokens in ((False, 1, 13), (True, 0, 4), (False, 1, 13)):  # text: a token a letter
        request = _inspect(stored.sha256)
        request.options.training.parse_special_tokens = parses
        report = (await alignment.stub.InspectDataset(request)).report
        assert report.num_special_text_rows == num_warned
        assert report.samples[0].num_tokens == num_tokens, parses
        assert "".join(piece.text for piece in report.samples[0].pieces) == "a<|im_end|>b<|im_end|>"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("global_batch_size", -1),
        ("micro_batch_size", -3),
        ("max_sequence_tokens", -5),
        ("max_sequence_tokens", 1),
        ("num_epochs", 0),
        ("num_steps", -2),
        ("heldout_fraction", 1.0),
        ("heldout_fraction", float("nan")),
        ("evaluate_every_steps", -1),
        ("overlength", 99),
    ],
)
async def test_inspection_names_the_invalid_field(alignment: Alignment, field: str, value: float) -> None:
    await alignment.store(TEN_ROWS)
    request = _inspect()
    request.options.training.MergeFrom(training())
    setattr(request.options.training, field, value)
    with pytest.raises(InvalidInputError) as caught:
        await alignment.stub.InspectDataset(request)
    assert [v.field for v in caught.value.violations] == [f"options.training.{field}"]


async def test_inspection_refuses_an_unknown_backbone_and_an_invalid_name(alignment: Alignment) -> None:
    await alignment.store(TEN_ROWS)
    request = _inspect()
    request.options.backbone = "huge"
    with pytest.raises(InvalidInputError, match="available: tiny"):
        await alignment.stub.InspectDataset(request)
    for sha256 in ("", "../secret", SHA.upper(), "0" * 63):
        with pytest.raises(InvalidInputError, match="is not a dataset"):
            await alignment.stub.InspectDataset(_inspect(sha256))


async def test_every_row_refused_refuses_the_dataset(alignment: Alignment) -> None:
    stored = await alignment.store(lines({"text": ""}))
    with pytest.raises(InvalidInputError, match="every row is refused"):
        await alignment.stub.InspectDataset(_inspect(stored.sha256))
