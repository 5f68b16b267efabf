"""The four processes as `muxtune up` starts them: certificates from the first start, limits that hold while tasks
train, and two tenants that learn nothing of each other."""

import json
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from typer.testing import CliRunner

from muxtune.cli.main import app
from muxtune.client import Client
from muxtune.errors import PermissionDeniedError, QuotaExceededError, UnauthenticatedError, UnavailableError
from muxtune.local.certificate_authority import issue
from muxtune.local.mesh import START_ORDER, Mesh, secure_channel
from muxtune.v1 import (
    admission_pb2,
    admission_pb2_grpc,
    budget_pb2,
    ledger_pb2,
    ledger_pb2_grpc,
    scheduling_pb2,
    scheduling_pb2_grpc,
    task_pb2,
)
from tests.tiny_backbone import write_backbone

QUICK = {"*": {"MUXTUNE_LEASE_SECONDS": "3"}, "execution": {"MUXTUNE_CALIBRATION_SECONDS": "0"}}
SECRET_WORD = "xylophonic"
ROWS = [{"prompt": f"the {SECRET_WORD} fox {i}", "completion": " jumps over"} for i in range(20)]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    backbone = write_backbone(tmp_path_factory.mktemp("tiny"))
    with Mesh(tmp_path_factory.mktemp("mesh"), {"tiny": backbone}, environment=QUICK) as running:
        yield running


def spec(dataset: str, num_steps: int = 8, **fields: object) -> task_pb2.TaskSpec:
    return task_pb2.TaskSpec(
        backbone="tiny",
        dataset=dataset,
        lora=task_pb2.Lora(rank=4, target_modules=["q_proj"]),
        training=task_pb2.Training(
            learning_rate=0.01, num_steps=num_steps, global_batch_size=4, max_sequence_tokens=64, seed=3
        ),
        **fields,
    )


def operate(mesh: Mesh, *arguments: str) -> list[dict[str, object]]:
    """Return the output of an operator's command."""
    done = CliRunner().invoke(app, [*arguments, "--data", str(mesh.data), "--json"])
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_keys_are_readable_by_their_owner_only_and_not_in_logs(mesh: Mesh) -> None:
    for path in (*mesh.certs.rglob("*.key"), mesh.data / "mesh.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert len(list(mesh.certs.rglob("*.key"))) == 6
    logs = "".join(path.read_text() for path in (mesh.data / "logs").iterdir())
    assert "PRIVATE KEY" not in logs and mesh.api_key not in logs


@pytest.mark.parametrize("service", START_ORDER)
def test_no_connection_in_plain_text_or_without_a_certificate(mesh: Mesh, service: str) -> None:
    roots = grpc.ssl_channel_credentials(mesh.ca.read_bytes())
    options = [("grpc.ssl_target_name_override", service)]
    doors = [mesh.addresses[service]] if service != "admission" else [mesh.addresses["admission_internal"]]
    for door in doors:
        for channel in (grpc.insecure_channel(door), grpc.secure_channel(door, roots, options)):
            with channel, pytest.raises(grpc.RpcError) as refused:
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    if service == "admission":
        with grpc.insecure_channel(mesh.addresses[service]) as channel, pytest.raises(grpc.RpcError) as refused:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_public_port_has_no_reflection_and_serves_clients_only(mesh: Mesh) -> None:
    with mesh.client() as client:
        request = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        with pytest.raises(grpc.RpcError) as refused:
            list(reflection_pb2_grpc.ServerReflectionStub(client.channel).ServerReflectionInfo(request, timeout=10))
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        for metadata, code in (
            ((), grpc.StatusCode.UNAUTHENTICATED),
            ((("authorization", f"Bearer {mesh.api_key}"),), grpc.StatusCode.PERMISSION_DENIED),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                ledger_pb2_grpc.LedgerServiceStub(client.channel).GetSnapshot(
                    ledger_pb2.GetSnapshotRequest(), timeout=10, metadata=metadata
                )
            assert refused.value.code() is code
    with pytest.raises(UnauthenticatedError), mesh.client("mxt_0_nonsense") as nobody:
        nobody.list_backbones()


def test_a_service_is_not_a_tenant_with_any_key(mesh: Mesh) -> None:
    """At the inner door the certificate counts alone: neither a tenant's key nor a name in metadata adds anything."""
    brought = (("authorization", f"Bearer {mesh.api_key}"), ("x-muxtune-tenant", "tenants/default"))
    for name in ("executors/local", "alignment", "operator", "scheduling"):
        with secure_channel(mesh.addresses["admission_internal"], mesh.certs / name, "admission") as channel:
            client, ledger = (
                admission_pb2_grpc.AdmissionServiceStub(channel),
                ledger_pb2_grpc.LedgerServiceStub(channel),
            )
            calls = [(client.ListTasks, admission_pb2.ListTasksRequest(parent="tenants/default"))]
            if name != "scheduling":
                calls.append((ledger.GetSnapshot, ledger_pb2.GetSnapshotRequest()))
            for call, request in calls:
                with pytest.raises(grpc.RpcError) as refused:
                    call(request, timeout=10, metadata=brought)
                assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED, name


@pytest.mark.usefixtures("quick_retries")
def test_strangers_write_no_logs(mesh: Mesh) -> None:
    """Each connection that spoke no TLS once was a line of gRPC's in admission's log."""
    host, _, port = mesh.addresses["admission"].rpartition(":")
    log = mesh.log_of("admission")
    before = log.stat().st_size
    for junk in (b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x00\x05junk!"):
        for _ in range(10):
            with socket.create_connection((host, int(port))) as connection, suppress(ConnectionError):
                connection.sendall(junk)
                while connection.recv(1024):  # until the server closes
                    pass
    with mesh.client() as client:  # and strangers who speak TLS, but have no key
        stub = admission_pb2_grpc.AdmissionServiceStub(client.channel)
        for _ in range(30):
            with pytest.raises(grpc.RpcError):
                stub.GetTask(admission_pb2.GetTaskRequest(name="tenants/default/tasks/t"), timeout=10)
    assert log.read_bytes()[before:] == b""


def test_a_client_that_does_not_know_the_ca_sends_no_key(mesh: Mesh, tmp_path: Path) -> None:
    issue(tmp_path)
    for ca in (None, tmp_path / "ca.crt"):
        with Client(mesh.addresses["admission"], mesh.api_key, ca) as client, pytest.raises(UnavailableError):
            client.list_backbones()


def num_tokens(task: task_pb2.Task) -> int:
    """Return the effective tokens that the task was charged."""
    progress = task.progress
    done = progress.effective_tokens + progress.evaluated_tokens
    return done + progress.tokens_in_progress + progress.lost_tokens


def test_a_days_quota_pauses_a_task_and_a_budget_ends_one(mesh: Mesh) -> None:
    with mesh.client(mesh.create_key("tenants/metered")) as client:
        dataset = client.upload_dataset(ROWS).name
        operate(mesh, "tenant", "quota", "metered", "--max-tokens-per-day", "200")
        task = client.create_task(spec(dataset, 100_000))
        for event in client.watch_task(task.name):
            if event.state_changed.state == task_pb2.TASK_STATE_QUEUED and event.sequence > 1:
                break
        paused = client.get_task(task.name)
        assert num_tokens(paused) >= 200
        with pytest.raises(QuotaExceededError, match="tomorrow"):
            client.create_task(spec(dataset))
        operate(mesh, "tenant", "quota", "metered", "--max-tokens-per-day", "0")
        for following in client.watch_task(task.name, event.sequence):
            if following.step_done.step > paused.progress.step:
                break
        client.cancel_task(task.name)
        ended = client.wait_task(task.name)
        assert ended.adapter
        stopped = client.wait_task(
            client.create_task(spec(dataset, 100_000, budget=budget_pb2.Budget(max_tokens=300))).name
        )
        assert stopped.state == task_pb2.TASK_STATE_CANCELLED and stopped.adapter
        assert num_tokens(stopped) >= 300 and stopped.progress.step < 100_000
        used = num_tokens(ended) + num_tokens(stopped)
    for command, heading in (
        (["quota", "metered"], "no limit"),
        (["usage"], "tokens"),
        (["audit"], "certificate operator: SetQuota tenants/metered: OK"),
    ):
        shown = CliRunner().invoke(app, ["tenant", *command, "--data", str(mesh.data)])  # as people read them
        assert shown.exit_code == 0 and heading in shown.output
    days = operate(mesh, "tenant", "usage", "--tenant", "metered")
    assert sum(int(str(day["effective_tokens"])) for day in days) == used
    lines = operate(mesh, "tenant", "audit", "--tenant", "metered")
    assert [str(line["method"]).rpartition("/")[2] for line in lines] == [
        "UploadDataset", "CreateTask", "CreateTask", "CancelTask", "CreateTask",
    ]  # fmt: skip
    assert [line["status_code"] for line in lines] == ["OK", "OK", "RESOURCE_EXHAUSTED", "OK", "OK"]


def test_tenants_in_one_microbatch_reveal_nothing_to_each_other(mesh: Mesh) -> None:
    """Neither in what they read, nor in the explanation of their place; nor rows in any span or log."""
    names = ("one-tenant", "another-tenant")
    clients = {name: mesh.client(mesh.create_key(f"tenants/{name}")) for name in names}
    tasks = {}
    for name, client in clients.items():
        dataset = client.upload_dataset(ROWS, f"data-of-{name}").name
        tasks[name] = client.create_task(spec(dataset, 100_000), f"task-of-{name}").name
    for event in clients[names[0]].watch_task(tasks[names[0]]):
        if event.step_done.num_neighbours:  # they share
            break
    shown = {}
    for name, client in clients.items():
        client.cancel_task(tasks[name])
    for name, client in clients.items():
        events = list(client.watch_task(tasks[name]))
        listed = [*client.list_tasks(), *client.list_datasets(), *client.list_backbones()]
        shown[name] = str([events, client.get_task(tasks[name]), listed])
    for name, other in (names, reversed(names)):
        assert name in shown[name] and other not in shown[name]
        for call in (clients[name].get_task, clients[name].cancel_task):
            with pytest.raises(PermissionDeniedError):
                call(tasks[other])
    for path in (*(mesh.data / "logs").iterdir(), mesh.trace_file):
        assert SECRET_WORD not in path.read_text()
    for client in clients.values():
        client.close()


def test_other_users_of_the_machine_read_nothing_of_what_tasks_left(mesh: Mesh) -> None:
    with mesh.client() as client:
        task = client.create_task(spec(client.upload_dataset(ROWS).name))
        *_, last = client.watch_task(task.name)
    assert last.state_changed.state == task_pb2.TASK_STATE_SUCCEEDED
    files = {}
    for folder, _, names in os.walk(mesh.data):
        for path in (Path(folder), *(Path(folder) / name for name in names)):
            with suppress(FileNotFoundError):  # deleted meanwhile
                files[path] = stat.S_IMODE(path.stat().st_mode)
    open_to_others = {path for path, mode in files.items() if mode & 0o077 and path.suffix != ".crt"}
    assert all(mesh.data / "backbones" in path.parents for path in open_to_others)  # which nobody else may search
    names = {path.name for path in files}
    assert names >= {"admission.db", "adapter_model.safetensors", "spans.jsonl", "execution.log", "mesh.json"}


def test_an_operator_makes_keys_with_roles_and_ends_them(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    (viewer,) = operate(mesh, "key", "create", "acme", "--role", "viewer", "--days", "1")
    with mesh.client(str(viewer["secret"])) as client:
        assert list(client.list_tasks()) == []
        with pytest.raises(PermissionDeniedError):
            client.upload_dataset(ROWS)
    (operator,) = operate(mesh, "key", "create", "--role", "operator")
    # Such a key does at the public door what the certificate does inside.
    monkeypatch.setenv("MUXTUNE_ADDRESS", mesh.addresses["admission"])
    monkeypatch.setenv("MUXTUNE_CA", str(mesh.ca))
    monkeypatch.setenv("MUXTUNE_API_KEY", str(operator["secret"]))
    (mesh.data / "elsewhere").mkdir()
    elsewhere = ["--data", str(mesh.data / "elsewhere"), "--json"]
    listed = CliRunner().invoke(app, ["key", "list", "--tenant", "acme", *elsewhere])
    (key,) = (json.loads(line) for line in listed.stdout.splitlines())
    assert (key["role"], key["id"]) == ("KEY_ROLE_VIEWER", str(viewer["secret"]).split("_")[1])
    assert key["expire_time"] and "secret" not in key
    assert CliRunner().invoke(app, ["key", "revoke", key["id"], *elsewhere[:2]]).exit_code == 0
    with mesh.client(str(viewer["secret"])) as client, pytest.raises(UnauthenticatedError):
        client.list_tasks().__next__()


def test_only_the_operator_reads_plans(mesh: Mesh) -> None:
    with mesh.operator_channel("scheduling") as channel:
        scheduling_pb2_grpc.SchedulingServiceStub(channel).GetPlan(scheduling_pb2.GetPlanRequest(), timeout=10)
        with pytest.raises(grpc.RpcError) as refused:
            scheduling_pb2_grpc.SchedulingServiceStub(channel).RegisterExecutor(
                scheduling_pb2.RegisterExecutorRequest(), timeout=10
            )
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_certificates_are_renewed_under_a_running_mesh(mesh: Mesh) -> None:
    """New certificates of a new CA, at once: every hop is dialled again, and a task passes through all of them."""
    for name in ("ca.crt", "ca.key"):
        (mesh.certs / name).unlink()
    issue(mesh.certs)
    with mesh.client(mesh.create_key("tenants/renewed")) as client:
        dataset = client.upload_dataset(ROWS).name
        assert client.wait_task(client.create_task(spec(dataset)).name).state == task_pb2.TASK_STATE_SUCCEEDED


def test_a_drained_executor_hands_its_tasks_back_and_the_operator_is_on_record(mesh: Mesh) -> None:
    """Last here: the mesh's only executor takes no more from then on."""
    with mesh.client(mesh.create_key("tenants/drained")) as client:
        task = client.create_task(spec(client.upload_dataset(ROWS).name, 100_000))
        events = client.watch_task(task.name)
        next(event for event in events if event.WhichOneof("event") == "step_done")
        done = CliRunner().invoke(app, ["executor", "drain", "local", "--data", str(mesh.data)])
        assert done.exit_code == 0, done.output
        next(event for event in events if event.state_changed.state == task_pb2.TASK_STATE_QUEUED)
        assert client.get_task(task.name).progress.checkpoint_step > 0
    (line,) = (x for x in operate(mesh, "tenant", "audit") if str(x["method"]).endswith("DrainExecutor"))
    assert (line["subject"], line["resource"], line["status_code"]) == ("certificate operator", "executors/local", "OK")
