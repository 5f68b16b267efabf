"""An honest tenant beside ten hostile ones, each doing too much of one thing: it keeps its share, its calls and its
work. Runs with MUXTUNE_TESTS=long only: ten clients and a mesh need more than two cores."""

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from muxtune.client import Client
from muxtune.local.mesh import START_ORDER, Mesh
from muxtune.v1 import execution_pb2, execution_pb2_grpc, operator_pb2, operator_pb2_grpc, task_pb2
from services.resource_names import tenant_of
from tests.hostile_tenants import HOSTILE, spec
from tests.mesh_chaos import long_mode
from tests.tiny_backbone import write_backbone

LOAD_SECONDS = float(os.environ.get("MUXTUNE_HOSTILE_SECONDS", "300"))
CALL_SECONDS, MAX_MORE_MIB, WAIT_SECONDS = 1.0, 700, 180.0
# Hostile tenants that always have a task to train, and the honest one.
TRAINING = {"honest", "many-tasks", "a-large-batch", "long-evaluations", "unread-streams"}
LEAST_OF_FAIR_SHARE = 0.8
MAX_STEPS = 100_000


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    backbone = write_backbone(tmp_path / "backbone", hidden_size=96, intermediate_size=256, num_hidden_layers=4)
    environment = {"execution": {"MUXTUNE_NUM_THREADS": "1"}}
    with Mesh(tmp_path / "mesh", {"tiny": backbone}, environment=environment) as running:
        yield running


class Calls:
    """Times an honest tenant's calls: it reads its task, lists tasks and uploads a small dataset, over and over."""

    def __init__(self, client: Client, task: str) -> None:
        self.seconds: list[float] = []
        self._client, self._task, self._stop = client, task, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Calls":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            rows = [{"text": f"row {number}"}, {"text": "another"}]
            self._time(partial(self._client.get_task, self._task))
            self._time(lambda: list(self._client.list_tasks()))
            self._time(partial(self._client.upload_dataset, rows))
            self._stop.wait(0.1)

    def _time(self, call: Callable[[], object]) -> None:
        started = time.monotonic()
        call()
        self.seconds.append(time.monotonic() - started)


def memory_bytes(mesh: Mesh) -> dict[str, int]:
    """Return the resident bytes of each service."""
    result = {}
    for service in START_ORDER:
        fields = Path(f"/proc/{mesh.processes[service].pid}/statm").read_text().split()
        result[service] = int(fields[1]) * 4096
    return result


@pytest.mark.thorough
@pytest.mark.timeout(LOAD_SECONDS + 300)
@pytest.mark.skipif(not long_mode(), reason="needs a machine of its own: MUXTUNE_TESTS=long")
def test_an_honest_tenant_beside_ten_hostile_ones(mesh: Mesh) -> None:
    honest = mesh.client(mesh.create_key("tenants/honest"))
    dataset = honest.upload_dataset([{"text": f"{i} some words to learn from"} for i in range(64)]).name
    task = honest.create_task(spec(dataset, num_steps=MAX_STEPS)).name
    until(lambda: honest.get_task(task).progress.step > 20)
    before = memory_bytes(mesh)
    most = dict(before)
    with attacking(mesh):
        until(lambda: training(mesh) >= TRAINING, lambda: str(training(mesh)))
        with Calls(honest, task) as calls:
            share = Share(mesh, honest, task)
            end = time.monotonic() + LOAD_SECONDS
            while time.monotonic() < end:
                time.sleep(1.0)
                most = {name: max(most[name], size) for name, size in memory_bytes(mesh).items()}
            fraction, busy = share.fraction(), share.busy_fraction()
    second = honest.create_task(spec(dataset, num_steps=5, seed=1)).name
    until(lambda: honest.get_task(second).state == task_pb2.TASK_STATE_SUCCEEDED)
    assert honest.get_task(task).attempt == 1  # nothing was lost and done again
    fair = 1 / (len(TRAINING) + 1)  # one more comes and goes
    p99 = statistics.quantiles(calls.seconds, n=100)[98]
    grown = {name: (most[name] - before[name]) >> 20 for name in before}
    print(f"share {fraction:.3f} of the device's work, fair is {fair:.3f}; at work {busy:.2f} of the time;",
          f"{len(calls.seconds)} calls, p50",
          f"{statistics.median(calls.seconds):.3f} s, p99 {p99:.3f} s; MiB more by service: {grown}")  # fmt: skip
    assert fraction > LEAST_OF_FAIR_SHARE * fair
    assert p99 < CALL_SECONDS
    assert max(grown.values()) < MAX_MORE_MIB, grown


@contextmanager
def attacking(mesh: Mesh) -> Iterator[None]:
    """Run the hostile tenants until the block ends."""
    keys = [f"{name}={mesh.create_key(f'tenants/{name}')}" for name in HOSTILE]
    command = [sys.executable, "-m", "tests.hostile_tenants", mesh.addresses["admission"], str(mesh.ca), *keys]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            yield
            assert process.poll() is None, "the hostile tenants have ended"
        finally:
            process.kill()


class Share:
    """Measures which part of the device's work was for a task, and which part of the time the device worked."""

    def __init__(self, mesh: Mesh, client: Client, task: str) -> None:
        self._mesh, self._client, self._task = mesh, client, task
        self._started, self._own, self._all = time.monotonic(), self._task_seconds(), self._all_seconds()

    def fraction(self) -> float:
        return (self._task_seconds() - self._own) / (self._all_seconds() - self._all)

    def busy_fraction(self) -> float:
        return (self._all_seconds() - self._all) / (time.monotonic() - self._started)

    def _task_seconds(self) -> float:
        return self._client.get_task(self._task).progress.device_seconds

    def _all_seconds(self) -> float:
        """Return what all tenants were charged."""
        with self._mesh.operator_channel("admission") as channel:
            stub = operator_pb2_grpc.OperatorServiceStub(channel)
            usage = stub.ListUsage(operator_pb2.ListUsageRequest(page_size=1000), timeout=30)
        return sum(day.device_seconds for day in usage.days)


def training(mesh: Mesh) -> set[str]:
    """Return the tenants with tasks on the executor."""
    with mesh.operator_channel("execution") as channel:
        stub = execution_pb2_grpc.ExecutionServiceStub(channel)
        described = stub.DescribeExecutor(execution_pb2.DescribeExecutorRequest(), timeout=30)
    return {tenant_of(task).rpartition("/")[2] for task in described.tasks}


def until(condition: Callable[[], bool], describe: Callable[[], str] = lambda: "did not happen in time") -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, describe()
        time.sleep(0.1)
