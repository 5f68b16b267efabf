"""Runs the execution service: `python -m services.execution`, with its settings in MUXTUNE_* variables."""

import asyncio
import os

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

from muxtune.v1 import execution_pb2, execution_pb2_grpc, scheduling_pb2_grpc
from services.execution.server.lease import LeaseKeeper
from services.execution.server.servicer import ExecutionServicer
from services.execution.settings import ExecutionSettings
from services.rpc.authentication import mesh_authenticator
from services.rpc.client_channel import open_channel
from services.rpc.server import serve, start_critical_task
from services.settings import from_environment
from services.storage.artifact_store import ArtifactStore

_TRAINER_STOP_SECONDS = 10.0


async def main() -> None:
    settings = from_environment(ExecutionSettings, os.environ)
    channel = open_channel(settings.scheduling_address, settings.mesh_secret, settings.client_tls("scheduling"))
    scheduling: scheduling_pb2_grpc.SchedulingServiceAsyncStub = scheduling_pb2_grpc.SchedulingServiceStub(channel)
    health = health_aio.HealthServicer()
    name = execution_pb2.DESCRIPTOR.services_by_name["ExecutionService"].full_name

    async def set_health(is_healthy: bool) -> None:
        """Sets the health status of the process and of ExecutionService, which does not serve without a trainer."""
        states = health_pb2.HealthCheckResponse
        for service in ("", name):
            await health.set(service, states.SERVING if is_healthy else states.NOT_SERVING)

    servicer = ExecutionServicer(settings, set_health)
    lease_keepers: list[LeaseKeeper] = []
    running: list[asyncio.Task[None]] = [start_critical_task(servicer.trainer.run(), "trainer")]

    def register(server: grpc.aio.Server) -> list[str]:
        execution_pb2_grpc.add_ExecutionServiceServicer_to_server(servicer, server)
        return [name]

    async def start(address: str) -> None:
        """Waits until the trainer has loaded and probed the backbone, then registers at scheduling."""
        ready = asyncio.create_task(servicer.ready.wait())
        await asyncio.wait({ready, running[0]}, return_when=asyncio.FIRST_COMPLETED)
        if running[0].done():
            raise SystemExit(f"the trainer could not start on {settings.backbone}: see its log above for the cause")
        artifacts = ArtifactStore.open(settings.artifact_url)
        lease_keepers.append(LeaseKeeper(settings, address, scheduling, servicer, artifacts))
        running.append(start_critical_task(lease_keepers[0].run(), "lease"))

    async def stop() -> None:
        for lease_keeper in lease_keepers:
            await lease_keeper.record_stop()
        await servicer.drain()
        for task in running[1:]:
            task.cancel()
        if servicer.lease_term:
            await lease_keepers[0].end()
        await servicer.trainer.stop(_TRAINER_STOP_SECONDS)

    await serve(
        "execution",
        settings,
        register,
        authenticate=mesh_authenticator(settings.mesh_secret),
        on_ready=start,
        on_stop=stop,
        health=health,
    )


if __name__ == "__main__":
    asyncio.run(main())
