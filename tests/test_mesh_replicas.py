"""Two admissions on one PostgreSQL, with clients of both: either is killed, paused, cut off or restarted. Nothing
acknowledged is lost, and every task ends with the adapter of an undisturbed run. MUXTUNE_TESTS=long: 60 faults."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from muxtune.client import Client
from muxtune.errors import IllegalTransitionError
from muxtune.local.mesh import secure_channel
from muxtune.v1 import event_pb2, ledger_pb2, ledger_pb2_grpc, plan_pb2, task_pb2
from services.admission.ledger_leader import LEDGER_SERVICE
from tests.mesh_chaos import long_mode, printed_seed
from tests.mesh_load import ROWS, Load, Outcome, Patience, outcome, specs
from tests.replicated_mesh import NAMES, ReplicatedMesh
from tests.services.admission.postgres import NoPostgresError, running_postgres
from tests.test_mesh_kills import check, environment
from tests.tiny_backbone import write_backbone

NUM_FAULTS = 60 if long_mode() else 7  # each once
pytestmark = pytest.mark.timeout(NUM_FAULTS * 40 + 600)
WAIT_SECONDS = 120.0
FOUND_SECONDS = 10.0  # as in deploy/kubernetes.yaml: no event says that clients have found a replica that is back
ROWS_NAME = "tenants/default/datasets/rows"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicatedMesh]:
    folder = tmp_path_factory.mktemp("replicated")
    try:
        with running_postgres() as server:
            url = server.new_database()
            settings = environment(folder, {}, MUXTUNE_MAX_CRASHES="1000")  # kills come faster than a trainer starts
            with ReplicatedMesh(folder / "mesh", write_backbone(folder / "tiny"), url, settings) as running:
                with running.client() as client:
                    client.upload_dataset(ROWS, "rows")
                yield running
    except NoPostgresError as error:
        pytest.skip(f"no PostgreSQL can start here: {error}")


@pytest.fixture(scope="module")
def expected(mesh: ReplicatedMesh) -> list[Outcome]:
    """Return the outcomes of an undisturbed run by number of the spec. Tasks are created at a and watched at b."""
    with mesh.client("a") as creator, mesh.client("b") as watcher:
        names = [creator.create_task(spec).name for spec in specs(ROWS_NAME)]
        return [outcome(watcher, name, mesh.folder / "calm", Patience()) for name in names]


@pytest.mark.thorough
def test_killed_paused_cut_and_restarted_at_random_nothing_is_lost(
    mesh: ReplicatedMesh, expected: list[Outcome], tmp_path: Path
) -> None:
    chance = random.Random(printed_seed())
    with mesh.client() as client, mesh.client("b", "a") as other:
        before = {task.name for task in client.list_tasks()}
        load = Load(client, chance, tmp_path)
        each_once = chance.sample(_FAULTS, len(_FAULTS))
        for fault in each_once + chance.choices(_FAULTS, k=NUM_FAULTS - len(_FAULTS)):
            load.begin()
            time.sleep(chance.uniform(0, 2.0))
            print(f"{fault.__name__} at {time.monotonic():.1f} s, {mesh.await_leader()} leads the ledger", flush=True)
            fault(mesh, chance)
        for name in NAMES:
            mesh.await_serving(name)
        for number, actual in load.end():
            check(actual, expected[number], actual.task.name in load.cancelled)
            assert list(other.watch_task(actual.task.name)) == actual.events
        assert {task.name for task in client.list_tasks()} == before | set(load.tasks)
        stored = {dataset.name: dataset.sha256 for dataset in other.list_datasets()}
        assert load.datasets.items() <= stored.items()


def _kill_leader(mesh: ReplicatedMesh, chance: random.Random) -> None:
    mesh.kill(mesh.await_leader())


def _kill_either(mesh: ReplicatedMesh, chance: random.Random) -> None:
    mesh.kill(chance.choice(NAMES))


def _pause_leader(mesh: ReplicatedMesh, chance: random.Random) -> None:
    leader = mesh.await_leader()
    (other,) = set(NAMES) - {leader}
    mesh.signal(leader, signal.SIGSTOP)
    try:
        mesh.await_leader(other)
        time.sleep(chance.uniform(0, 1.0))
    finally:
        mesh.signal(leader, signal.SIGCONT)


def _cut_sessions(mesh: ReplicatedMesh, chance: random.Random) -> None:
    mesh.cut(only_sessions=True)


def _cut_everything(mesh: ReplicatedMesh, chance: random.Random) -> None:
    mesh.cut()


def _kill_at_commit(mesh: ReplicatedMesh, chance: random.Random) -> None:
    """Kill the admission that commits next, before or after the commit."""
    armed = Path(mesh.mesh.environment["*"]["MUXTUNE_FAILPOINTS"]) / f"commit.{chance.choice(['before', 'after'])}"
    armed.touch()
    deadline = time.monotonic() + 20
    while all(mesh.process(name).poll() is None for name in NAMES) and time.monotonic() < deadline:
        time.sleep(0.02)
    armed.unlink(missing_ok=True)
    for name in NAMES:
        if mesh.process(name).poll() is not None:
            mesh.start(name)


def _restart(mesh: ReplicatedMesh, chance: random.Random) -> None:
    mesh.await_serving(*NAMES)
    mesh.restart(chance.choice(NAMES))


_FAULTS: list[Callable[[ReplicatedMesh, random.Random], None]] = [
    _kill_leader, _kill_either, _pause_leader, _cut_sessions, _cut_everything, _kill_at_commit, _restart,
]  # fmt: skip


class Watch:
    """Collects a task's events from one stream."""

    def __init__(self, client: Client, task: str) -> None:
        self._client, self._task, self._began = client, task, threading.Event()
        self.events: list[event_pb2.TaskEvent] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self._began.wait(WAIT_SECONDS)

    def _read(self) -> None:
        for event in self._client.watch_task(self._task):
            self.events.append(event)
            self._began.set()

    def end(self) -> list[event_pb2.TaskEvent]:
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()
        return self.events


@pytest.mark.thorough
def test_while_the_leader_is_paused_all_goes_on_and_what_it_does_late_counts_for_nothing(
    mesh: ReplicatedMesh, expected: list[Outcome], tmp_path: Path
) -> None:
    mesh.await_serving(*NAMES)
    leader = mesh.await_leader()
    (other,) = set(NAMES) - {leader}
    with _ledger_at(mesh, leader) as ledger, mesh.client() as both, mesh.client(other) as client:
        created = both.create_task(specs(ROWS_NAME)[0]).name
        watches = [Watch(both, created) for _ in range(2)]  # calls take turns: one at each
        mesh.signal(leader, signal.SIGSTOP)
        try:
            late = ledger.PutLease.future(_lease_of("executors/late"), timeout=300)  # waits at the paused one's door
            actual = outcome(client, created, tmp_path, Patience())
            assert [watch.end() for watch in watches] == [actual.events] * 2
            again = outcome(client, client.create_task(specs(ROWS_NAME)[1]).name, tmp_path, Patience())
            assert {both.get_task(created).state for _ in range(4)} == {task_pb2.TASK_STATE_SUCCEEDED}
            assert not late.done()
        finally:
            mesh.signal(leader, signal.SIGCONT)
        check(actual, expected[0], may_be_cancelled=False)
        check(again, expected[1], may_be_cancelled=False)
        assert late.code() is grpc.StatusCode.UNAVAILABLE, late
        mesh.await_leader(other)
        with mesh.postgres() as connection:
            stored = connection.execute("SELECT count(*) FROM executors WHERE name = 'executors/late'").fetchone()
        assert stored == (0,)


@contextmanager
def _ledger_at(mesh: ReplicatedMesh, name: str) -> Iterator[Any]:
    """Yield a connected stub of LedgerService at one admission, as scheduling uses it, without retries."""
    with secure_channel(mesh.internal[name], mesh.mesh.certs / "scheduling", "admission") as channel:
        ledger = ledger_pb2_grpc.LedgerServiceStub(channel)
        ledger.GetSnapshot(ledger_pb2.GetSnapshotRequest(), timeout=20)
        yield ledger


def _lease_of(name: str) -> ledger_pb2.PutLeaseRequest:
    executor = plan_pb2.Executor(name=name, address="127.0.0.1:1", incarnation="i1")
    executor.backbone.name = "tiny"
    request = ledger_pb2.PutLeaseRequest(executor=executor)
    request.duration.FromSeconds(3600)
    return request


def test_the_command_takes_both_addresses(mesh: ReplicatedMesh) -> None:
    """Commands of a tenant and of an operator work while either replica is down."""
    tenant = {"MUXTUNE_ADDRESS": ",".join(mesh.public.values()), "MUXTUNE_API_KEY": mesh.mesh.api_key}
    operator = {"MUXTUNE_ADMISSION_ADDRESS": ",".join(mesh.internal.values())}
    for name in NAMES:
        mesh.await_serving(*NAMES)
        mesh.signal(name, signal.SIGKILL)
        mesh.process(name).wait()
        listed = _command(["dataset", "ls", "--json"], tenant | {"MUXTUNE_CA": str(mesh.mesh.ca)})
        assert ROWS_NAME in listed
        keys = _command(["key", "ls", "--json"], operator | {"MUXTUNE_CERTS": str(mesh.mesh.certs / "operator")})
        assert mesh.mesh.api_key.split("_")[1] in keys
        assert _leads_by_command(mesh, (set(NAMES) - {name}).pop())
        mesh.start(name)


def _leads_by_command(mesh: ReplicatedMesh, name: str) -> bool:
    """Return whether the replica leads, by an operator's command."""
    mesh.await_leader(name)
    certs = {"MUXTUNE_CERTS": str(mesh.mesh.certs / "operator")}
    command = [sys.executable, "-m", "services.rpc.health", mesh.internal[name], "admission", LEDGER_SERVICE]
    return subprocess.run(command, env={**os.environ, **certs}, check=False).returncode == 0


def _command(arguments: list[str], environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "muxtune.cli.main", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("num_rounds", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_rolling_restart_under_load_fails_no_call(
    num_rounds: int, mesh: ReplicatedMesh, expected: list[Outcome], tmp_path: Path
) -> None:
    """A client that knows both replicas covers the restart by its retries."""
    stopping = threading.Event()
    with mesh.client() as client:

        def call(number: int) -> int:
            """Make calls of every kind in turn until stopped. Return their number."""
            chance, count = random.Random(number), 0
            while not stopping.is_set():
                _call_something(client, chance, f"{number}-{count}", tmp_path, expected[0].task)
                count += 1
            return count

        with ThreadPoolExecutor(4) as pool:
            calling = [pool.submit(call, number) for number in range(4)]
            try:
                training = client.create_task(specs(ROWS_NAME)[1])
                watching = pool.submit(lambda: list(client.watch_task(training.name)))
                for name in NAMES * num_rounds:
                    mesh.restart(name)
                    time.sleep(FOUND_SECONDS)
            finally:
                stopping.set()
            counts = [each.result(120) for each in calling]  # raises what a call raised
            events = watching.result(120)
        print(f"{sum(counts)} calls")
        assert min(counts) > 0 and [event.sequence for event in events] == list(range(1, len(events) + 1))
        check(Outcome(client.get_task(training.name), events, expected[1].adapter), expected[1], may_be_cancelled=False)


def _call_something(client: Client, chance: random.Random, name: str, folder: Path, done: task_pb2.Task) -> None:
    kind = chance.randrange(6)
    if kind == 0:
        dataset = client.upload_dataset([{"text": name}], request_id=f"roll-{name}")
        assert client.get_dataset(dataset.name) == dataset
        client.delete_dataset(dataset.name)
    elif kind == 1:
        task = client.create_task(specs(ROWS_NAME)[2], request_id=f"roll-{name}")
        with suppress(IllegalTransitionError):  # it has ended meanwhile
            assert client.cancel_task(task.name).name == task.name
    elif kind == 2:
        assert client.get_task(done.name) == done
    elif kind == 3:
        assert done.name in {task.name for task in client.list_tasks()}
    elif kind == 4:
        client.download_adapter(done.name, folder / name)
    else:
        assert list(client.watch_task(done.name))[-1].state_changed.state == task_pb2.TASK_STATE_SUCCEEDED
