"""Adapters are listed, counted, and deleted with their files when no task starts from them."""

import asyncio
import itertools

import grpc
import pytest
from google.rpc import error_details_pb2

from engine.errors import UnavailableError
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import artifact_pb2, operator_pb2, task_pb2
from services.admission.cleanup import garbage_collector
from services.admission.cleanup.garbage_collector import GarbageCollector
from services.admission.store import datasets_and_adapters
from services.storage.artifact_store import ArtifactStore
from tests.services.admission.admission_mesh import (
    DATABASES,
    Admission,
    adapter_files,
    adapter_parts,
    finished,
    refused,
    spec,
    step,
)

both = pytest.mark.parametrize("database_url", DATABASES, indirect=True)
DENIED = (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
EXHAUSTED = (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
IN_USE = (grpc.StatusCode.FAILED_PRECONDITION, "RESOURCE_IN_USE")
SIZE = sum(map(len, adapter_files().values()))


async def upload(
    admission: Admission, adapter_id: str = "", fill: int = 0, request_id: str = ""
) -> artifact_pb2.Adapter:
    parts = adapter_parts(adapter_files(fill=fill), adapter_id, request_id=request_id)
    adapter: artifact_pb2.Adapter = (await admission.tenant().UploadAdapter(parts)).adapter
    return adapter


async def train(admission: Admission, task_id: str, fill: int = 1) -> str:
    """Run a task from its creation to its end; return its adapter's name."""
    dataset = (await admission.upload(dataset_id="d")).name
    task = await admission.create(dataset, task_id)
    (attempt,) = await admission.run(task.name)
    name = f"tenants/acme/adapters/{task_id}"
    files = admission.artifacts.commit_folder(f"{name}/{attempt}", adapter_files(fill=fill), {})
    await admission.commit(step(task.name, attempt, 1), finished(task.name, attempt, files.key))
    return name


async def listed(admission: Admission, page_size: int = 0, tenant: str = "acme") -> list[str]:
    names, token = [], ""
    while True:
        page = await admission.tenant(tenant).ListAdapters(
            pb.ListAdaptersRequest(page_size=page_size, page_token=token)
        )
        names += [adapter.name for adapter in page.adapters]
        if not (token := page.next_page_token):
            return names


async def delete(admission: Admission, name: str) -> None:
    await admission.tenant().DeleteAdapter(pb.DeleteAdapterRequest(name=name))


async def download(admission: Admission, name: str) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    async for part in admission.tenant().DownloadAdapter(pb.DownloadAdapterRequest(name=name)):
        if part.WhichOneof("part") == "file":
            files[current := part.file.file_name] = b""
        else:
            files[current] += part.chunk.data
    return files


def adapters_files(admission: Admission) -> list[str]:
    return [path for path in admission.files() if "/adapters/" in path]


@both
async def test_adapters_are_listed_newest_first_in_pages(admission: Admission) -> None:
    expected = [(await upload(admission, f"a{number}")).name for number in range(5)]
    expected = [await train(admission, "t"), *reversed(expected)]
    await admission.tenant("other").UploadAdapter(adapter_parts(adapter_files(), "theirs"))
    for size in (0, 1, 2, 5, 6):
        assert await listed(admission, size) == expected
    assert await listed(admission, tenant="other") == ["tenants/other/adapters/theirs"]
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"):
        await admission.tenant().ListAdapters(pb.ListAdaptersRequest(page_token="nonsense"))
    with refused(*DENIED):
        await admission.tenant().ListAdapters(pb.ListAdaptersRequest(parent="tenants/other"))


@both
async def test_a_deleted_adapter_loses_its_files_and_frees_its_name(admission: Admission) -> None:
    remaining = await upload(admission, "kept")
    kept_files = adapters_files(admission)
    first = await upload(admission, "one")
    await delete(admission, first.name)
    assert adapters_files(admission) == kept_files and await listed(admission) == [remaining.name]
    with refused(*DENIED):
        await delete(admission, first.name)  # as of a dataset: it is not there
    with refused(*DENIED):
        await download(admission, first.name)
    for fill in (0, 3):  # the same contents, then others
        await upload(admission, "one", fill)
        assert await download(admission, first.name) == adapter_files(fill=fill)
        await delete(admission, first.name)
    assert await download(admission, remaining.name) == adapter_files()


@both
async def test_deleting_a_tasks_adapter_keeps_the_task(admission: Admission) -> None:
    name = await train(admission, "t")
    await delete(admission, name)
    assert not adapters_files(admission) and await listed(admission) == []
    task = (await admission.tenant().GetTask(pb.GetTaskRequest(name="tenants/acme/tasks/t"))).task
    assert (task.state, task.adapter) == (task_pb2.TASK_STATE_SUCCEEDED, "")
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "ILLEGAL_TRANSITION") as refusal:
        await download(admission, task.name)
    assert "its adapter was deleted" in refusal.message
    with refused(grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS"):  # a task's name stays its own
        await upload(admission, "t")


@both
async def test_an_adapter_that_an_unfinished_task_starts_from_is_not_deleted(admission: Admission) -> None:
    uploaded, trained = (await upload(admission, "one")).name, await train(admission, "t")
    for name in (uploaded, trained):
        task = await admission.create("tenants/acme/datasets/d", initial_adapter=name)
        with refused(*IN_USE) as refusal:
            await delete(admission, name)
        assert refusal.has(error_details_pb2.PreconditionFailure) and task.name in refusal.message
        (attempt,) = await admission.run(task.name)
        with refused(*IN_USE):
            await delete(admission, name)
        assert await download(admission, name)
        await admission.commit(finished(task.name, attempt))
        await delete(admission, name)


async def test_an_adapter_deleted_while_a_task_that_starts_from_it_is_validated(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, dataset = await upload(admission, "one"), await admission.upload()
    began, go_on, inspect = asyncio.Event(), asyncio.Event(), admission.controller._estimator._inspect

    async def slow(*arguments: object) -> object:
        began.set()
        await go_on.wait()
        return await inspect(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(admission.controller._estimator, "_inspect", slow)
    creating = asyncio.create_task(admission.create(dataset.name, initial_adapter=adapter.name))
    await began.wait()
    await delete(admission, adapter.name)
    await upload(admission, "one", fill=9)  # another one, of the same name
    go_on.set()
    with refused(*DENIED):
        await creating
    assert admission.num_rows()["tasks"] == 0


async def test_a_download_of_an_adapter_deleted_meanwhile_is_an_error(admission: Admission) -> None:
    adapter = await upload(admission, "one")
    read, has_begun = admission.artifacts.file_reader, []

    def late(manifest: object, name: str) -> object:
        if not has_begun:
            has_begun.append(name)
            with admission.database.write() as connection:
                admission.artifacts.delete_folder(datasets_and_adapters.delete_adapter(connection, adapter.name))
        return read(manifest, name)  # type: ignore[arg-type]

    admission.artifacts.file_reader = late  # type: ignore[assignment, method-assign]
    with refused(*DENIED):
        await download(admission, adapter.name)


@both
async def test_adapters_of_all_kinds_count_in_bytes(admission: Admission) -> None:
    quota = operator_pb2.Quota(max_adapter_bytes=2 * SIZE + 5)
    await admission.operator().SetQuota(operator_pb2.SetQuotaRequest(tenant="tenants/acme", quota=quota))
    first = await upload(admission, "one")
    name = await train(admission, "t")  # 10 bytes, as it says: SIZE - 5 are left
    files, rows = admission.files(), admission.num_rows()
    with refused(*EXHAUSTED) as refusal:
        await upload(admission, "two", fill=2)
    assert refusal.has(error_details_pb2.QuotaFailure) and str(2 * SIZE + 5) in refusal.message
    assert (admission.files(), admission.num_rows()) == (files, rows)
    await upload(admission, "one")  # existing contents add no bytes
    assert admission.files() == files
    await admission.tenant("other").UploadAdapter(adapter_parts(adapter_files()))
    await delete(admission, name)
    second = await upload(admission, "two", fill=2)
    await admission.create("tenants/acme/datasets/d")  # there are five bytes left
    quota.max_adapter_bytes = 2 * SIZE
    await admission.operator().SetQuota(operator_pb2.SetQuotaRequest(tenant="tenants/acme", quota=quota))
    for call in (
        admission.create("tenants/acme/datasets/d"),
        admission.tenant().EstimateTask(pb.EstimateTaskRequest(spec=spec("tenants/acme/datasets/d"))),
        upload(admission, "three", fill=3),
    ):
        with refused(*EXHAUSTED) as refusal:
            await call
        assert "adapters" in refusal.message and "delete some" in refusal.message
    for adapter in (first, second):
        await delete(admission, adapter.name)
    await admission.create("tenants/acme/datasets/d")


async def test_an_upload_that_filled_the_quota_answers_again(admission: Admission) -> None:
    """The first answer may be lost: the same request, or the same contents under its name, adds no bytes."""
    quota = operator_pb2.Quota(max_adapter_bytes=SIZE)
    await admission.operator().SetQuota(operator_pb2.SetQuotaRequest(tenant="tenants/acme", quota=quota))
    adapter = await upload(admission, request_id="r1")
    assert await upload(admission, request_id="r1") == adapter
    assert await upload(admission, adapter.name.rpartition("/")[2], request_id="r2") == adapter
    with refused(*EXHAUSTED):
        await upload(admission, "other", request_id="r3")
    with refused(*EXHAUSTED):
        await upload(admission)
    assert len(adapters_files(admission)) == 3


async def test_a_task_that_runs_leaves_its_adapter_over_the_limit_too(admission: Admission) -> None:
    dataset = await admission.upload()
    task = await admission.create(dataset.name, "t")
    quota = operator_pb2.Quota(max_adapter_bytes=1)
    await admission.operator().SetQuota(operator_pb2.SetQuotaRequest(tenant="tenants/acme", quota=quota))
    (attempt,) = await admission.run(task.name)
    files = admission.artifacts.commit_folder("tenants/acme/adapters/t/1", adapter_files(), {})
    assert await admission.commit(finished(task.name, attempt, files.key)) == ["COMMITTED"]
    assert await download(admission, task.name) == adapter_files()


async def test_uploads_at_once_under_one_name_leave_one_folder(admission: Admission) -> None:
    adapters = await asyncio.gather(*(upload(admission, "one") for _ in range(6)))
    assert all(adapter == adapters[0] for adapter in adapters)
    assert len(adapters_files(admission)) == 3  # two files and their manifest
    same = await asyncio.gather(*(upload(admission, request_id="r1") for _ in range(6)))
    assert len({adapter.name for adapter in same}) == 1 and len(adapters_files(admission)) == 6
    assert await download(admission, same[0].name) == adapter_files()


async def test_uploads_and_deletions_at_once_never_leave_a_row_without_its_files(admission: Admission) -> None:
    for _ in range(6):
        await upload(admission, "one")
        deletion = delete(admission, "tenants/acme/adapters/one")
        work = [upload(admission, name) for name in ("one", "two", "one")]
        await asyncio.gather(deletion, *work, return_exceptions=True)
        held = await listed(admission)
        assert len(adapters_files(admission)) == 3 * len(held)
        for name in held:
            assert await download(admission, name) == adapter_files()
            await delete(admission, name)
        assert not adapters_files(admission)


async def test_files_that_could_not_be_deleted_are_deleted_by_a_sweep(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a deletion without a store and an upload that was cut short; files with a row remain."""
    remaining = [(await upload(admission, "kept")).name, await train(admission, "t")]
    kept_files = adapters_files(admission)
    gone = [(await upload(admission, "gone", fill=4)).name, await train(admission, "u", fill=5)]

    def away(prefix: str) -> None:
        raise UnavailableError("the store is away")

    with monkeypatch.context() as patched:
        patched.setattr(admission.artifacts, "delete_folder", away)
        for name in gone:
            await delete(admission, name)
    cut_short = datasets_and_adapters.new_upload("tenants/acme/adapters/never", "0" * 64)
    admission.artifacts.commit_folder(cut_short, adapter_files(), {})
    admission.artifacts.commit_folder(f"tenants/acme/adapters/before/uploaded-{'0' * 16}", adapter_files(), {})
    assert sorted(await listed(admission)) == sorted(remaining)
    collector = GarbageCollector(admission.database, admission.artifacts)
    collector.collect_all()
    left = set(adapters_files(admission)) - set(kept_files)
    # Those of the upload may still get their row, for a day; the task's adapter, and what older versions left, cannot.
    assert {path.split("/")[3] for path in left} == {"gone", "never"}
    tomorrow = garbage_collector.now() + 86_400_000_001
    monkeypatch.setattr(garbage_collector, "now", lambda: tomorrow)
    assert collector.collect_all() == 2 and collector.collect_all() == 0
    assert adapters_files(admission) == kept_files
    for name in remaining:
        assert await download(admission, name)


async def test_a_sweep_does_not_mistake_other_folders_for_uploads(admission: Admission) -> None:
    names = (
        "uploaded-",
        "uploaded-zz",
        "uploaded-" + "0" * 17,
        "uploaded-" + "0" * 16 + "-1",
        "x-uploaded-" + "0" * 16,
    )
    for folder, name in itertools.product(("adapters/a", "tasks/a"), names):
        admission.artifacts.put_new(f"tenants/acme/{folder}/{name}/file", b"x")
    before = admission.files()
    assert GarbageCollector(admission.database, ArtifactStore.open(str(admission.folder))).collect_all() == 0
    assert admission.files() == before
