"""Settings of an executor that its trainer keeps to: checkpoints, activation checkpointing, packed weights."""

import itertools
from pathlib import Path

import pytest
import torch

from engine.kernels.packed_weight import PackedWeight
from tests.services.execution.executor_mesh import planned
from tests.services.execution.trainer_thread import running_trainer


@pytest.mark.parametrize(
    ("settings", "interval"),
    [
        ({"checkpoint_steps": 3, "checkpoint_seconds": 1e6}, 3),
        ({"checkpoint_steps": 1000, "checkpoint_seconds": 0.0}, 1),
    ],
    ids=["by steps", "by time"],
)
def test_checkpoints_come_by_steps_and_by_time_and_at_the_end(
    settings: dict[str, float], interval: int, tmp_path: Path, tiny_backbone: Path
) -> None:
    """Steps of a millisecond continue during an upload, so the next checkpoint is one or more steps late."""
    with running_trainer(tmp_path, tiny_backbone, **settings) as trainer:
        trainer.plan(planned("d", num_steps=100), htasks=[["d"]])
        trainer.until_ended("d")
        *steps, last = [checkpoint.step for checkpoint in trainer.of("d", "checkpoint_committed")]
        assert steps[0] == interval and len(steps) > 2 and last == 100
        assert all(later - earlier >= interval for earlier, later in itertools.pairwise(steps))


def test_with_activation_checkpointing_the_description_says_so_and_a_task_ends(
    tmp_path: Path, tiny_backbone: Path
) -> None:
    with running_trainer(tmp_path, tiny_backbone, activation_checkpointing=True) as trainer:
        trainer.plan(planned("a", num_steps=3), htasks=[["a"]])
        trainer.until(lambda: trainer.of("a", "finished"))
        assert len(trainer.of("a", "step_done")) == 3
        backbone = trainer.described.executor.backbone
        assert backbone.recomputed_token_bytes > 0 and backbone.kept_token_bytes > 0


@pytest.mark.parametrize("packs", [True, False])
def test_with_packed_weights_or_without_the_description_says_so_and_a_task_ends(
    tmp_path: Path, tiny_backbone: Path, packs: bool
) -> None:
    can = PackedWeight.of(torch.ones(2, 2)) is not None
    with running_trainer(tmp_path, tiny_backbone, pack_weights=packs) as trainer:
        trainer.plan(planned("a", num_steps=3), htasks=[["a"]])
        trainer.until(lambda: trainer.of("a", "finished"))
        backbone = trainer.described.executor.backbone
        assert (backbone.packed_weight_bytes > 0) == (packs and can)
        assert trainer.described.backbone_bytes == backbone.weight_bytes + backbone.packed_weight_bytes
