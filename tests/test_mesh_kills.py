"""Kills services at random points under load: nothing acknowledged is lost, nothing counts twice, and every task ends
with the same adapter as in a mesh without kills. MUXTUNE_TESTS=long makes it 200 points."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from muxtune.client import Client
from muxtune.local.mesh import Mesh
from muxtune.task_states import FINAL_STATES
from muxtune.v1 import task_pb2
from services.failpoints import VARIABLE
from tests.mesh_chaos import Chaos, long_mode, printed_seed
from tests.mesh_load import NUM_STEPS, ROWS, Load, Outcome, Patience, outcome, specs
from tests.platform_storage import platform_storage
from tests.tiny_backbone import write_backbone

NUM_KILLS, NUM_KILLS_APART = (200, 40) if long_mode() else (20, 6)
THOROUGH = pytest.mark.thorough
pytestmark = pytest.mark.timeout(NUM_KILLS * 15 + 300)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Yield settings of all services: their state is in the folder of the mesh, or in a platform's storage."""
    if request.param == "folder":
        yield {}
        return
    with platform_storage() as variables:
        yield variables


def environment(folder: Path, settings: dict[str, str], **admission: str) -> dict[str, dict[str, str]]:
    (folder / "failpoints").mkdir(parents=True)
    return {
        "*": {VARIABLE: str(folder / "failpoints"), **settings},
        "admission": admission,
        "execution": {
            "MUXTUNE_NUM_THREADS": "1", "MUXTUNE_CHECKPOINT_STEPS": "5", "MUXTUNE_CALIBRATION_SECONDS": "0.1",
            "OMP_NUM_THREADS": "1",
        },
    }  # fmt: skip


@contextmanager
def mesh_of(backbone: Path, folder: Path, environment: dict[str, dict[str, str]]) -> Iterator[Mesh]:
    """Run a mesh in a folder whose name has special characters."""
    with Mesh(folder / "of 100%41? #1" / "mesh", {"tiny": backbone}, environment=environment) as mesh:
        yield mesh


@pytest.mark.parametrize("num_kills", [6, pytest.param(NUM_KILLS, marks=THOROUGH)])
@pytest.mark.parametrize("settings", ["folder", "platform"] if long_mode() else ["folder"], indirect=True)
def test_killed_at_random_points_nothing_is_lost_and_every_adapter_is_the_same(
    backbone: Path, settings: dict[str, str], num_kills: int, tmp_path: Path
) -> None:
    """Kills come faster than a trainer starts, so each task would seem to kill its executor many times in a row. The
    rule that fails such tasks is off here and on in the next test."""

    def kill_soon(load: Load, chaos: Chaos) -> None:
        time.sleep(chaos.random.uniform(0, 1.0))
        chaos.kill_somewhere()

    chaotic = environment(tmp_path, settings, MUXTUNE_MAX_CRASHES="1000")
    with mesh_of(backbone, tmp_path, chaotic) as mesh, mesh.client() as client:
        kill_under_load(mesh, client, tmp_path, num_kills, kill_soon)


@pytest.mark.parametrize("num_kills", [pytest.param(NUM_KILLS_APART, marks=THOROUGH)])
def test_kills_of_the_executor_that_leave_each_task_time_for_a_step_fail_none(
    backbone: Path, num_kills: int, tmp_path: Path
) -> None:
    """The limit of three crashes in a row has its default."""

    def kill_later(load: Load, chaos: Chaos) -> None:
        load.until_each_has_done_a_step()
        time.sleep(chaos.random.uniform(0, 0.5))
        chaos.kill_executor()

    with mesh_of(backbone, tmp_path, environment(tmp_path, {})) as mesh, mesh.client() as client:
        kill_under_load(mesh, client, tmp_path, num_kills, kill_later)


def kill_under_load(
    mesh: Mesh, client: Client, folder: Path, num_kills: int, kill: Callable[[Load, Chaos], None]
) -> None:
    """Run three tasks without kills, then the same tasks again and again while processes are killed."""
    seed = printed_seed()
    client.upload_dataset(ROWS, "rows")
    calm = [client.create_task(spec).name for spec in specs("tenants/default/datasets/rows")]
    expected = [outcome(client, name, folder / "calm", Patience()) for name in calm]
    load, chaos = Load(client, random.Random(seed), folder / "rough"), Chaos(mesh, random.Random(seed))
    with chaos.supervised():
        started = time.monotonic()
        while chaos.killed.total() < num_kills:
            load.begin()
            kill(load, chaos)
        print(f"{dict(chaos.killed)} in {time.monotonic() - started:.0f} s; restarted {dict(chaos.num_restarts)}")
        outcomes = load.end()
    print(f"{len(outcomes)} tasks, the last ended after {time.monotonic() - started:.0f} s")
    worst = max((check(actual, expected[number], actual.task.name in load.cancelled) for number, actual in outcomes))
    print(f"largest difference of a parameter {worst:.1e}")
    for _, actual in outcomes:
        assert list(client.watch_task(actual.task.name)) == actual.events  # what was shown once is there for good
    assert {task.name for task in client.list_tasks()} == {*load.tasks, *calm}
    stored = {dataset.name: dataset.sha256 for dataset in client.list_datasets()}
    assert load.datasets.items() <= stored.items()
    for name in load.datasets:
        assert client.preflight_dataset(name, "tiny", task_pb2.Training(learning_rate=1, num_steps=1)).num_rows == 3
    left = {folder.name: len(list(folder.iterdir())) for folder in (mesh.data / "scratch").iterdir()}
    assert left == {"admission": 1, "alignment": 1, "trainer": 1}, "temporary files of killed processes are removed"


def check(actual: Outcome, expected: Outcome, may_be_cancelled: bool) -> float:
    """Check that every step is there once and in order, with the same data and dropout bit for bit, and the losses and
    the adapter to 1e-6. Return the largest difference of a parameter."""
    states = [change.state for change in actual.of("state_changed")]
    history = (actual.task, actual.of("state_changed"))
    assert [event.sequence for event in actual.events] == list(range(1, len(actual.events) + 1))
    assert sum(state in FINAL_STATES for state in states) == 1, history
    allowed = {task_pb2.TASK_STATE_SUCCEEDED} | ({task_pb2.TASK_STATE_CANCELLED} if may_be_cancelled else set())
    assert actual.task.state in allowed, history
    steps, wanted = actual.of("step_done"), expected.of("step_done")
    assert [done.step for done in steps] == list(range(1, len(steps) + 1)), history
    for done, calm in zip(steps, wanted, strict=False):
        assert done.input_digest == calm.input_digest and len(calm.input_digest) == 32
        assert (done.effective_tokens, done.learning_rate) == (calm.effective_tokens, calm.learning_rate)
        assert done.loss == pytest.approx(calm.loss, rel=1e-6), history
    if actual.task.state == task_pb2.TASK_STATE_CANCELLED:
        assert bool(actual.adapter) == bool(steps), history
        return 0.0
    assert len(steps) == len(wanted) == NUM_STEPS, history
    evaluations = [(done.step, pytest.approx(done.loss, rel=1e-6)) for done in expected.of("evaluated")]
    assert [(done.step, done.loss) for done in actual.of("evaluated")] == evaluations, history
    assert actual.adapter.keys() == expected.adapter.keys() and all(t.any() for t in expected.adapter.values())
    for name, tensor in expected.adapter.items():
        torch.testing.assert_close(actual.adapter[name], tensor, rtol=0, atol=1e-6)
    return max((actual.adapter[name] - tensor).abs().max().item() for name, tensor in expected.adapter.items())
