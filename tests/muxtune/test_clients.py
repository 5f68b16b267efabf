"""Both clients against a fake admission that fails, breaks streams and sends corrupt files."""

import asyncio
import hashlib
import inspect
import random
from pathlib import Path

import pytest

import engine.errors
from engine.errors import FieldViolation, InvalidInputError, OverloadedError, UnavailableError
from muxtune import errors
from muxtune.aio import AsyncClient
from muxtune.client import Client
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import artifact_pb2, task_pb2
from services.rpc.errors import TABLE
from tests.muxtune.admission_fake import CONFIG, KEY, WEIGHTS, Admission, file_parts
from tests.muxtune.conftest import Either

SPEC = task_pb2.TaskSpec(backbone="tiny")
NAME = "tenants/a/tasks/t"
UNARY = {
    "create_task": (SPEC,),
    "estimate_task": (SPEC,),
    "get_task": (NAME,),
    "cancel_task": (NAME,),
    "list_tasks": (),
    "get_dataset": ("tenants/a/datasets/d",),
    "list_datasets": (),
    "delete_dataset": ("tenants/a/datasets/d",),
    "preflight_dataset": ("tenants/a/datasets/d", "tiny", task_pb2.Training()),
    "list_adapters": (),
    "delete_adapter": ("tenants/a/adapters/x",),
    "list_backbones": (),
}


def all_errors() -> list[type[engine.errors.MuxtuneError]]:
    classes, waiting = [], [engine.errors.MuxtuneError]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        classes.append(cls)
    return sorted((cls for cls in classes if cls.__module__ == "engine.errors"), key=lambda cls: cls.__name__)


def test_the_two_clients_have_the_same_methods() -> None:
    def face(cls: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(cls, inspect.isfunction)
        return {name: list(inspect.signature(m).parameters) for name, m in methods if not name.startswith("_")}

    assert face(Client) == face(AsyncClient)


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
async def test_every_domain_error_arrives_as_its_namesake(
    call: Either, admission: Admission, kind: type[engine.errors.MuxtuneError]
) -> None:
    admission.failures = [kind("what went wrong", line=7)] * 6  # more often than UNAVAILABLE is retried
    with pytest.raises(errors.MuxtuneError) as raised:
        await call("get_task", NAME)
    wanted = "InternalError" if kind is engine.errors.MuxtuneError else kind.__name__
    assert type(raised.value).__name__ == wanted
    assert raised.value.reason == TABLE[kind].reason
    if kind is not engine.errors.MuxtuneError:
        assert "what went wrong" in str(raised.value)
        assert raised.value.metadata["line"] == "7"


async def test_fields_and_waiting_times_arrive(call: Either, admission: Admission) -> None:
    violations = [FieldViolation("spec.lora.rank", '"0" must be 1 to 256'), FieldViolation("spec.dataset", "missing")]
    admission.failures = [InvalidInputError("two things", violations)]
    with pytest.raises(errors.InvalidInputError) as raised:
        await call("create_task", SPEC)
    assert [(v.field, v.description) for v in raised.value.violations] == [(v.field, v.description) for v in violations]
    admission.failures = [OverloadedError("later")]
    with pytest.raises(errors.OverloadedError) as raised:
        await call("create_task", SPEC)
    assert raised.value.retry_after_seconds > 0


@pytest.mark.parametrize("method", UNARY)
async def test_every_call_has_key_and_deadline(call: Either, admission: Admission, method: str) -> None:
    await call(method, *UNARY[method])
    assert all(metadata["authorization"] == f"Bearer {KEY}" for metadata in admission.metadata)
    assert all(0 < left < 3600 for left in admission.deadlines)


async def test_unavailable_is_retried_with_one_request_id_and_nothing_else_is(
    call: Either, admission: Admission
) -> None:
    admission.failures = [UnavailableError("away")] * 2
    assert (await call("create_task", SPEC)).name == NAME
    ids = [request.request_id for request in admission.requests]
    assert len(ids) == 3
    assert len(set(ids)) == 1
    assert ids[0]
    await call("create_task", SPEC)
    assert admission.requests[-1].request_id != ids[0]
    admission.failures, before = [OverloadedError("busy")], len(admission.requests)
    with pytest.raises(errors.OverloadedError):
        await call("create_task", SPEC)
    assert len(admission.requests) == before + 1


async def test_a_call_that_comes_just_as_a_server_closes_is_retried(call: Either, admission: Admission) -> None:
    """gRPC cancels it, and its caller has not."""
    admission.num_closing = 2
    assert (await call("create_task", SPEC)).name == NAME
    assert len({request.request_id for request in admission.requests}) == 1 and len(admission.requests) == 3


async def test_pages_are_followed_to_the_end(call: Either, admission: Admission) -> None:
    tasks = await call("list_tasks", [task_pb2.TASK_STATE_RUNNING], page_size=1)
    assert [task.name for task in tasks] == [f"tenants/a/tasks/t{i}" for i in range(3)]
    assert all(list(request.states) == [task_pb2.TASK_STATE_RUNNING] for request in admission.requests)


async def test_a_watch_cut_anywhere_neither_loses_nor_repeats(call: Either, admission: Admission) -> None:
    seed = random.randrange(1 << 30)
    admission.num_events = 30
    admission.cuts = sorted(random.Random(seed).sample(range(1, 30), 3))
    events = await call("watch_task", NAME, 0)
    assert [event.sequence for event in events] == list(range(1, 31)), f"seed {seed}"
    assert len(admission.requests) == 4


async def test_a_watch_begins_at_the_requested_sequence(call: Either, admission: Admission) -> None:
    admission.num_events = 9
    assert [event.sequence for event in await call("watch_task", NAME, 6)] == [7, 8, 9]
    assert (await call("wait_task", NAME)).state == task_pb2.TASK_STATE_SUCCEEDED


@pytest.mark.usefixtures("quick_retries")
async def test_a_missing_server_is_unavailable_without_waiting(tmp_path: Path) -> None:
    with Client("127.0.0.1:1", KEY) as client:
        async with AsyncClient("127.0.0.1:1", KEY) as asynchronous:
            watched = asyncio.to_thread(lambda: list(client.watch_task(NAME)))
            outcomes = await asyncio.gather(watched, asynchronous.get_task(NAME), return_exceptions=True)
    assert [type(error) for error in outcomes] == [errors.UnavailableError] * 2


@pytest.mark.parametrize("size", [1, (1 << 20) - 20, 3 << 20])
async def test_an_upload_is_whole_ordered_and_announced(call: Either, admission: Admission, size: int) -> None:
    data = b'{"text": "' + b"x" * size + b'"}\n'
    await call("upload_dataset", data, "rows")
    header, file, *chunks = admission.uploads[0]
    assert header.header.id == "rows"
    assert (file.file.size_bytes, file.file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert b"".join(part.chunk.data for part in chunks) == data
    offset = 0
    for part in chunks:
        assert part.chunk.offset == offset
        offset += len(part.chunk.data)


async def test_an_upload_that_breaks_is_sent_again_whole(call: Either, admission: Admission, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / WEIGHTS).write_bytes(b"w")
    for method, argument in (("upload_dataset", [{"text": "fox"}]), ("upload_adapter", tmp_path)):
        admission.uploads, admission.failures = [], [UnavailableError("away")]
        await call(method, argument)
        assert len(admission.uploads) == 2
        assert admission.uploads[0] == admission.uploads[1]


async def test_an_unreadable_file_is_refused_before_anything_is_sent(call: Either, admission: Admission) -> None:
    with pytest.raises(errors.InvalidInputError, match="no-such-file"):
        await call("upload_dataset", "no-such-file.jsonl")
    with pytest.raises(errors.InvalidInputError, match=CONFIG):
        await call("upload_adapter", "no-such-folder")
    assert admission.uploads == []


async def test_a_download_appears_whole_and_replaces_an_earlier_one(
    call: Either, admission: Admission, tmp_path: Path
) -> None:
    for weights in (b"first", b"second"):
        admission.download = [*file_parts(CONFIG, b"{}"), *file_parts(WEIGHTS, weights)]
        folder = await call("download_adapter", NAME, tmp_path / "out" / "adapter")
        assert (folder / WEIGHTS).read_bytes() == weights
        assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    "responses",
    [
        [],
        [*file_parts(CONFIG, b"{} ", announced=b"{}"), *file_parts(WEIGHTS, b"w")],
        [*file_parts(CONFIG, b"{}"), *file_parts(WEIGHTS, b"corrupt", announced=b"correct")],
        [*file_parts(CONFIG, b"{}"), *list(file_parts(WEIGHTS, b"cut off"))[:-1]],
        [*list(file_parts(CONFIG, b"ab"))[::-1]],
        [*file_parts("../../evil", b"x")],
        [*file_parts("..", b"x")],
        [*file_parts("/tmp/evil", b"x")],
        [*file_parts("", b"x")],
        [pb.DownloadAdapterResponse(chunk=artifact_pb2.FileChunk(offset=0, data=b"x"))],
    ],
    ids=["nothing", "longer", "corrupt", "cut off", "backwards", "climbs", "dots", "absolute", "nameless", "headless"],
)
async def test_a_corrupt_download_is_refused_and_leaves_nothing(
    call: Either, admission: Admission, tmp_path: Path, responses: list[pb.DownloadAdapterResponse]
) -> None:
    admission.download = responses
    with pytest.raises(errors.ChecksumMismatchError):
        await call("download_adapter", NAME, tmp_path / "in" / "adapter")
    assert everything_below(tmp_path) == ["in"]


def everything_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("what", ["file", "folder", "link"])
async def test_a_download_never_replaces_a_folder_that_is_not_an_adapter(
    call: Either, admission: Admission, tmp_path: Path, what: str
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    dest = {"file": precious / "thesis.txt", "folder": precious, "link": tmp_path / "link"}[what]
    if what == "link":
        dest.symlink_to(precious)
    admission.download = [*file_parts(CONFIG, b"{}"), *file_parts(WEIGHTS, b"w")]
    with pytest.raises(errors.AlreadyExistsError, match="choose another place"):
        await call("download_adapter", NAME, dest)
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert admission.requests == []


def test_address_and_key_come_from_the_environment(admission: Admission, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUXTUNE_ADDRESS", raising=False)
    with pytest.raises(errors.UnauthenticatedError, match="MUXTUNE_ADDRESS"):
        Client()
    monkeypatch.setenv("MUXTUNE_ADDRESS", admission.address)
    monkeypatch.setenv("MUXTUNE_API_KEY", KEY)
    with Client() as client:
        assert client.get_task(NAME).name == NAME
