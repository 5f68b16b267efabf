"""An executor without a lease commits nothing; one scheduler leads; a task that kills executors fails alone. Processes
are real: they are stopped and continued, cut off, killed, doubled and restarted."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file

from muxtune.client import Client
from muxtune.errors import UnavailableError
from muxtune.local.certificate_authority import issue
from muxtune.local.loopback import free_addresses
from muxtune.local.mesh import OPERATOR_ENDPOINTS, START_ORDER, STOP_ORDER, Mesh
from muxtune.v1 import event_pb2, execution_pb2, execution_pb2_grpc, scheduling_pb2, scheduling_pb2_grpc, task_pb2
from tests.fault_proxy import FaultProxy
from tests.mesh_chaos import trainer_of
from tests.tiny_backbone import write_backbone

pytestmark = pytest.mark.timeout(240)
ROWS = [{"prompt": f"what is {i}", "completion": " it is more" * (1 + i % 5)} for i in range(24)]
QUICK = {
    "admission": {"MUXTUNE_MAX_CRASHES": "2"},
    "scheduling": {"MUXTUNE_LEASE_SECONDS": "3", "MUXTUNE_LEADER_SECONDS": "1.5"},
}
EXECUTION = {
    "MUXTUNE_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MUXTUNE_CHECKPOINT_STEPS": "5",
    "MUXTUNE_CALIBRATION_SECONDS": "0.1",
}
STEPS = 60
_POLL_SECONDS = 0.1


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("tiny"))


class Proxies:
    """Runs fault proxies on a separate event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies")
        self._proxies: list[FaultProxy] = []

    def open(self, target: str) -> str:
        self._proxies.append(FaultProxy(target))
        return asyncio.run_coroutine_threadsafe(self._proxies[-1].start(), self._loop).result()

    def tell(self, what: str) -> None:
        for proxy in self._proxies:
            self._loop.call_soon_threadsafe(getattr(proxy, what))

    def __enter__(self) -> "Proxies":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for proxy in self._proxies:
            asyncio.run_coroutine_threadsafe(proxy.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def proxies() -> Iterator[Proxies]:
    with Proxies() as running:
        yield running


@pytest.fixture(scope="module")
def mesh(backbone: Path, proxies: Proxies, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Run a mesh whose executor and scheduling are connected only by the proxies."""
    data = tmp_path_factory.mktemp("fencing") / "mesh"
    doors = (*START_ORDER, *OPERATOR_ENDPOINTS.values())
    addresses = free_addresses(doors)
    data.mkdir()
    (data / "mesh.json").write_text(json.dumps({"addresses": addresses}))
    through = {
        "MUXTUNE_SCHEDULING_ADDRESS": proxies.open(addresses["scheduling"]),
        "MUXTUNE_ADVERTISE_ADDRESS": proxies.open(addresses["execution"]),
    }
    with Mesh(data, {"tiny": backbone}, environment={**QUICK, "execution": EXECUTION | through}) as running:
        assert running.addresses == addresses
        yield running


@pytest.fixture
def client(mesh: Mesh) -> Iterator[Client]:
    with mesh.client() as connected:
        yield connected


def spec(dataset: str, seed: int, num_steps: int = STEPS) -> task_pb2.TaskSpec:
    training = {"learning_rate": 0.01, "num_steps": num_steps, "global_batch_size": 4, "max_sequence_tokens": 64}
    return task_pb2.TaskSpec(
        backbone="tiny",
        dataset=dataset,
        lora=task_pb2.Lora(rank=4, alpha=8, dropout=0.1, target_modules=["q_proj", "down_proj"]),
        training=task_pb2.Training(**training, seed=seed),
    )


@pytest.fixture(scope="module")
def calm(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, torch.Tensor]]:
    """Return a dataset, and the adapter that seed 3 gives in an undisturbed run."""
    with mesh.client() as client:
        dataset = client.upload_dataset(ROWS).name
        task = client.wait_task(client.create_task(spec(dataset, 3)).name)
        folder = client.download_adapter(task.name, tmp_path_factory.mktemp("calm") / "adapter")
    return dataset, load_file(folder / "adapter_model.safetensors")


def check(client: Client, name: str, expected: dict[str, torch.Tensor], folder: Path) -> list[event_pb2.TaskEvent]:
    """Check that the task SUCCEEDED once with each step once and the expected adapter. Return its events."""
    events = list(client.watch_task(name))
    assert client.get_task(name).state == task_pb2.TASK_STATE_SUCCEEDED
    steps = [event.step_done.step for event in events if event.WhichOneof("event") == "step_done"]
    assert steps == list(range(1, STEPS + 1))
    adapter = load_file(client.download_adapter(name, folder) / "adapter_model.safetensors")
    for key, tensor in expected.items():
        torch.testing.assert_close(adapter[key], tensor, rtol=0, atol=1e-6)
    return events


def until_step(client: Client, name: str, step: int) -> None:
    for event in client.watch_task(name):
        if event.WhichOneof("event") == "step_done" and event.step_done.step >= step:
            return


def messages(events: list[event_pb2.TaskEvent]) -> str:
    return "\n".join(event.state_changed.message for event in events if event.WhichOneof("event") == "state_changed")


@contextmanager
def another(mesh: Mesh, service: str, **settings: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a second process of a service beside that of the mesh."""
    folders = {name: mesh.backbone_folder(name) for name in mesh.backbones}
    overrides = {
        **(EXECUTION if service == "execution" else QUICK[service]),
        "MUXTUNE_LISTEN": "127.0.0.1:0",
        **settings,
    }
    environment = {**os.environ, **mesh._settings(service, folders), **overrides}
    with mesh.log_of(f"another-{service}").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", f"services.{service}"], env=environment, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def call(mesh: Mesh, stub: Any, service: str, method: str, request: Any) -> Any:
    with mesh.operator_channel(service) as channel:
        return getattr(stub(channel), method)(request, timeout=10, wait_for_ready=True)


def current_plan(mesh: Mesh) -> scheduling_pb2.GetPlanResponse:
    request = scheduling_pb2.GetPlanRequest()
    return call(mesh, scheduling_pb2_grpc.SchedulingServiceStub, "scheduling", "GetPlan", request)


@pytest.mark.thorough
def test_an_executor_stopped_past_its_lease_changes_nothing_when_it_goes_on(
    mesh: Mesh, client: Client, calm: tuple[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Its task moves to another executor. After SIGCONT its trainer still trains and writes checkpoints, in vain."""
    dataset, expected = calm
    name = client.create_task(spec(dataset, 3)).name
    until_step(client, name, 8)
    server, trainer = mesh.processes["execution"].pid, trainer_of(mesh)
    for pid in (server, trainer):
        os.kill(pid, signal.SIGSTOP)
    issue(mesh.certs, executors=["other"])
    certs = str(mesh.certs / "executors" / "other")
    with another(mesh, "execution", MUXTUNE_EXECUTOR_NAME="other", MUXTUNE_CERTS=certs):
        for event in client.watch_task(name):
            if "executors/other" in event.state_changed.message:
                break
        os.kill(trainer, signal.SIGCONT)  # alone: it knows nothing of leases
        until_step(client, name, 20)
        os.kill(server, signal.SIGCONT)
        events = check(client, name, expected, tmp_path / "adapter")
    assert "lease expired" in messages(events)
    log = mesh.log_of("execution").read_text()
    assert "The lease expired" in log or "does not hold the lease" in log
    until_registered(client)
    check(client, client.create_task(spec(dataset, 3)).name, expected, tmp_path / "after")  # it serves again


def until_registered(client: Client) -> None:
    """Wait until the mesh's executor has a lease again and is the only one."""
    name = client.create_task(spec(next(iter(client.list_datasets())).name, 1, num_steps=1)).name
    assert client.wait_task(name).state == task_pb2.TASK_STATE_SUCCEEDED


def test_an_executor_cut_off_past_its_lease_gives_its_tasks_up_and_comes_back(
    mesh: Mesh, client: Client, calm: tuple[str, dict[str, torch.Tensor]], proxies: Proxies, tmp_path: Path
) -> None:
    dataset, expected = calm
    name = client.create_task(spec(dataset, 3)).name
    until_step(client, name, 4)
    proxies.tell("cut")  # for less than its lease: the same attempt goes on
    proxies.tell("heal")
    until_step(client, name, 12)
    proxies.tell("hold")  # no service notices until the lease expires
    for event in client.watch_task(name):
        if "lease expired" in event.state_changed.message:
            break
    proxies.tell("heal")
    events = check(client, name, expected, tmp_path / "adapter")
    assert messages(events).count("attempt") == 2


def test_of_two_schedulers_one_leads_and_the_other_takes_over(
    mesh: Mesh, client: Client, calm: tuple[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    dataset, expected = calm
    name = client.create_task(spec(dataset, 3)).name
    until_step(client, name, 3)
    with another(mesh, "scheduling"):
        log = mesh.log_of("another-scheduling")
        until_step(client, name, 10)
        leader = mesh.processes["scheduling"]
        os.kill(leader.pid, signal.SIGSTOP)  # past its lease of 1.5 s
        until_step(client, name, 20)
        assert "leads in term" in log.read_text()
        os.kill(leader.pid, signal.SIGCONT)  # it thinks that it leads: nothing that it says counts
        events = check(client, name, expected, tmp_path / "adapter")
    assert "attempt 2" not in messages(events)  # the executor went on with what it had
    second = client.create_task(spec(dataset, 3)).name  # the one that took over has resigned
    check(client, second, expected, tmp_path / "second")


def test_with_the_store_away_tasks_pause_and_go_on(
    mesh: Mesh, client: Client, calm: tuple[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """A file replaces the store's folder until after the last step: checkpoints and the adapter have to wait."""
    dataset, expected = calm
    name = client.create_task(spec(dataset, 3)).name
    until_step(client, name, 8)
    store, away = mesh.data / "artifacts", mesh.data / "away"
    store.rename(away)
    store.touch()
    with pytest.raises(UnavailableError):
        client.upload_dataset([{"text": "no room for this"}])
    until_step(client, name, STEPS)
    assert client.get_task(name).state == task_pb2.TASK_STATE_RUNNING
    store.unlink()
    away.rename(store)
    check(client, name, expected, tmp_path / "adapter")
    client.upload_dataset([{"text": "room again"}])


@pytest.mark.thorough  # tests/test_mesh_replicas.py does the same to replicas
def test_a_rolling_restart_under_load_loses_no_request(
    mesh: Mesh, client: Client, calm: tuple[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Each service gets SIGTERM and is started again; only the client's retries cover the gap."""
    dataset, expected = calm
    long = client.create_task(spec(dataset, 3)).name
    until_step(client, long, 2)
    is_over, created = threading.Event(), list[str]()

    def call_on() -> None:
        with mesh.client() as thread_client:
            while not is_over.wait(0.3):
                created.append(thread_client.create_task(spec(dataset, 1, num_steps=1)).name)
                assert thread_client.get_dataset(dataset).num_rows == len(ROWS)
                assert created[-1] in {task.name for task in thread_client.list_tasks()}
                thread_client.delete_dataset(thread_client.upload_dataset([{"text": created[-1]}]).name)

    with ThreadPoolExecutor(2) as pool:
        calling = [pool.submit(call_on) for _ in range(2)]
        try:
            for service in STOP_ORDER:  # the executor while the task is still there
                restart(mesh, service)
        finally:
            is_over.set()
        for each in calling:
            each.result()
    for name in created:
        assert client.wait_task(name).state == task_pb2.TASK_STATE_SUCCEEDED
    events = check(client, long, expected, tmp_path / "adapter")
    assert "its executor is draining" in messages(events)


def restart(mesh: Mesh, service: str) -> None:
    mesh.processes[service].terminate()
    assert mesh.processes[service].wait(60) == 0
    mesh.restart_service(service)


def test_a_task_that_kills_its_executor_fails_alone(
    mesh: Mesh, client: Client, calm: tuple[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """The test acts as the task's fault: it kills the trainer whenever it runs the task."""
    dataset, expected = calm
    good = client.create_task(spec(dataset, 3)).name
    until_step(client, good, 2)
    poison = client.create_task(spec(dataset, 5, num_steps=1_000_000)).name
    while client.get_task(poison).state != task_pb2.TASK_STATE_FAILED:
        if kill_trainer_of(mesh, poison):
            until_away(mesh)
        time.sleep(_POLL_SECONDS)
    assert "with no other task" in client.get_task(poison).failure.message  # after two deaths, or more with both there
    check(client, good, expected, tmp_path / "adapter")


def kill_trainer_of(mesh: Mesh, task: str) -> bool:
    """Kill the trainer if it runs the task. It is stopped while its tasks are read: it cannot let the task go first."""
    if not (pid := trainer_of(mesh)):
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        described = describe(mesh)
        is_there = described is not None and task in described.tasks
        os.kill(pid, signal.SIGKILL if is_there else signal.SIGCONT)
        return is_there
    return False


def describe(mesh: Mesh) -> execution_pb2.DescribeExecutorResponse | None:
    """Return the executor's description; None while the backbone is loading."""
    try:
        request = execution_pb2.DescribeExecutorRequest()
        return call(mesh, execution_pb2_grpc.ExecutionServiceStub, "execution", "DescribeExecutor", request)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        return None


def until_away(mesh: Mesh) -> None:
    """The server has heard of its trainer's death: what it described before says nothing of the next."""
    while describe(mesh) is not None:
        time.sleep(_POLL_SECONDS)
