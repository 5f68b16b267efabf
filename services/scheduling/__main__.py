"""The scheduling service: `python -m services.scheduling`, settings from MUXTUNE_* variables."""

import asyncio
import math
import os
import socket
from dataclasses import dataclass

import grpc

from engine.planning.types import PlannerConfig
from muxtune.errors import InvalidInputError
from muxtune.transport import target
from muxtune.v1 import ledger_pb2, ledger_pb2_grpc, scheduling_pb2, scheduling_pb2_grpc
from services.rpc.authentication import mesh_authenticator
from services.rpc.client_channel import open_channel
from services.rpc.server import serve, start_critical_task
from services.rpc.server_settings import ServerSettings
from services.scheduling.audit_forwarder import audit_through_ledger
from services.scheduling.leader_election import LeaderElection
from services.scheduling.scheduler import Scheduler
from services.scheduling.servicer import SchedulingServicer
from services.settings import SettingsError, from_environment


@dataclass(frozen=True, kw_only=True)
class SchedulingSettings(ServerSettings):
    """`token_budget`: tokens of one microbatch, more only where one task's own slice is larger. `chunk_tokens`:
    0 chooses it for each hTask; 1 is no alignment. `tenant_weights`: "tenants/a=2,tenants/b=0.5", what a tenant's share
    of device time is divided by; 1 where none is given. `fuses`, `interleaves` and `preempts` are those of
    `engine.planning.types.PlannerConfig`. Of several schedulers one leads, under a lease of `leader_seconds`; the
    others stand by. `admission_address` may be several replicas'.
    """

    admission_address: str
    lease_seconds: float = 15.0
    leader_seconds: float = 6.0
    token_budget: int = PlannerConfig.token_budget
    chunk_tokens: int = PlannerConfig.chunk_tokens
    tenant_weights: str = ""
    fuses: bool = True
    interleaves: bool = True
    preempts: bool = True

    def __post_init__(self) -> None:
        """Exits for an address that nobody can dial."""
        try:
            target(self.admission_address)
        except InvalidInputError as error:
            raise SettingsError(f"MUXTUNE_ADMISSION_ADDRESS: {error}") from error

    def limits(self) -> PlannerConfig:
        """Exits if one makes no sense."""
        if self.token_budget < 1:
            raise SettingsError(f"MUXTUNE_TOKEN_BUDGET: {self.token_budget} is no positive number of tokens")
        if self.chunk_tokens < 0 or self.chunk_tokens & (self.chunk_tokens - 1):
            raise SettingsError(f"MUXTUNE_CHUNK_TOKENS: {self.chunk_tokens} is neither 0 nor a power of two")
        return PlannerConfig(self.token_budget, self.chunk_tokens, self.fuses, self.interleaves, self.preempts)

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
    keeper = ledger_pb2.DESCRIPTOR.services_by_name["LedgerService"].full_name  # one of several admissions serves it
    trust = settings.client_tls("admission")
    channel = open_channel(settings.admission_address, settings.mesh_secret, trust, keeper)
    ledger: ledger_pb2_grpc.LedgerServiceAsyncStub = ledger_pb2_grpc.LedgerServiceStub(channel)
    scheduler = Scheduler(
        ledger, settings.mesh_secret, settings.limits(), settings.weights(), settings.client_tls("execution")
    )
    running: list[asyncio.Task[None]] = []
    leaderships: list[LeaderElection] = []

    def register(server: grpc.aio.Server) -> list[str]:
        servicer = SchedulingServicer(scheduler, ledger, settings.lease_seconds)
        scheduling_pb2_grpc.add_SchedulingServiceServicer_to_server(servicer, server)
        return [scheduling_pb2.DESCRIPTOR.services_by_name["SchedulingService"].full_name]

    async def start(address: str) -> None:
        leaderships.append(LeaderElection(ledger, f"{socket.gethostname()} {address}", settings.leader_seconds))
        running.append(start_critical_task(leaderships[0].run(scheduler.run), "scheduler"))

    async def stop() -> None:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for leadership in leaderships:
            await leadership.resign()

    await serve(
        "scheduling",
        settings,
        register,
        authenticate=mesh_authenticator(settings.mesh_secret),
        audit=audit_through_ledger(ledger),
        on_ready=start,
        on_stop=stop,
    )


if __name__ == "__main__":
    asyncio.run(main())
