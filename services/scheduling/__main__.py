"""The scheduling service: `python -m services.scheduling`, settings from MUXTUNE_* variables."""

import asyncio
import math
import os
from dataclasses import dataclass

import grpc

from engine.planning.plan import Limits
from muxtune.v1 import ledger_pb2_grpc, scheduling_pb2, scheduling_pb2_grpc
from services.auth import mesh_authenticator
from services.config import ServerSettings, SettingsError, from_environment
from services.mesh import open_channel
from services.scheduling.cycle import Scheduler
from services.scheduling.servicer import SchedulingServicer
from services.server import serve, start_vital


@dataclass(frozen=True, kw_only=True)
class SchedulingSettings(ServerSettings):
    """`token_budget`: tokens of one microbatch, more only where one task's own slice is larger. `tenant_weights`:
    "tenants/a=2,tenants/b=0.5", what a tenant's share of device time is divided by; 1 where none is given.
    """

    admission_address: str
    lease_seconds: float = 15.0
    token_budget: int = 2048
    chunk_tokens: int = 16
    tenant_weights: str = ""

    def weights(self) -> dict[str, float]:
        """By tenant. Exits if one does not read."""
        found = {}
        for text in filter(None, self.tenant_weights.split(",")):
            tenant, _, weight = text.strip().partition("=")
            try:
                found[tenant] = float(weight)
            except ValueError:
                found[tenant] = 0.0
            if not 0 < found[tenant] < math.inf:
                raise SettingsError(f'MUXTUNE_TENANT_WEIGHTS: "{text}" is not TENANT=WEIGHT, a weight over 0')
        return found


async def main() -> None:
    settings = from_environment(SchedulingSettings, os.environ)
    channel = open_channel(settings.admission_address, settings.mesh_secret, settings.trust("admission"))
    ledger: ledger_pb2_grpc.LedgerServiceAsyncStub = ledger_pb2_grpc.LedgerServiceStub(channel)
    limits = Limits(settings.token_budget, settings.chunk_tokens)
    scheduler = Scheduler(ledger, settings.mesh_secret, limits, settings.weights(), settings.trust("execution"))
    running: list[asyncio.Task[None]] = []

    def register(server: grpc.aio.Server) -> list[str]:
        servicer = SchedulingServicer(scheduler, ledger, settings.lease_seconds)
        scheduling_pb2_grpc.add_SchedulingServiceServicer_to_server(servicer, server)
        return [scheduling_pb2.DESCRIPTOR.services_by_name["SchedulingService"].full_name]

    async def start(address: str) -> None:
        running.append(start_vital(scheduler.run(), "scheduler"))

    async def stop() -> None:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    await serve(
        "scheduling",
        settings,
        register,
        authenticate=mesh_authenticator(settings.mesh_secret),
        on_ready=start,
        on_stop=stop,
    )


if __name__ == "__main__":
    asyncio.run(main())
