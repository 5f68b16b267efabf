"""A mesh on one machine: killed while it starts, several services killed at once, two admissions on one database, and a
proxy in the environment. Everything is real processes; what a tenant sees is that its task ends well."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxtune.aio import AsyncClient
from muxtune.client import Client
from muxtune.local.loopback import free_addresses
from muxtune.local.mesh import START_ORDER, Mesh
from muxtune.local.mesh_state import read_state
from muxtune.local.supervisor import Supervisor
from muxtune.v1 import task_pb2
from services.admission.ledger.fencing import FencedDatabase
from services.admission.ledger_leader import LEDGER_SERVICE
from services.admission.store.database import Database
from tests.counting_proxy import CountingProxy, counting_proxy
from tests.mesh_chaos import printed_seed
from tests.thoroughness import is_thorough
from tests.tiny_backbone import write_backbone

ROOT = Path(__file__).parents[1]
SECONDS = 120.0
QUICK = {"execution": {"MUXTUNE_CALIBRATION_SECONDS": "0", "MUXTUNE_NUM_THREADS": "1"}}
ROWS = [{"prompt": f"the quick fox {i}", "completion": " jumps over"} for i in range(20)]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def proxy() -> Iterator[CountingProxy]:
    with counting_proxy() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def mesh(proxy: CountingProxy, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Run a mesh, with a proxy in its environment and in this process's, in a folder whose name needs care."""
    with Mesh(tmp_path_factory.mktemp("a,x=b") / "data", {"tiny": backbone}, environment=QUICK) as running:
        yield running


def spec(dataset: str, num_steps: int = 5) -> task_pb2.TaskSpec:
    return task_pb2.TaskSpec(
        backbone="tiny",
        dataset=dataset,
        lora=task_pb2.Lora(rank=4, target_modules=["q_proj"]),
        training=task_pb2.Training(
            learning_rate=0.01, num_steps=num_steps, global_batch_size=4, max_sequence_tokens=64, seed=3
        ),
    )


@contextmanager
def tenant_unharmed(mesh: Mesh, num_steps: int = 200) -> Iterator[Client]:
    """Have a tenant's task run meanwhile, and another one created then; both end as they should, each step once."""
    with mesh.client() as client:
        dataset = client.upload_dataset(ROWS).name
        running = client.create_task(spec(dataset, num_steps))
        next(event for event in client.watch_task(running.name) if event.WhichOneof("event") == "step_done")
        yield client
        for task in (running, client.create_task(spec(dataset))):
            events = list(client.watch_task(task.name))
            assert client.get_task(task.name).state == task_pb2.TASK_STATE_SUCCEEDED
            steps = [event.step_done.step for event in events if event.WhichOneof("event") == "step_done"]
            assert steps == list(range(1, task.spec.training.num_steps + 1))


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def health_of_admission(mesh: Mesh, service: str = "") -> Iterator[Iterator[int]]:
    """Yield each status that admission's health has, from now on."""
    with mesh.operator_channel("admission") as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=SECONDS)  # type: ignore[attr-defined]
        yield (answer.status for answer in watch)
        watch.cancel()


def start_admission(mesh: Mesh, log: Path, database: Path) -> "subprocess.Popen[bytes]":
    """Start an admission by hand on the database of the mesh."""
    addresses = free_addresses(["public", "internal"])
    settings = mesh._settings("admission", {"tiny": mesh.backbone_folder("tiny")})
    settings |= {"MUXTUNE_LISTEN": addresses["public"], "MUXTUNE_INTERNAL_LISTEN": addresses["internal"]}
    settings["MUXTUNE_DATABASE_URL"] = f"sqlite:///{database}"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "services.admission"]
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, stdout=output, stderr=output)


async def test_no_proxy_of_the_environment_carries_the_traffic_of_a_mesh(mesh: Mesh, proxy: CountingProxy) -> None:
    with tenant_unharmed(mesh, num_steps=3):
        async with AsyncClient(mesh.addresses["admission"], mesh.api_key, mesh.ca) as client:
            assert await client.list_backbones()
    assert proxy.num_connections == 0


def test_a_second_admission_on_the_database_is_refused(mesh: Mesh, tmp_path: Path) -> None:
    """Also by another name of the file; services/admission/store/test_one_process.py has all kinds of names."""
    (tmp_path / "link").symlink_to(mesh.data)
    with tenant_unharmed(mesh), health_of_admission(mesh, LEDGER_SERVICE) as health:
        second = start_admission(mesh, tmp_path / "log", tmp_path / "link" / "admission.db")
        assert second.wait(SECONDS) == 1
        assert next(health) == SERVING
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert f"MUXTUNE_DATABASE_URL: {(mesh.data / 'admission.db').resolve()} is in use by another admission" in line
    assert f"process {mesh.processes['admission'].pid}" in line and "PostgreSQL" in line


def test_an_admission_that_lost_the_ledger_says_so_and_acquires_it_again(mesh: Mesh, tmp_path: Path) -> None:
    """First to an older version, which knows no lock; then to one that starts after the lock was deleted."""
    with tenant_unharmed(mesh), health_of_admission(mesh) as health:
        assert next(health) == SERVING
        other = Database(f"sqlite:///{mesh.data / 'admission.db'}")
        FencedDatabase(other)
        assert (next(health), next(health)) == (NOT_SERVING, SERVING)
        other.close()
        (mesh.data / "admission.db.lock").unlink()
        second = start_admission(mesh, tmp_path / "second.log", mesh.data / "admission.db")
        assert next(health) == NOT_SERVING
        wait_until(lambda: "leads the ledger" in (tmp_path / "second.log").read_text())
        second.kill()
        second.wait()
        assert next(health) == SERVING


def test_services_that_are_killed_together_are_all_restarted(mesh: Mesh) -> None:
    """Two at once; and when these start, the other two."""
    lines: list[str] = []
    supervisor = Supervisor(mesh, lines.append)
    with tenant_unharmed(mesh):
        for group in (("alignment", "admission"), ("scheduling", "execution")):
            for service in group:
                mesh.processes[service].kill()
            wait_until(lambda: not _check(supervisor, mesh))
        wait_until(
            lambda: not _check(supervisor, mesh) and sum("is restarted and healthy" in line for line in lines) == 4
        )
    for service in START_ORDER:
        assert any(line.startswith(f"{service} was killed by SIGKILL") for line in lines)


def _check(supervisor: Supervisor, mesh: Mesh) -> bool:
    """Have the supervisor check once. Return whether a service is dead afterwards."""
    supervisor.check()
    return bool(mesh.dead_services())


def start_up(data: Path, backbone: Path, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "muxtune.cli.main", "up", "--data", str(data), "--backbone", f"tiny={backbone}"]
    with log.open("wb") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)


def processes_of(data: Path) -> dict[int, str]:
    """Return the command lines of processes that have the folder in them or in their environment."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = ((process / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:
            continue
        if os.fsencode(data) in command + environment:  # both are empty for a zombie
            found[int(process.name)] = command.replace(b"\0", b" ").decode(errors="replace")
    return found


@pytest.mark.parametrize("turn", range(10 if is_thorough() else 1))
def test_killed_at_any_moment_of_its_start_it_leaves_no_process_and_starts_again(
    turn: int, backbone: Path, tmp_path: Path
) -> None:
    chance = random.Random(printed_seed() + turn)
    moments = [chance.uniform(0, 3) for _ in range(4)]
    print(moments)

    def start_and_kill(moment: float) -> None:
        data = tmp_path / f"killed-{moment}"
        up = start_up(data, backbone, tmp_path / f"{moment}.log")
        time.sleep(moment)
        up.kill()
        up.wait()
        wait_until(lambda: not processes_of(data))

    with ThreadPoolExecutor(len(moments)) as threads:
        list(threads.map(start_and_kill, moments))


def test_after_a_kill_the_next_start_waits_for_the_services_that_are_still_ending(
    backbone: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    killed = start_up(data, backbone, tmp_path / "killed.log")
    wait_until(lambda: (data / "logs" / "execution.log").exists())
    addresses = read_state(data)["addresses"]
    (admission,) = [pid for pid, command in processes_of(data).items() if "services.admission" in command]
    os.kill(admission, signal.SIGSTOP)
    killed.kill()
    killed.wait()
    following = start_up(data, backbone, tmp_path / "following.log")
    try:
        wait_until(lambda: (data / "lock").read_text() == str(following.pid))
        wait_until(lambda: set(processes_of(data)) == {following.pid, admission})
        log = data / "logs" / "admission.log"
        size = log.stat().st_size
        os.kill(admission, signal.SIGCONT)
        wait_until(lambda: b"leads the ledger" in log.read_bytes()[size:])
        assert admission not in processes_of(data)
        assert read_state(data)["addresses"] == addresses
    finally:
        following.send_signal(signal.SIGINT)
        assert following.wait(SECONDS) == 0
    assert not processes_of(data)
