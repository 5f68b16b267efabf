"""Two tenants call every RPC: nothing of one reaches the other in responses, error texts, logs or spans. The name of
another tenant's resource and a missing name cost the same and get the same response (AIP-211)."""

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from muxtune.v1 import admission_pb2
from muxtune.v1 import admission_pb2 as pb
from tests.hostile_messages import FUZZING, answer_of, messages, streams
from tests.services.admission.admission_mesh import (
    Admission,
    adapter_files,
    adapter_parts,
    dataset_parts,
    finished,
    lines,
    spec,
    step,
)

METHODS = list(admission_pb2.DESCRIPTOR.services_by_name["AdmissionService"].methods)
ROW_OF_RIVAL, LABEL_OF_RIVAL = "zygomorphic", "quixotically"
THEIRS = ["tenants/rival/tasks/wombat", "tenants/rival/datasets/wombat-data", "tenants/rival/adapters/wombat-adapter",
          "tenants/rival/adapters/wombat", "tenants/rival"]  # fmt: skip
OURS = ["tenants/acme", "tenants/acme/tasks/t", "tenants/acme/datasets/d", "tiny", "q_proj", "wombat", "wombat-data"]


@dataclass
class Two:
    admission: Admission
    key: str  # acme's

    async def ask(self, method: MethodDescriptor, sent: Any) -> tuple[grpc.StatusCode, str, list[Message]]:
        answer: tuple[grpc.StatusCode, str, list[Message]] = await answer_of(
            self.admission.channel, method, sent, self.key
        )
        return answer


@pytest.fixture
async def two(admission: Admission) -> AsyncIterator[Two]:
    """Create two tenants. The rival has a dataset, a running task beside one of acme's, and two adapters."""
    rival = admission.tenant("rival")
    rows = lines([{"text": f"{ROW_OF_RIVAL} " * 4}] * 5)
    dataset = (await rival.UploadDataset(dataset_parts(rows, "wombat-data"))).dataset.name
    for name in ("wombat", "running"):
        task_spec = spec(dataset, labels={"project": LABEL_OF_RIVAL})
        await rival.CreateTask(pb.CreateTaskRequest(task_id=name, spec=task_spec))
    await rival.UploadAdapter(adapter_parts(adapter_files(), "wombat-adapter"))
    acme_dataset = await admission.upload(dataset_id="d")
    await admission.create(acme_dataset.name, "t")
    await admission.run("tenants/rival/tasks/wombat", "tenants/rival/tasks/running", "tenants/acme/tasks/t")
    files = admission.artifacts.commit_folder("tenants/rival/adapters/wombat/1", adapter_files(fill=1), {})
    await admission.commit(
        step("tenants/rival/tasks/wombat", 1, 1), finished("tenants/rival/tasks/wombat", 1, files.key)
    )
    yield Two(admission, admission.key_store.create("tenants/acme", None)[1])


def leaks(text: str, sent: Any) -> list[str]:
    """Return strings of the rival that are in the text and not in the request."""
    request = str(sent)
    secrets = (ROW_OF_RIVAL, LABEL_OF_RIVAL, "wombat", "rival", "running")
    return [word for word in secrets if word in text and word not in request]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@FUZZING
@given(data=st.data())
async def test_no_call_reveals_anything_of_another_tenant(
    two: Two, method: MethodDescriptor, caplog: pytest.LogCaptureFixture, data: st.DataObject
) -> None:
    caplog.set_level(logging.DEBUG)
    draw = streams if method.client_streaming else messages
    sent = data.draw(draw(method.input_type, [*THEIRS, *OURS]))
    _code, text, answers = await two.ask(method, sent)
    assert not leaks(text, sent)
    for answer in answers:
        # What was asked may stand in what was made for acme itself: never as a name of the rival's.
        assert ROW_OF_RIVAL not in str(answer) and LABEL_OF_RIVAL not in str(answer)
        assert not [value for value in names_in(answer) if value.startswith("tenants/rival")]
    assert ROW_OF_RIVAL not in caplog.text and LABEL_OF_RIVAL not in caplog.text
    held = await two.admission.tenant("rival").GetTask(pb.GetTaskRequest(name="tenants/rival/tasks/running"))
    assert held.task.state == 2  # as it was: running


def names_in(message: Message) -> Iterator[str]:
    """Yield the values of all fields `name`, `dataset`, `adapter`, `initial_adapter` and `task`."""
    for field, value in message.ListFields():
        parts = value if field.is_repeated else [value]
        for part in parts:
            if isinstance(part, Message):
                yield from names_in(part)
            elif isinstance(part, str) and field.name in ("name", "dataset", "adapter", "initial_adapter", "task"):
                yield part


@contextmanager
def statements(admission: Admission) -> Iterator[list[str]]:
    """Record the block's SQL without that of the audit log and of the key, which is read once a second."""
    recorded: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not any(part in statement for part in ("audit_events", "api_keys", "BEGIN", "SAVEPOINT")):
            recorded.append(statement)

    engine = admission.database._engine
    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        yield recorded
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)


def requests_naming(kind: str, name: str) -> Iterator[tuple[str, Message]]:
    """Yield requests of every RPC with that name, in every field that takes a name."""
    if kind == "tasks":
        yield "GetTask", pb.GetTaskRequest(name=name)
        yield "WatchTask", pb.WatchTaskRequest(name=name)
        yield "CancelTask", pb.CancelTaskRequest(name=name)
        yield "DownloadAdapter", pb.DownloadAdapterRequest(name=name)
    elif kind == "datasets":
        yield "GetDataset", pb.GetDatasetRequest(name=name)
        yield "DeleteDataset", pb.DeleteDatasetRequest(name=name)
        yield "PreflightDataset", pb.PreflightDatasetRequest(name=name)
        yield "CreateTask", pb.CreateTaskRequest(spec=spec(name))
        yield "EstimateTask", pb.EstimateTaskRequest(spec=spec(name))
    elif kind == "adapters":
        yield "DeleteAdapter", pb.DeleteAdapterRequest(name=name)
        yield "DownloadAdapter", pb.DownloadAdapterRequest(name=name)
        task_spec = spec("tenants/acme/datasets/d")
        task_spec.initial_adapter = name
        yield "CreateTask", pb.CreateTaskRequest(spec=task_spec)
        yield "EstimateTask", pb.EstimateTaskRequest(spec=task_spec)
    else:
        yield "CreateTask", pb.CreateTaskRequest(parent=name, spec=spec("tenants/acme/datasets/d"))
        yield "EstimateTask", pb.EstimateTaskRequest(parent=name, spec=spec("tenants/acme/datasets/d"))
        yield "ListTasks", pb.ListTasksRequest(parent=name)
        yield "ListDatasets", pb.ListDatasetsRequest(parent=name)
        yield "ListAdapters", pb.ListAdaptersRequest(parent=name)


@pytest.mark.parametrize("existing", THEIRS)
async def test_anothers_name_and_a_missing_one_cost_and_answer_alike(two: Two, existing: str) -> None:
    """Status, text (but for the name) and the sequence of database statements are the same."""
    kind = ([*existing.split("/"), "", "parent"])[2] or "parent"
    missing = existing.replace("wombat", "vombat") if "wombat" in existing else "tenants/nobody"
    number = 0
    for (name, request), (_, missing_request) in zip(
        requests_naming(kind, existing), requests_naming(kind, missing), strict=True
    ):
        method = next(m for m in METHODS if m.name == name)
        answers = []
        for sent, said in ((request, existing), (missing_request, missing)):
            with statements(two.admission) as executed:
                code, text, _ = await two.ask(method, sent)
            assert code is grpc.StatusCode.PERMISSION_DENIED
            answers.append((text.replace(said, "NAME"), executed))
        assert answers[0] == answers[1]
        number += 1
    assert number >= 3


@pytest.mark.parametrize(
    "name",
    ["tenants/acme/../rival/tasks/wombat", "tenants/acme/tasks/../../rival/tasks/wombat", "tenants/acme/tasks/t/../t",
     "tenants/acme//tasks/t", "tenants/ACME/tasks/t", "tenants/acme/tasks/t\0", "tenants/acme/tasks/t ",
     "/tenants/acme", "tenants/acme/tasks/%2e%2e", "tenants/acme/tasks/t\n", "tenants/acme/datasets/d",
     "tenants/acme/tasks/*",
     "tenants/acme/tasks/\u0442", "tenants\\acme\\tasks\\t"],
)  # fmt: skip
async def test_an_invalid_name_is_denied_as_a_missing_one(two: Two, name: str) -> None:
    before = two.admission.files()
    for method, sent in requests_naming("tasks", name):
        code, _, _ = await two.ask(next(m for m in METHODS if m.name == method), sent)
        assert code is grpc.StatusCode.PERMISSION_DENIED
    assert two.admission.files() == before


async def test_a_page_token_of_another_tenant_reveals_nothing(two: Two) -> None:
    rival = two.admission.tenant("rival")
    token = (await rival.ListTasks(pb.ListTasksRequest(page_size=1))).next_page_token
    assert token
    list_tasks = next(m for m in METHODS if m.name == "ListTasks")
    code, text, _ = await two.ask(list_tasks, pb.ListTasksRequest(page_token=token))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and not leaks(text, token)


async def test_a_request_id_of_another_tenant_is_new_here(two: Two) -> None:
    rival = two.admission.tenant("rival")
    request = pb.CreateTaskRequest(request_id="r1", spec=spec("tenants/rival/datasets/wombat-data"))
    theirs = (await rival.CreateTask(request)).task.name
    created = await two.admission.tenant().CreateTask(
        pb.CreateTaskRequest(request_id="r1", spec=spec("tenants/acme/datasets/d"))
    )
    assert created.task.name.startswith("tenants/acme/") and created.task.name != theirs


async def test_the_bytes_of_a_dataset_are_no_way_to_anothers(two: Two) -> None:
    """Bytes are addressed by tenant and hash: the hash or the bytes of another tenant's dataset give nothing."""
    theirs = await two.admission.tenant("rival").GetDataset(
        pb.GetDatasetRequest(name="tenants/rival/datasets/wombat-data")
    )
    task_spec = spec("tenants/acme/datasets/d", dataset_version=theirs.dataset.sha256)
    create = next(m for m in METHODS if m.name == "CreateTask")
    code, text, _ = await two.ask(create, pb.CreateTaskRequest(spec=task_spec))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    absent = spec("tenants/acme/datasets/d", dataset_version="0" * 64)
    code, same, _ = await two.ask(create, pb.CreateTaskRequest(spec=absent))
    assert text.replace(theirs.dataset.sha256, "X") == same.replace("0" * 64, "X")
