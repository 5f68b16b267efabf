"""The scheduling service: `python -m services.scheduling`, settings from MUXTUNE_* variables."""

import asyncio
import math
import os
import socket
from dataclasses import dataclass

import grpc

from engine.planning.types import PlannerConfig
from engine.task import MAX_SLICE_TOKENS
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
    """Settings of the scheduling service.

    `admission_address`: "host:port", or those of several replicas. `lease_seconds`: lease of an executor.
    `leader_seconds`: lease of the leading scheduler, if several run.
    `token_budget`: tokens of one microbatch; a single task's slice may be larger. `chunk_tokens`: 0 selects it for each
    hTask, 1 means no alignment. `fuses`, `interleaves`, `preempts`: see `engine.planning.types.PlannerConfig`.
    `max_resident_tasks`: tasks on one executor at once.
    `tenant_weights`: "tenants/a=2,tenants/b=0.5"; a tenant's device time is divided by its weight, which is 1 if unset.
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
    max_resident_tasks: int = PlannerConfig.max_resident_tasks

    def __post_init__(self) -> None:
        """Raise SettingsError for an invalid address."""
        try:
            target(self.admission_address)
        except InvalidInputError as error:
            raise SettingsError(f"MUXTUNE_ADMISSION_ADDRESS: {error}") from error

    def limits(self) -> PlannerConfig:
        """Return the planner's settings. Raises SettingsError for an invalid one."""
        if not 1 <= self.token_budget <= MAX_SLICE_TOKENS:
            raise SettingsError(f"MUXTUNE_TOKEN_BUDGET: {self.token_budget} must be 1 to {MAX_SLICE_TOKENS} tokens")
        if self.chunk_tokens < 0 or self.chunk_tokens & (self.chunk_tokens - 1):
            raise SettingsError(f"MUXTUNE_CHUNK_TOKENS: {self.chunk_tokens} is neither 0 nor a power of two")
        if self.max_resident_tasks < 1:
            raise SettingsError(f"MUXTUNE_MAX_RESIDENT_TASKS: {self.max_resident_tasks} must be positive")
        return PlannerConfig(
            self.token_budget,
            self.chunk_tokens,
            self.fuses,
            self.interleaves,
            self.preempts,
            self.max_resident_tasks,
        )

    def weights(self) -> dict[str, float]:
        """Return the weights by tenant. Raises SettingsError for an invalid one."""
        weights = {}
        for text in filter(None, self.tenant_weights.split(",")):
            tenant, _, weight = text.strip().partition("=")
            try:
                weights[tenant] = float(weight)
            except ValueError:
                weights[tenant] = 0.0
            if not 0 < weights[tenant] < math.inf:
                raise SettingsError(f'MUXTUNE_TENANT_WEIGHTS: "{text}" is not TENANT=WEIGHT with a weight above 0')
        return weights


async def main() -> None:
    settings = from_environment(SchedulingSettings, os.environ)
    ledger_service = ledger_pb2.DESCRIPTOR.services_by_name["LedgerService"].full_name  # healthy on one replica only
    tls = settings.client_tls("admission")
    channel = open_channel(settings.admission_address, settings.mesh_secret, tls, ledger_service)
    ledger: ledger_pb2_grpc.LedgerServiceAsyncStub = ledger_pb2_grpc.LedgerServiceStub(channel)
    scheduler = Scheduler(
        ledger, settings.mesh_secret, settings.limits(), settings.weights(), settings.client_tls("execution")
    )
    running: list[asyncio.Task[None]] = []
    elections: list[LeaderElection] = []

    def register(server: grpc.aio.Server) -> list[str]:
        servicer = SchedulingServicer(scheduler, ledger, settings.lease_seconds)
        scheduling_pb2_grpc.add_SchedulingServiceServicer_to_server(servicer, server)
        return [scheduling_pb2.DESCRIPTOR.services_by_name["SchedulingService"].full_name]

    async def start(address: str) -> None:
        elections.append(LeaderElection(ledger, f"{socket.gethostname()} {address}", settings.leader_seconds))
        running.append(start_critical_task(elections[0].run(scheduler.run), "scheduler"))

    async def stop() -> None:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for election in elections:
            await election.resign()

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
