"""An executor ends, loses its trainer, or loses its lease. Each test has its own process."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxtune.v1 import execution_pb2
from services.storage.artifact_store import ArtifactStore
from tests.services.execution.executor_mesh import log_lines, plan_of, planned, running_mesh

pytestmark = pytest.mark.timeout(120)
STOP_RECORD = "executors/local/stopped"


async def test_sigterm_checkpoints_releases_and_exits_with_zero(tmp_path: Path, tiny_backbone: Path) -> None:
    store = ArtifactStore.open(str(tmp_path / "artifacts"))
    store.put(STOP_RECORD, b"the one before")
    async with running_mesh(tmp_path, tiny_backbone, checkpoint_steps=1000) as mesh:
        stream = await mesh.open_stream()
        mesh.alignment.pause_seconds = 0.02
        stream.send(plan_of(1, planned("d", num_steps=1000)))
        await stream.until(lambda: stream.of("d", "step_done"))
        assert await mesh.stop() == 0
        await asyncio.wait([stream.reading])
        assert stream.reading.exception() is None  # ended with OK
        steps = [done.step for done in stream.of("d", "step_done")]
        (checkpoint,) = stream.of("d", "checkpoint_committed")
        assert len(stream.of("d", "released")) == 1
        assert checkpoint.step == steps[-1] == len(steps)
        store.read_folder(checkpoint.manifest_key)
        assert [history.stopped_incarnation for history in mesh.scheduling.histories] == ["the one before"]
        assert [store.get(STOP_RECORD).decode()] == mesh.scheduling.ended  # the next one will say so
        assert not [line for line in log_lines(mesh) if line["level"] in ("WARNING", "ERROR")]


async def test_drain_releases_everything_and_the_trainer_dies_with_its_server(
    tmp_path: Path, tiny_backbone: Path
) -> None:
    async with running_mesh(tmp_path, tiny_backbone) as mesh:
        stream = await mesh.open_stream()
        stream.send(plan_of(1, planned("d", num_steps=100000)))
        await stream.until(lambda: stream.of("d", "step_done"))
        await mesh.stub.Drain(execution_pb2.DrainRequest())
        await mesh.stub.Drain(execution_pb2.DrainRequest())
        await asyncio.wait([stream.reading])
        assert stream.of("d", "released")
        described = await mesh.stub.DescribeExecutor(execution_pb2.DescribeExecutorRequest())
        assert not described.tasks
        trainer = os.pidfd_open(mesh.trainer_pid())
        is_gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(trainer, is_gone.set)
        mesh.process.kill()  # no trainer outlives its server
        async with asyncio.timeout(20):
            await is_gone.wait()
        asyncio.get_running_loop().remove_reader(trainer)
        os.close(trainer)


async def test_a_killed_trainer_is_restarted_and_its_tasks_are_released(tmp_path: Path, tiny_backbone: Path) -> None:
    async with running_mesh(tmp_path, tiny_backbone) as mesh:
        stream = await mesh.open_stream()
        mesh.alignment.pause_seconds = 0.02
        plan = plan_of(1, planned("k", num_steps=40), planned("done", num_steps=1))
        stream.send(plan)
        await stream.until(lambda: stream.of("k", "checkpoint_committed") and stream.of("done", "finished"))
        health = health_pb2_grpc.HealthStub(mesh.channel).Watch(health_pb2.HealthCheckRequest())
        states = [(await anext(health)).status]
        os.kill(mesh.trainer_pid(), signal.SIGKILL)
        states += [(await anext(health)).status for _ in range(2)]
        serving, away = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        assert states == [serving, away, serving]
        await stream.until(lambda: stream.of("k", "released"))
        assert "-9" in stream.of("k", "released")[0].reason
        assert not stream.of("done", "released")
        recorded = stream.of("k", "checkpoint_committed")[-1]
        again = planned("k", attempt=2, num_steps=40, resume_from=recorded)
        stream.send(plan_of(2, again, planned("done", num_steps=1)))  # made before scheduling knew that one is done
        await stream.until_finished("k")
        assert len(stream.of("done", "finished")) == 1
        second = [r.step_done.step for r in stream.results if r.attempt == 2 and r.HasField("step_done")]
        assert second == list(range(recorded.step + 1, 41))


async def test_a_lost_lease_drops_the_tasks_and_registers_again(tmp_path: Path, tiny_backbone: Path) -> None:
    async with running_mesh(tmp_path, tiny_backbone, drain_seconds=60) as mesh:
        stream = await mesh.open_stream()
        mesh.alignment.pause_seconds = 0.02
        stream.send(plan_of(1, planned("l", num_steps=1000)))
        await stream.until(lambda: stream.of("l", "step_done"))
        mesh.scheduling.is_lost = True
        async with asyncio.timeout(20):
            again = await mesh.scheduling.registered.get()
        assert again.lease_term == 2
        fresh = await mesh.open_stream()
        fresh.send(plan_of(2, planned("l", attempt=2, num_steps=3, version="other")))
        await fresh.until_finished("l")
        assert {result.attempt for result in fresh.results} == {2}
        assert not stream.of("l", "released")
        mesh.alignment.pause_seconds = 0.0
        silent = await mesh.open_stream(acknowledges=False)
        silent.send(plan_of(3, planned("unheard", num_steps=1)))
        await silent.until(lambda: silent.of("unheard", "finished"))
        silent.send(plan_of(4, planned("poison", num_steps=100000)))
        await silent.until(lambda: silent.of("poison", "step_done"))
        os.kill(mesh.trainer_pid(), signal.SIGKILL)
        await silent.until(lambda: silent.of("poison", "released"))  # not acknowledged, so lost with the lease
        mesh.scheduling.is_lost = True
        async with asyncio.timeout(40):
            await mesh.scheduling.registered.get()
        assert [list(history.trainer_deaths) for history in mesh.scheduling.histories[:2]] == [[], []]
        (death,) = mesh.scheduling.histories[2].trainer_deaths
        assert (death.task, death.attempt, death.released.num_suspects) == ("tenants/t/tasks/poison", 1, 1)
        await silent.close()
        async with asyncio.timeout(20):  # no stream can acknowledge, so the drain does not wait
            assert await mesh.stop() == 0


async def test_a_backbone_that_does_not_load_ends_the_service(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(pytest.fail.Exception, match="does not load as a causal language model"):
        async with running_mesh(tmp_path, tmp_path / "empty"):
            pass
