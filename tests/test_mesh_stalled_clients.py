"""A tenant whose clients stall holds all the calls it can in a real mesh; or admission itself is away, again and again.
Another tenant's task goes on, and never counts as the cause of an executor's death."""

import asyncio
import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxtune.client import Client
from muxtune.local.mesh import Mesh
from muxtune.upload_status import upload_response
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import admission_pb2_grpc, artifact_pb2, task_pb2
from tests.tiny_backbone import write_backbone

pytestmark = pytest.mark.timeout(240)
LEASE_SECONDS = 4.0
ENVIRONMENT = {
    "admission": {"MUXTUNE_MAX_CRASHES": "1"},
    "scheduling": {"MUXTUNE_LEASE_SECONDS": str(LEASE_SECONDS), "MUXTUNE_LEADER_SECONDS": "1.5"},
    "execution": {"MUXTUNE_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MUXTUNE_CALIBRATION_SECONDS": "0.1"},
}
ROWS = [{"prompt": f"what is {i}", "completion": " it is more"} for i in range(20)]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    backbone = write_backbone(tmp_path_factory.mktemp("tiny"))
    with Mesh(tmp_path_factory.mktemp("mesh"), {"tiny": backbone}, environment=ENVIRONMENT) as running:
        yield running


@pytest.fixture
def good(mesh: Mesh) -> Iterator[Client]:
    with mesh.client(mesh.create_key("tenants/good")) as client:
        client.upload_dataset(ROWS, "rows")
        yield client


def create(client: Client, tenant: str, num_steps: int) -> str:
    training = {"learning_rate": 0.01, "num_steps": num_steps, "global_batch_size": 4, "max_sequence_tokens": 64}
    spec = task_pb2.TaskSpec(
        backbone="tiny",
        dataset=f"tenants/{tenant}/datasets/rows",
        lora=task_pb2.Lora(rank=4, target_modules=["q_proj"]),
        training=task_pb2.Training(**training),
    )
    return client.create_task(spec).name


class StalledClients:
    """Opens uploads, watches and health checks of one tenant on a thread, and holds them; `refused` counts the rest."""

    def __init__(self, mesh: Mesh, key: str, task: str) -> None:
        self._mesh, self._task, self._metadata = mesh, task, (("authorization", f"Bearer {key}"),)
        self.refused: Counter[str] = Counter()
        self._loop, self._is_over = asyncio.new_event_loop(), asyncio.Event()
        self._all_open = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._hold(),), name="stalled")

    def __enter__(self) -> "StalledClients":
        self._thread.start()
        assert self._all_open.wait(60)
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._is_over.set)
        self._thread.join()
        self._loop.close()

    async def _hold(self) -> None:
        async with self._channel() as channel, self._channel() as of_watches, self._channel() as of_health:
            stub, watches = (admission_pb2_grpc.AdmissionServiceStub(each) for each in (channel, of_watches))
            health, watch = health_pb2_grpc.HealthStub(of_health), pb.WatchTaskRequest(name=self._task)
            calls: dict[str, list[Any]] = {
                "UploadDataset": [stub.UploadDataset(self._stalled(), metadata=self._metadata) for _ in range(300)],
                "WatchTask": [watches.WatchTask(watch, metadata=self._metadata) for _ in range(1024)],
                "health": [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(600)],
            }
            held = {"UploadDataset": 29, "WatchTask": 114, "health": 456}
            running = {asyncio.ensure_future(self._count(name, call)) for name in calls for call in calls[name]}
            while len(running) > sum(held.values()):
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                assert {task.result() for task in done} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            self._all_open.set()
            await self._is_over.wait()
            for call in (call for of_kind in calls.values() for call in of_kind):
                call.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _channel(self) -> grpc.aio.Channel:
        """Return a channel with its own connection: of more than 1,024 calls on one, gRPC itself may refuse some."""
        credentials = grpc.ssl_channel_credentials(self._mesh.ca.read_bytes())
        options = [("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(self._mesh.addresses["admission"], credentials, options)

    async def _count(self, name: str, call: Any) -> grpc.StatusCode:
        """Return how the call ended, and count it."""
        try:
            code = await (upload_response(call) if name == "UploadDataset" else call.code())
        except grpc.aio.AioRpcError as error:
            code = error.code()
        self.refused[name] += 1
        return code

    async def _stalled(self) -> AsyncIterator[pb.UploadDatasetRequest]:
        yield pb.UploadDatasetRequest(header=artifact_pb2.UploadHeader())
        yield pb.UploadDatasetRequest(file=artifact_pb2.FileHeader(size_bytes=1 << 20, sha256="0" * 64))
        await self._is_over.wait()


def test_a_tenant_that_holds_all_the_calls_it_can_stops_no_task_of_another(
    mesh: Mesh, good: Client, tmp_path: Path
) -> None:
    """Also while scheduling is killed, connects again and plans a new task."""
    bad_key = mesh.create_key("tenants/bad")
    with mesh.client(bad_key) as bad:
        bad.upload_dataset(ROWS, "rows")
        theirs = create(bad, "bad", 1_000_000)
        long = create(good, "good", 1_000_000)
        until_step(good, long, 2)
        with StalledClients(mesh, bad_key, theirs) as stalled:
            assert stalled.refused == {"UploadDataset": 300 - 29, "WatchTask": 1024 - 114, "health": 600 - 456}
            until_step(good, long, good.get_task(long).progress.step + 5)
            assert mesh.create_key("tenants/another")  # by the operator
            mesh.processes["scheduling"].kill()
            mesh.processes["scheduling"].wait()
            mesh.restart_service("scheduling")
            quick = create(good, "good", 3)
            assert good.wait_task(quick).state == task_pb2.TASK_STATE_SUCCEEDED
            good.download_adapter(quick, tmp_path / "adapter")
            until_step(good, long, good.get_task(long).progress.step + 5)
        for service in ("scheduling", "execution"):  # none of their calls was refused
            log = mesh.log_of(service).read_text()
            assert "RESOURCE_EXHAUSTED" not in log and "in progress" not in log and "has no room" not in log
        for client, task in ((bad, theirs), (good, long)):
            client.cancel_task(task)
            client.wait_task(task)


def until_step(client: Client, name: str, step: int) -> None:
    for event in client.watch_task(name):
        if event.WhichOneof("event") == "step_done" and event.step_done.step >= step:
            return
    raise AssertionError(f"{name} ended before step {step}: {client.get_task(name)}")


@contextmanager
def stopped(mesh: Mesh, service: str) -> Iterator[None]:
    process = mesh.processes[service].pid
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def test_a_lease_that_ran_out_while_a_service_was_away_counts_against_no_task(mesh: Mesh, good: Client) -> None:
    """Twice in a row without a step of the task between, where a single crash would make it fail."""
    name = create(good, "good", 60)
    until_step(good, name, 2)
    with stopped(mesh, "alignment"):  # the executor gets no more data: no step is done
        for service in ("admission", "scheduling"):
            attempt, num_lost = good.get_task(name).attempt, num_lost_leases(mesh)
            with stopped(mesh, service):
                until(lambda num_lost=num_lost: num_lost_leases(mesh) > num_lost)
            until(lambda attempt=attempt: good.get_task(name).attempt > attempt)
            until(lambda: good.get_task(name).state == task_pb2.TASK_STATE_RUNNING)
            assert num_suspicions(mesh, name) == (0, "")
    assert good.wait_task(name).state == task_pb2.TASK_STATE_SUCCEEDED


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def num_lost_leases(mesh: Mesh) -> int:
    """Return how often the executor has found that its lease ran out."""
    return mesh.log_of("execution").read_text().count("The lease expired")


def num_suspicions(mesh: Mesh, task: str) -> tuple[int, str]:
    """Return the task's crashes and unexplained losses, from the database."""
    with closing(sqlite3.connect(mesh.data / "admission.db")) as connection:
        (found,) = connection.execute("SELECT crashes, losses FROM tasks WHERE name = ?", (task,))
    return found
