"""The watchdog kills a trainer that hangs; its tasks are released with the cause and continue in the next trainer."""

import os
import signal
from pathlib import Path

import pytest

from tests.services.execution.executor_mesh import log_lines, plan_of, planned, running_mesh

pytestmark = pytest.mark.timeout(120)


async def test_a_stopped_trainer_is_killed_and_its_tasks_continue(tmp_path: Path, tiny_backbone: Path) -> None:
    async with running_mesh(tmp_path, tiny_backbone, watchdog_seconds=2.0, calibration_seconds=0.1) as mesh:
        stream = await mesh.open_stream()
        mesh.alignment.pause_seconds = 0.02
        stream.send(plan_of(1, planned("h", num_steps=30), planned("n", num_steps=30)))
        await stream.until(lambda: stream.of("h", "checkpoint_committed"))
        os.kill(mesh.trainer_pid(), signal.SIGSTOP)
        await stream.until(lambda: stream.of("h", "released") and stream.of("n", "released"))
        (released,) = stream.of("h", "released")
        assert "watchdog" in released.reason and released.num_suspects == 2
        recorded = stream.of("h", "checkpoint_committed")[-1]
        stream.send(plan_of(2, planned("h", attempt=2, num_steps=30, resume_from=recorded)))
        await stream.until_finished("h")
        assert any("watchdog" in line["message"] for line in log_lines(mesh) if line["level"] == "ERROR")


@pytest.mark.thorough
async def test_a_trainer_that_is_idle_or_waits_for_data_is_not_killed(tmp_path: Path, tiny_backbone: Path) -> None:
    """The trainer does not change within four times the watchdog's limit, in each of the two states."""
    async with running_mesh(tmp_path, tiny_backbone, watchdog_seconds=0.8, calibration_seconds=0.1) as mesh:
        trainer = mesh.trainer_pid()
        stream = await mesh.open_stream()
        renewed = mesh.scheduling.num_renewals
        while mesh.scheduling.num_renewals < renewed + 3:  # renewed every second
            await mesh.scheduling.renewed.wait()
        mesh.alignment.gate.clear()
        stream.send(plan_of(1, planned("w", num_steps=3)))
        while mesh.scheduling.num_renewals < renewed + 6:
            await mesh.scheduling.renewed.wait()
        mesh.alignment.gate.set()
        await stream.until_finished("w")
        assert mesh.trainer_pid() == trainer
