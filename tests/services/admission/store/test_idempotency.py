"""Repeated requests (AIP-155) get the same answer or are refused: concurrently, over restarts, on both databases."""

import asyncio
import uuid
from typing import Any

import grpc
import pytest

from muxtune.v1 import admission_pb2 as pb
from tests.services.admission.admission_mesh import (
    BOTH_DATABASES,
    ROWS,
    TEN_ROWS,
    Admission,
    adapter_files,
    adapter_parts,
    dataset_parts,
    lines,
    refused,
    spec,
)

pytestmark = pytest.mark.parametrize("database_url", BOTH_DATABASES, indirect=True)
REUSED = (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
OTHER_ROWS = lines(ROWS[:3])


@pytest.fixture
def request_id() -> str:
    return str(uuid.uuid4())


async def create(admission: Admission, dataset: str, request_id: str, task_id: str = "", **changes: Any) -> Any:
    request = pb.CreateTaskRequest(task_id=task_id, spec=spec(dataset, **changes), request_id=request_id)
    return (await admission.tenant().CreateTask(request)).task


async def upload_adapter(admission: Admission, request_id: str, adapter_id: str = "", **files: Any) -> Any:
    parts = adapter_parts(adapter_files(**files), adapter_id, request_id=request_id)
    return (await admission.tenant().UploadAdapter(parts)).adapter


async def test_twenty_at_once_make_one_task(admission: Admission, request_id: str) -> None:
    dataset = (await admission.upload()).name
    answers = await asyncio.gather(*(create(admission, dataset, request_id) for _ in range(20)))
    assert all(answer == answers[0] for answer in answers)
    rows = admission.num_rows()
    assert (rows["tasks"], rows["task_events"], rows["requests"]) == (1, 1, 1)


async def test_a_task_asked_for_again_is_answered_as_it_stands_now(admission: Admission, request_id: str) -> None:
    dataset = (await admission.upload()).name
    task = await create(admission, dataset, request_id, labels={"b": "2", "a": "1"})
    await admission.tenant().CancelTask(pb.CancelTaskRequest(name=task.name))
    await admission.tenant().DeleteDataset(pb.DeleteDatasetRequest(name=dataset))
    await admission.restart()
    again = await create(admission, dataset, request_id, labels={"a": "1", "b": "2"})
    assert again.name == task.name and await admission.state(task.name) == "CANCELLED"
    assert admission.num_rows()["tasks"] == 1


async def test_another_body_is_refused_whatever_it_is(admission: Admission, request_id: str) -> None:
    dataset = (await admission.upload()).name
    await create(admission, dataset, request_id)
    before = admission.num_rows(), admission.files()
    for _ in range(2):
        for task_id, changes in (
            ("", {"seed": 1}), ("one", {}), ("", {"labels": {"a": "1"}}), ("", {"dataset_version": "x"}), ("No", {}),
        ):  # fmt: skip
            with refused(*REUSED):
                await create(admission, dataset, request_id, task_id, **changes)
        for data in (TEN_ROWS, OTHER_ROWS):
            with refused(*REUSED):
                await admission.upload(data, request_id=request_id)
        with refused(*REUSED):
            await upload_adapter(admission, request_id)
        assert (admission.num_rows(), admission.files()) == before
        await admission.restart()


async def test_one_of_several_bodies_at_once_wins(admission: Admission, request_id: str) -> None:
    dataset = (await admission.upload()).name
    calls = [create(admission, dataset, request_id, seed=i % 5) for i in range(20)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    won = {answer.spec.training.seed for answer in answers if not isinstance(answer, BaseException)}
    assert len(won) == 1 and sum(not isinstance(answer, BaseException) for answer in answers) == 4
    for answer in answers:
        if isinstance(answer, BaseException):
            with refused(*REUSED):
                raise answer
    assert admission.num_rows()["tasks"] == 1


async def test_ids_are_each_tenants_own(admission: Admission, request_id: str) -> None:
    mine = await admission.upload(request_id=request_id)
    parts = dataset_parts(OTHER_ROWS, request_id=request_id)
    theirs = (await admission.tenant("other").UploadDataset(parts)).dataset
    assert mine.name.startswith("tenants/acme/") and theirs.name.startswith("tenants/other/")


async def test_a_refused_request_may_be_corrected_under_its_id(admission: Admission, request_id: str) -> None:
    dataset = (await admission.upload()).name
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"):
        await create(admission, dataset, request_id, learning_rate=-1)
    assert (await create(admission, dataset, request_id)).name


async def test_an_upload_sent_again_is_one_dataset(admission: Admission, request_id: str) -> None:
    answers = await asyncio.gather(*(admission.upload(request_id=request_id) for _ in range(10)))
    assert all(answer == answers[0] for answer in answers)
    await admission.restart()
    assert await admission.upload(request_id=request_id) == answers[0]
    assert admission.num_rows()["datasets"] == 1 and len(admission.files()) == 1
    for data, dataset_id in ((OTHER_ROWS, ""), (TEN_ROWS, "one")):
        with refused(*REUSED):
            await admission.upload(data, dataset_id, request_id=request_id)


async def test_an_upload_of_existing_contents_uses_its_request_id_too(admission: Admission, request_id: str) -> None:
    first = await admission.upload(TEN_ROWS, "one")
    assert await admission.upload(TEN_ROWS, "one", request_id=request_id) == first
    with refused(*REUSED):
        await admission.upload(OTHER_ROWS, "two", request_id=request_id)


async def test_an_upload_sent_again_after_its_deletion_makes_it_anew(admission: Admission, request_id: str) -> None:
    for _ in range(3):
        name = (await admission.upload(request_id=request_id)).name
        await admission.tenant().DeleteDataset(pb.DeleteDatasetRequest(name=name))
        assert admission.files() == []
    assert (await admission.upload(request_id=request_id)).name == name


async def test_an_adapter_sent_again_is_one_adapter(admission: Admission, request_id: str) -> None:
    for adapter_id, num_adapters in (("", 1), ("two", 2)):
        request_id = str(uuid.uuid4())
        calls = (upload_adapter(admission, request_id, adapter_id) for _ in range(8))
        answers = await asyncio.gather(*calls)
        assert all(answer == answers[0] for answer in answers)
        assert await upload_adapter(admission, request_id, adapter_id) == answers[0]
        assert len(admission.files()) == 3 * num_adapters and admission.num_rows()["adapters"] == num_adapters
        for changes in ({"fill": 1}, {"rank": 8}):
            with refused(*REUSED):
                await upload_adapter(admission, request_id, adapter_id, **changes)


async def test_invalid_request_ids_are_refused(admission: Admission) -> None:
    dataset = (await admission.upload()).name
    before = admission.num_rows(), admission.files()
    for bad in ("a\0b", "a b", "ä", "\n", "x" * 129):
        for call in (
            lambda bad=bad: create(admission, dataset, bad),
            lambda bad=bad: admission.upload(OTHER_ROWS, request_id=bad),
            lambda bad=bad: upload_adapter(admission, bad),
        ):
            with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT") as refusal:
                await call()
            assert refusal.fields == ["request_id"]
    assert (admission.num_rows(), admission.files()) == before
