"""Full and read-only disks: calls are UNAVAILABLE, nothing is half done, and all works once there is room."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from google.rpc import error_details_pb2

from muxtune.v1 import admission_pb2 as pb
from tests.services.admission.admission_mesh import (
    Admission,
    Alignment,
    adapter_files,
    adapter_parts,
    lines,
    refused,
    spec,
    step,
)

UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
FULL = "max_page_count = 1"  # SQLite takes it as: not one page more
READ_ONLY = "query_only = ON"


@contextmanager
def pragma(admission: Admission, text: str) -> Iterator[None]:
    """Apply a pragma to every connection of the database within the block."""

    def configure(connection: Any, record: Any) -> None:
        connection.execute(f"PRAGMA {text}")

    dialect = admission.database._dialect
    sa.event.listen(dialect.engine, "connect", configure)
    dialect.close()
    yield
    sa.event.remove(dialect.engine, "connect", configure)
    dialect.close()


@pytest.mark.parametrize("trouble", [FULL, READ_ONLY])
async def test_a_database_that_takes_no_more_is_unavailable_and_what_it_has_is_read(
    admission: Admission, trouble: str
) -> None:
    dataset = (await admission.upload()).name
    task = (await admission.create(dataset)).name
    await admission.run(task)
    acknowledged = [task]

    async def create() -> None:
        request = pb.CreateTaskRequest(spec=spec(dataset), request_id=f"r{len(acknowledged)}")
        acknowledged.append((await admission.tenant().CreateTask(request)).task.name)

    with pragma(admission, trouble), refused(*UNAVAILABLE) as refusal:
        for _ in range(200):  # some still fit on pages that are there
            await create()
    assert refusal.has(error_details_pb2.RetryInfo)
    with pragma(admission, trouble):
        with refused(*UNAVAILABLE):
            await create()
        assert await admission.state(task) == "RUNNING"
    assert admission.num_rows()["tasks"] == len(acknowledged)
    await create()  # the same request, now taken
    assert await admission.commit(step(task, 1, 1)) == ["COMMITTED"]
    listed = (await admission.tenant().ListTasks(pb.ListTasksRequest(page_size=1000))).tasks
    assert sorted(entry.name for entry in listed) == sorted(acknowledged)


@pytest.mark.parametrize("kind", ["dataset", "adapter"])
async def test_an_upload_without_room_for_it_is_unavailable_and_leaves_nothing(
    admission: Admission, alignment: Alignment, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full refuses every write, as a full disk does."""

    async def upload() -> None:
        if kind == "dataset":
            await admission.upload()
        else:
            await admission.tenant().UploadAdapter(adapter_parts(adapter_files()))

    before = admission.num_rows(), admission.files()
    with monkeypatch.context() as patched:
        for scratch in (admission.servicer._scratch, alignment.servicer._scratch):
            patched.setattr(scratch, "new_folder_of_call", partial(full_folder, scratch.new_folder_of_call))
        with refused(*UNAVAILABLE):
            await upload()
    assert (admission.num_rows(), admission.files()) == before
    await upload()


@asynccontextmanager
async def full_folder(new_folder: Any, run: Any) -> AsyncIterator[Path]:
    async with new_folder(run) as folder:
        for name in ("dataset.jsonl", "adapter_config.json", "adapter_model.safetensors"):
            (folder / name).symlink_to("/dev/full")
        yield folder


async def test_an_artifact_store_that_is_away_is_unavailable_and_comes_back(admission: Admission) -> None:
    """A file replaces the folder of the store."""
    dataset = (await admission.upload()).name
    away = admission.folder.with_name("away")
    admission.folder.rename(away)
    admission.folder.touch()
    with refused(*UNAVAILABLE) as refusal:
        await admission.upload(lines([{"text": "other bytes"}]))
    assert refusal.has(error_details_pb2.RetryInfo)
    admission.folder.unlink()
    away.rename(admission.folder)
    await admission.upload(lines([{"text": "other bytes"}]))
    await admission.create(dataset)
