"""Tests the whole mesh, four processes on loopback with a tiny backbone, through the client."""

import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
import torch
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from muxtune.aio import AsyncClient
from muxtune.client import Client
from muxtune.errors import (
    InvalidInputError,
    MalformedDatasetError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from muxtune.local.errors import MeshError
from muxtune.local.mesh import Mesh
from muxtune.transport import metadata
from muxtune.v1 import admission_pb2, admission_pb2_grpc, artifact_pb2, event_pb2, task_pb2
from tests.tiny_backbone import write_backbone

SECRET_WORD = "xylophonic"  # stands in every row; must stand in no span and no log
ROWS = [{"prompt": f"{SECRET_WORD} {i}", "completion": " jumps over" * (1 + i % 5)} for i in range(24)]
QUICK = {
    "*": {"MUXTUNE_LOG_LEVEL": "DEBUG"},
    "execution": {
        "MUXTUNE_NUM_THREADS": "1",
        "MUXTUNE_CHECKPOINT_STEPS": "3",
        "MUXTUNE_CALIBRATION_SECONDS": "0.1",
    },
}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP receiver, in place of Jaeger."""

    def __init__(self) -> None:
        self.requests: list[trace_service_pb2.ExportTraceServiceRequest] = []
        self._changed = threading.Condition()
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request, context):
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[tuple[str, object]]:
        """(service, span) of everything received."""
        spans = []
        for request in self.requests:
            for resource in request.resource_spans:
                service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
                spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
        return spans

    def wait_for(self, predicate) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: predicate(self.spans()), timeout=30)

    def close(self) -> None:
        self._server.stop(None)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    receiver = Collector()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def mesh(backbone: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    running = Mesh(tmp_path_factory.mktemp("mesh"), {"tiny": backbone}, collector.endpoint, QUICK)
    with running:
        yield running
    assert all(process is None for process in running.processes.values())


@pytest.fixture
def client(mesh: Mesh) -> Iterator[Client]:
    with mesh.client() as connected:
        yield connected


def spec(dataset: str, **training: object) -> task_pb2.TaskSpec:
    options = {"learning_rate": 0.01, "num_steps": 8, "global_batch_size": 4, "max_sequence_tokens": 64, "seed": 3}
    return task_pb2.TaskSpec(
        backbone="tiny",
        dataset=dataset,
        lora=task_pb2.Lora(rank=4, alpha=8, dropout=0.1, target_modules=["q_proj", "down_proj"]),
        training=task_pb2.Training(**{**options, **training}),
    )


def losses(events: list[event_pb2.TaskEvent]) -> list[float]:
    return [event.step_done.loss for event in events if event.WhichOneof("event") == "step_done"]


def test_tasks_train_together_and_each_gets_what_it_would_get_alone(
    client: Client, backbone: Path, tmp_path: Path
) -> None:
    dataset = client.upload_dataset(ROWS).name
    alone = client.create_task(spec(dataset, heldout_fraction=0.2))
    events_alone = list(client.watch_task(alone.name))
    # The same task again, now beside others of other ranks, lengths and batch sizes.
    together = [client.create_task(spec(dataset, heldout_fraction=0.2))]
    for rank, batch in ((1, 1), (16, 8), (7, 3)):
        other = spec(dataset, global_batch_size=batch, micro_batch_size=2, seed=rank, num_steps=10)
        other.lora.rank = rank
        other.lora.target_modules[:] = ["all-linear"]
        together.append(client.create_task(other))
    events = list(client.watch_task(together[0].name))
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert losses(events) == pytest.approx(losses(events_alone), rel=1e-5)
    assert len(losses(events)) == 8
    finished = [client.wait_task(task.name) for task in together]
    assert [task.state for task in finished] == [task_pb2.TASK_STATE_SUCCEEDED] * 4
    assert all(task.progress.last_loss < task.progress.first_loss for task in finished)
    assert finished[0].progress.HasField("last_heldout_loss")
    weights = [
        load_file(client.download_adapter(name, tmp_path / str(i)) / "adapter_model.safetensors")
        for i, name in enumerate((alone.name, together[0].name))
    ]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone), tmp_path / "1")
    assert model.active_peft_config.r == 4


def test_cancel_keeps_the_adapter_trained_so_far(client: Client, tmp_path: Path) -> None:
    task = client.create_task(spec(client.upload_dataset(ROWS).name, num_steps=100_000))
    for event in client.watch_task(task.name):
        if event.WhichOneof("event") == "step_done" and event.step_done.step == 2:
            assert client.cancel_task(task.name).state == task_pb2.TASK_STATE_CANCELLING
    ended = client.get_task(task.name)
    assert ended.state == task_pb2.TASK_STATE_CANCELLED
    assert ended.progress.step >= 2
    folder = client.download_adapter(task.name, tmp_path / "adapter")
    assert any(
        tensor.abs().max() > 0
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
        if "lora_B" in name
    )
    assert client.cancel_task(task.name).state == task_pb2.TASK_STATE_CANCELLED  # again: no change


def test_continue_from_an_adapter(client: Client, tmp_path: Path) -> None:
    dataset = client.upload_dataset(ROWS).name
    first = client.wait_task(client.create_task(spec(dataset)).name)
    folder = client.download_adapter(first.name, tmp_path / "adapter")
    uploaded = client.upload_adapter(folder)
    following = spec(dataset)
    following.initial_adapter = uploaded.name
    second = client.wait_task(client.create_task(following).name)
    assert second.state == task_pb2.TASK_STATE_SUCCEEDED
    assert second.progress.first_loss < first.progress.first_loss
    following.lora.rank = 8
    with pytest.raises(InvalidInputError, match="rank"):
        client.create_task(following)


async def test_the_asyncio_client_does_the_same(mesh: Mesh, tmp_path: Path) -> None:
    async with AsyncClient(mesh.addresses["admission"], mesh.api_key, mesh.ca) as client:
        dataset = await client.upload_dataset(ROWS)
        assert (await client.get_dataset(dataset.name)).num_rows == len(ROWS)
        assert dataset.name in [listed.name async for listed in client.list_datasets(page_size=1)]
        task_spec = spec(dataset.name)
        estimate = await client.estimate_task(task_spec)
        task = await client.create_task(task_spec, request_id="twice")
        assert (await client.create_task(task_spec, request_id="twice")).name == task.name
        events = [event async for event in client.watch_task(task.name)]
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert len(losses(events)) == estimate.num_steps
        folder = await client.download_adapter(task.name, tmp_path / "adapter")
        assert (await client.upload_adapter(folder)).size_bytes > 0
        with pytest.raises(InvalidInputError, match="rank"):
            task_spec.lora.rank = 1000
            await client.create_task(task_spec)


def test_one_trace_crosses_all_services_and_holds_no_row(client: Client, mesh: Mesh, collector: Collector) -> None:
    rows = ROWS[1:]  # new rows: alignment caches the result of rows that it has inspected
    task = client.wait_task(client.create_task(spec(client.upload_dataset(rows).name)).name)
    trace_id = bytes.fromhex(task.trace_parent.split("-")[1])

    def names(spans) -> set[tuple[str, str]]:
        return {(service, span.name) for service, span in spans if span.trace_id == trace_id}

    wanted = {
        ("muxtune-admission", "muxtune.v1.AdmissionService/CreateTask"),
        ("muxtune-alignment", "muxtune.v1.AlignmentService/InspectDataset"),
        ("muxtune-scheduling", "plan"),
        ("muxtune-trainer", "attach"),
        ("muxtune-trainer", "checkpoint"),
        ("muxtune-trainer", "export"),
    }
    collector.wait_for(lambda spans: wanted <= names(spans))
    collector.wait_for(
        lambda spans: any(
            span.name == "fused steps" and any(link.trace_id == trace_id for link in span.links) for _, span in spans
        )
    )
    assert SECRET_WORD not in str(collector.requests)
    for log in (mesh.data / "logs").iterdir():
        assert SECRET_WORD not in log.read_text()
        assert mesh.api_key not in log.read_text()


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("spec.lora.rank", lambda s: s.lora.ClearField("rank")),
        ("spec.lora.target_modules", lambda s: s.lora.target_modules.append("no_such_proj")),
        ("spec.training.learning_rate", lambda s: setattr(s.training, "learning_rate", -1e-3)),
        ("spec.training.learning_rate", lambda s: setattr(s.training, "learning_rate", float("nan"))),
        ("spec.backbone", lambda s: setattr(s, "backbone", "gpt-9")),
    ],
)
def test_a_bad_spec_is_refused_by_field_and_leaves_nothing(client: Client, field: str, change) -> None:
    task_spec = spec(client.upload_dataset(ROWS, "bad-specs").name)
    change(task_spec)
    before = len(list(client.list_tasks()))
    with pytest.raises(InvalidInputError) as refused:
        client.create_task(task_spec)
    assert [violation.field for violation in refused.value.violations] == [field]
    assert len(list(client.list_tasks())) == before


def test_bad_uploads_are_refused_and_leave_nothing(client: Client, mesh: Mesh) -> None:
    def stored() -> set[Path]:
        return {path for path in (mesh.data / "artifacts").rglob("*") if path.is_file()}

    before = stored(), len(list(client.list_datasets()))
    with pytest.raises(MalformedDatasetError) as refused:
        client.upload_dataset(b'{"text": "fine"}\n{"text": "xylophonic\n')
    assert refused.value.metadata["line"] == "2"
    assert SECRET_WORD not in str(refused.value)
    with pytest.raises(MalformedDatasetError, match="empty"):
        client.upload_dataset(b"\n\n")
    with mesh.client() as connected:
        data = json.dumps(ROWS[0]).encode()
        header = artifact_pb2.FileHeader(size_bytes=len(data) + 9, sha256=hashlib.sha256(data).hexdigest())
        parts = [
            admission_pb2.UploadDatasetRequest(header=artifact_pb2.UploadHeader()),
            admission_pb2.UploadDatasetRequest(file=header),
            admission_pb2.UploadDatasetRequest(chunk=artifact_pb2.FileChunk(data=data)),
        ]
        stub = admission_pb2_grpc.AdmissionServiceStub(connected.channel)
        with pytest.raises(grpc.RpcError) as truncated:
            stub.UploadDataset(iter(parts), metadata=metadata(mesh.api_key), timeout=30)
    assert truncated.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (stored(), len(list(client.list_datasets()))) == before


def test_another_tenants_names_and_missing_ones_answer_alike(client: Client, mesh: Mesh) -> None:
    dataset = client.upload_dataset(ROWS).name
    task = client.wait_task(client.create_task(spec(dataset, num_steps=1)).name)
    with mesh.client(mesh.create_key("tenants/rival")) as rival:
        for call, existing, missing in (
            (rival.get_task, task.name, f"{task.name}0"),
            (rival.cancel_task, task.name, f"{task.name}0"),
            (rival.get_dataset, dataset, f"{dataset}0"),
            (lambda name: next(rival.watch_task(name)), task.name, f"{task.name}0"),
        ):
            answers = []
            for name in (existing, missing):
                with pytest.raises(PermissionDeniedError) as denied:
                    call(name)
                answers.append(str(denied.value).replace(name, "NAME"))
            assert answers[0] == answers[1]
        with pytest.raises(PermissionDeniedError):
            rival.create_task(spec(dataset))
        assert list(rival.list_tasks()) == []
    with mesh.client("mxt_0_nonsense") as nobody, pytest.raises(UnauthenticatedError):
        nobody.list_backbones()


def test_a_second_mesh_on_the_same_data_is_refused(mesh: Mesh, backbone: Path) -> None:
    with pytest.raises(MeshError, match=str(os.getpid())):
        Mesh(mesh.data, {"tiny": backbone}).start()


def test_stopped_or_killed_it_goes_on_with_the_same_adapter(client: Client, backbone: Path, tmp_path: Path) -> None:
    """Runs once undisturbed, and once with the trainer killed, the scheduler killed, and the whole mesh stopped."""
    steps = 40
    calm = client.create_task(spec(client.upload_dataset(ROWS).name, num_steps=steps))
    calm_events = list(client.watch_task(calm.name))
    client.download_adapter(calm.name, tmp_path / "calm-adapter")
    mesh = Mesh(tmp_path / "rough", {"tiny": backbone}, environment=QUICK)
    with mesh, mesh.client() as client:
        rough = client.create_task(spec(client.upload_dataset(ROWS).name, num_steps=steps))
        seen = watch_until(client, rough.name, 5)
        os.kill(trainer_of(mesh), signal.SIGKILL)
        seen += watch_until(client, rough.name, 12, after=seen[-1].sequence)
        mesh.processes["scheduling"].kill()
        mesh.processes["scheduling"].wait()
        mesh.restart_service("scheduling")
        seen += watch_until(client, rough.name, 20, after=seen[-1].sequence)
        codes = mesh.stop()
    assert codes == dict.fromkeys(codes, 0)
    again = Mesh(tmp_path / "rough", {"tiny": backbone}, environment=QUICK)
    with again, again.client() as client:
        seen += client.watch_task(rough.name, seen[-1].sequence)
        assert client.get_task(rough.name).state == task_pb2.TASK_STATE_SUCCEEDED
        client.download_adapter(rough.name, tmp_path / "rough-adapter")
    assert [event.sequence for event in seen] == list(range(1, len(seen) + 1))
    numbers = [event.step_done.step for event in seen if event.WhichOneof("event") == "step_done"]
    assert numbers == list(range(1, steps + 1))
    assert losses(seen) == pytest.approx(losses(calm_events), rel=1e-6)
    theirs, ours = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("calm-adapter", "rough-adapter")
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-7)


def watch_until(client: Client, name: str, step: int, after: int = 0) -> list[event_pb2.TaskEvent]:
    seen = []
    for event in client.watch_task(name, after):
        seen.append(event)
        if event.WhichOneof("event") == "step_done" and event.step_done.step >= step:
            break
    return seen


def trainer_of(mesh: Mesh) -> int:
    """Process id of the executor's trainer, its only child."""
    server = mesh.processes["execution"].pid
    return int(Path(f"/proc/{server}/task/{server}/children").read_text().split()[0])
