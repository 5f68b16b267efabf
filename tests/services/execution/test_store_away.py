"""The artifact store or alignment is unavailable for one task, v, of a real trainer: v waits, its neighbours continue.

A closed gate refuses calls or lets them hang. The test opens it when the neighbours are done: if they had waited for v,
they would never be done. Neighbours: a in v's hTask, b in another.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from muxtune.v1 import event_pb2, execution_pb2
from services.execution.trainer import task_lifecycle
from services.execution.trainer_pipe import Tag
from tests.services.execution.executor_mesh import planned
from tests.services.execution.trainer_thread import TrainerThread, full, running_trainer

pytestmark = pytest.mark.timeout(300)
NEIGHBOURS = planned("a", num_steps=12), planned("b", num_steps=12)
TOGETHER = [["v", "a"], ["b"]]
either_way = pytest.mark.parametrize("is_away", [True, False], ids=["away", "hanging"])


@pytest.fixture
def trainer(tmp_path: Path, tiny_backbone: Path) -> Iterator[TrainerThread]:
    with running_trainer(tmp_path, tiny_backbone, checkpoint_steps=2) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> bytes:
    """Returns the adapter of v when nothing is unavailable."""
    with running_trainer(tmp_path_factory.mktemp("undisturbed"), tiny_backbone) as running:
        running.plan(planned("v", num_steps=6), htasks=[["v"]])
        running.until_ended("v")
        return running.adapter("v")


def assert_close(adapter: bytes, expected: bytes) -> None:
    """Compares to rounding: beside neighbours microbatches have other shapes."""
    one, other = load(adapter), load(expected)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_allclose(tensor, other[name], rtol=1e-5, atol=1e-6)


@either_way
def test_a_task_whose_checkpoint_cannot_be_read_waits_for_it(
    trainer: TrainerThread, undisturbed: bytes, is_away: bool
) -> None:
    trainer.plan(planned("v", num_steps=6), htasks=[["v"]])
    trainer.until(lambda: trainer.of("v", "checkpoint_committed"))
    trainer.plan(htasks=[])
    trainer.until_ended("v")
    recorded = trainer.of("v", "checkpoint_committed")[0]
    trainer.results.clear()
    trainer.store.gates.close("get tenants/t/tasks/v", is_away=is_away)
    trainer.plan(planned("v", attempt=2, num_steps=6, resume_from=recorded), *NEIGHBOURS, htasks=TOGETHER)
    trainer.until_ended("a", "b")
    assert trainer.store.gates.reached.is_set() and not trainer.steps("v")
    trainer.store.gates.open()
    trainer.until_ended("v")
    assert_close(trainer.adapter("v"), undisturbed)


@either_way
def test_uploads_that_fail_or_hang_delay_no_other_task(
    trainer: TrainerThread, undisturbed: bytes, is_away: bool
) -> None:
    """The uploads are checkpoints during the training, and the adapter at the end."""
    trainer.store.gates.close("put tenants/t/", is_away=is_away)
    trainer.plan(planned("v", num_steps=6), *NEIGHBOURS, htasks=TOGETHER)
    trainer.until(lambda: [len(trainer.steps(name)) for name in "vab"] == [6, 12, 12])
    assert trainer.store.gates.reached.is_set()
    assert not any(trainer.of(name, kind) for name in "vab" for kind in ("checkpoint_committed", "finished"))
    trainer.store.gates.open()
    trainer.until_ended("v", "a", "b")
    assert_close(trainer.adapter("v"), undisturbed)
    assert trainer.of("v", "checkpoint_committed")[-1].step == 6


def test_a_task_that_waits_too_long_is_released(trainer: TrainerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_lifecycle, "_MAX_WAIT_SECONDS", 0.0)
    trainer.store.gates.close("get tenants/t/tasks/v", is_away=True)
    recorded = event_pb2.CheckpointCommitted(step=2, manifest_key=f"{full('v')}/checkpoints/00000002-1/manifest.json")
    trainer.plan(planned("v", attempt=2, resume_from=recorded), NEIGHBOURS[1], htasks=TOGETHER)
    trainer.until_ended("v", "b")
    (released,) = trainer.of("v", "released")
    assert released.reason.startswith("not attached: away") and not released.num_suspects
    assert len(trainer.steps("b")) == 12


def test_exports_that_hang_delay_no_task_and_are_answered_in_order(trainer: TrainerThread) -> None:
    trainer.plan(planned("v", num_steps=10_000), planned("a", num_steps=10_000), htasks=TOGETHER)
    trainer.until(lambda: trainer.steps("v"))
    trainer.store.gates.close("put tenants/t/adapters/v")
    for name in ("v", "a"):
        trainer.tell(Tag.EXPORT, execution_pb2.ExportAdapterRequest(task=full(name)))
    trainer.until(trainer.store.gates.reached.is_set)
    seen = len(trainer.steps("v"))
    trainer.until(lambda: len(trainer.steps("v")) > seen + 10)
    assert not trainer.exported
    trainer.store.gates.open()
    trainer.until(lambda: len(trainer.exported) == 2)
    assert ["v" in each.adapter_key.split("/")[3] for each in trainer.exported] == [True, False]


@either_way
def test_a_drain_without_the_store_releases_the_task(trainer: TrainerThread, is_away: bool) -> None:
    trainer.plan(planned("v", num_steps=10_000), htasks=[["v"]])
    trainer.until(lambda: trainer.of("v", "checkpoint_committed"))
    trainer.store.gates.close("put tenants/t/", is_away=is_away)
    trainer.until(trainer.store.gates.reached.is_set)
    trainer.tell(Tag.DRAIN)
    if not is_away:  # the trainer waits for a hanging upload until its server ends the drain
        seen = len(trainer.steps("v"))
        assert not trainer.is_drained
        trainer.store.gates.open()
    trainer.until(lambda: trainer.is_drained)
    (released,) = trainer.of("v", "released")
    assert ("not checkpointed" in released.reason) is is_away
    if not is_away:
        assert trainer.of("v", "checkpoint_committed")[-1].step >= seen


def test_missing_data_of_a_new_task_does_not_delay_its_htask(trainer: TrainerThread, undisturbed: bytes) -> None:
    trainer.plan(*NEIGHBOURS, htasks=[["a"], ["b"]])
    trainer.until(lambda: trainer.steps("a"))
    trainer.alignment.gates.close(full("v"), is_away=True)
    trainer.plan(planned("v", num_steps=6), planned("a", num_steps=200), NEIGHBOURS[1], htasks=TOGETHER)
    trainer.until_ended("a", "b")
    assert trainer.alignment.gates.reached.is_set() and not trainer.steps("v")
    assert {"v", "a"} in trainer.alignment.members and {"v"} in trainer.alignment.members
    trainer.alignment.gates.open()
    trainer.until_ended("v")
    assert [step for step, _ in trainer.steps("a")] == list(range(1, 201))
    assert_close(trainer.adapter("v"), undisturbed)


@either_way
def test_an_htask_without_data_does_not_delay_the_others(
    trainer: TrainerThread, undisturbed: bytes, is_away: bool
) -> None:
    """The stream hangs in the middle: its tasks were served before, so none is split off."""
    v, a = planned("v", num_steps=6), planned("a", num_steps=6)
    trainer.alignment.gates.close(full("v"), is_away=is_away)
    trainer.plan(v, a, NEIGHBOURS[1], htasks=TOGETHER)
    trainer.until_ended("b")
    assert trainer.alignment.gates.reached.is_set() and not trainer.steps("v")
    assert 0 < trainer.data_wait_fraction < 1
    trainer.alignment.gates.open()
    trainer.until_ended("v", "a")
    assert [step for step, _ in trainer.steps("v")] == list(range(1, 7))
    assert_close(trainer.adapter("v"), undisturbed)
