"""kill -9 of any service at random points, under load: nothing acknowledged is lost, nothing counts twice, and every
task ends with the adapter of a mesh that was left alone. MUXTUNE_TESTS=long makes it 200 points."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file

from muxtune.cli.mesh import Mesh
from muxtune.client import FINAL_STATES, Client
from muxtune.errors import UnavailableError
from muxtune.v1 import task_pb2
from services.failpoints import VARIABLE
from tests.mesh_chaos import Chaos, long_mode, printed_seed
from tests.services.admission.admission_mesh import DATABASES
from tests.services.admission.postgres import NoPostgresError, running_postgres
from tests.tiny_backbone import write_backbone

NUM_KILLS = 200 if long_mode() else 20
NUM_STEPS, NUM_AT_ONCE = 40, 3
END_SECONDS = 120.0
ROWS = [{"prompt": f"what is {i} and {i}", "completion": " it is more" * (1 + i % 5)} for i in range(24)]
T = TypeVar("T")
pytestmark = pytest.mark.timeout(NUM_KILLS * 15 + 300)


def specs(dataset: str) -> list[task_pb2.TaskSpec]:
    """Unlike in rank, batch, dropout, targets, schedule; one is evaluated as it goes."""
    common = {"num_steps": NUM_STEPS, "max_sequence_tokens": 64}
    modules = ["q_proj", "down_proj"]
    made = [
        (task_pb2.Lora(rank=4, alpha=8, dropout=0.1, target_modules=modules),
         {"learning_rate": 0.01, "global_batch_size": 4, "seed": 3}),
        (task_pb2.Lora(rank=8, alpha=8, dropout=0.3, target_modules=["all-linear"]),
         {"learning_rate": 0.005, "global_batch_size": 6, "micro_batch_size": 2, "warmup_steps": 5, "seed": 5,
          "heldout_fraction": 0.2, "evaluate_every_steps": 7}),
        (task_pb2.Lora(rank=2, alpha=4, target_modules=modules),
         {"learning_rate": 0.05, "optimizer": task_pb2.OPTIMIZER_SGD, "momentum": 0.9, "global_batch_size": 3}),
    ]  # fmt: skip
    return [
        task_pb2.TaskSpec(backbone="tiny", dataset=dataset, lora=lora, training=task_pb2.Training(**common, **own))
        for lora, own in made
    ]


@dataclass
class Outcome:
    """What a task left: all its events as they were watched, and its adapter."""

    task: task_pb2.Task
    events: list[task_pb2.TaskEvent]
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)

    def of(self, kind: str) -> list[task_pb2.StepDone]:
        return [getattr(event, kind) for event in self.events if event.WhichOneof("event") == kind]


class Patience:
    """Asks until it is answered: services are away longer than the client's own retries last. `give_up` ends that."""

    def __init__(self) -> None:
        self._is_over = threading.Event()

    def __call__(self, call: Callable[[], T]) -> T:
        while True:
            try:
                return call()
            except UnavailableError:
                if self._is_over.wait(0.2):
                    raise

    def give_up(self) -> None:
        self._is_over.set()


def outcome(client: Client, name: str, folder: Path, patiently: Patience) -> Outcome:
    """Watches the task to its end, whatever breaks meanwhile."""
    events: list[task_pb2.TaskEvent] = []

    def watch() -> None:
        events.extend(client.watch_task(name, events[-1].sequence if events else 0))

    patiently(watch)
    found = Outcome(patiently(lambda: client.get_task(name)), events)
    if found.task.adapter:
        dest = folder / name.replace("/", "-")
        patiently(lambda: client.download_adapter(name, dest))
        found.adapter = load_file(dest / "adapter_model.safetensors")
    return found


class Load:
    """Tenants' part: keeps a few tasks unfinished, uploads, cancels now and then, and notes what was acknowledged."""

    def __init__(self, client: Client, chance: random.Random, folder: Path) -> None:
        self._client, self._chance, self._folder = client, chance, folder
        self._pool, self._patiently = ThreadPoolExecutor(64), Patience()
        self.datasets: dict[str, str] = {}
        self.tasks: dict[str, tuple[int, Future[Outcome]]] = {}  # number of its spec
        self.cancelled: set[str] = set()

    def begin(self) -> None:
        """One dataset, and as many tasks as there are to be."""
        rows = [{"text": f"row {self._chance.random()}"} for _ in range(3)]
        request = f"upload-{len(self.datasets)}"
        stored = self._patiently(lambda: self._client.upload_dataset(rows, request_id=request))
        self.datasets[stored.name] = stored.sha256
        while sum(not watching.done() for _, watching in self.tasks.values()) < NUM_AT_ONCE:
            self._create()

    def _create(self) -> None:
        number, request = len(self.tasks) % 3, f"task-{len(self.tasks)}"
        spec = specs("tenants/default/datasets/rows")[number]
        task = self._patiently(lambda: self._client.create_task(spec, request_id=request))
        assert task.name not in self.tasks, "one task for two requests"
        watching = self._pool.submit(outcome, self._client, task.name, self._folder, self._patiently)
        self.tasks[task.name] = number, watching
        if self._chance.random() < 0.2:
            self._patiently(lambda: self._client.cancel_task(task.name))
            self.cancelled.add(task.name)

    def end(self) -> list[tuple[int, Outcome]]:
        """Waits for all that was begun."""
        deadline = time.monotonic() + END_SECONDS
        try:
            return [(number, watching.result(deadline - time.monotonic())) for number, watching in self.tasks.values()]
        except TimeoutError:
            unfinished = [str(task) for task in self._client.list_tasks() if task.state not in FINAL_STATES]
            pytest.fail(f"never ended: {unfinished}")
        finally:
            self._patiently.give_up()
            self._pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("tiny"))


def quick(folder: Path) -> dict[str, dict[str, str]]:
    (folder / "failpoints").mkdir(parents=True)
    return {
        "*": {VARIABLE: str(folder / "failpoints")},
        # No number of kills from outside may fail a task that is alone.
        "admission": {"MUXTUNE_MAX_CRASHES": "1000"},
        "execution": {
            "MUXTUNE_NUM_THREADS": "1", "MUXTUNE_CHECKPOINT_STEPS": "5", "MUXTUNE_CALIBRATION_SECONDS": "0.1",
            "OMP_NUM_THREADS": "1",
        },
    }  # fmt: skip


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of PostgreSQL, or empty: the mesh's own SQLite."""
    with ExitStack() as stack:
        if request.param == "sqlite":
            yield ""
            return
        try:
            server = stack.enter_context(running_postgres())
        except NoPostgresError as error:
            pytest.skip(f"no PostgreSQL can start here: {error}")
        yield server.new_database()


@pytest.mark.parametrize("database_url", DATABASES if long_mode() else DATABASES[:1], indirect=True)
def test_killed_at_random_points_nothing_is_lost_and_every_adapter_is_the_same(
    backbone: Path, database_url: str, tmp_path: Path
) -> None:
    seed = printed_seed()
    environment = quick(tmp_path)
    if database_url:
        environment["admission"]["MUXTUNE_DATABASE_URL"] = database_url
    mesh = Mesh(tmp_path / "of 100%41? #1" / "mesh", {"tiny": backbone}, environment=environment)
    with mesh, mesh.client() as client:
        client.upload_dataset(ROWS, "rows")
        calm = [client.create_task(spec).name for spec in specs("tenants/default/datasets/rows")]
        expected = [outcome(client, name, tmp_path / "calm", Patience()) for name in calm]
        load = Load(client, random.Random(seed), tmp_path / "rough")
        chaos = Chaos(mesh, random.Random(seed))
        with chaos.supervised():
            started = time.monotonic()
            while chaos.killed.total() < NUM_KILLS:
                load.begin()
                time.sleep(chaos.random.uniform(0, 1.0))
                chaos.kill_somewhere()
            print(f"{dict(chaos.killed)} in {time.monotonic() - started:.0f} s; restarted {dict(chaos.num_restarts)}")
            outcomes = load.end()
        print(f"{len(outcomes)} tasks, the last ended after {time.monotonic() - started:.0f} s")
        for number, found in outcomes:
            check(found, expected[number], found.task.name in load.cancelled)
            assert list(client.watch_task(found.task.name)) == found.events  # what was shown once is there for good
        assert {task.name for task in client.list_tasks()} == {*load.tasks, *calm}
        stored = {dataset.name: dataset.sha256 for dataset in client.list_datasets()}
        assert load.datasets.items() <= stored.items()
        for name in load.datasets:
            assert client.preflight_dataset(name, "tiny", task_pb2.Training(learning_rate=1, num_steps=1)).num_rows == 3


def check(found: Outcome, expected: Outcome, may_be_cancelled: bool) -> None:
    """Every step once and in order, on the same data with the same losses; the same adapter at the end."""
    states = [event.state_changed.state for event in found.events if event.WhichOneof("event") == "state_changed"]
    told = (found.task, [event.state_changed for event in found.events if event.WhichOneof("event") == "state_changed"])
    assert [event.sequence for event in found.events] == list(range(1, len(found.events) + 1))
    assert sum(state in FINAL_STATES for state in states) == 1, told
    allowed = {task_pb2.TASK_STATE_SUCCEEDED} | ({task_pb2.TASK_STATE_CANCELLED} if may_be_cancelled else set())
    assert found.task.state in allowed, told
    steps, wanted = found.of("step_done"), expected.of("step_done")
    assert [done.step for done in steps] == list(range(1, len(steps) + 1)), told
    for done, calm in zip(steps, wanted, strict=False):
        assert (done.effective_tokens, done.learning_rate) == (calm.effective_tokens, calm.learning_rate)
        assert done.loss == pytest.approx(calm.loss, rel=1e-5, abs=1e-6), told
    if found.task.state == task_pb2.TASK_STATE_CANCELLED:
        assert bool(found.adapter) == bool(steps), told
        return
    assert len(steps) == len(wanted) == NUM_STEPS, told
    evaluations = [[(done.step, pytest.approx(done.loss, rel=1e-5)) for done in o.of("evaluated")] for o in (expected,)]
    assert [(done.step, done.loss) for done in found.of("evaluated")] == evaluations[0], told
    for name, tensor in expected.adapter.items():
        torch.testing.assert_close(found.adapter[name], tensor, rtol=1e-5, atol=1e-6)
