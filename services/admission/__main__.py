"""The admission service: `python -m services.admission`, settings from MUXTUNE_* variables."""

import asyncio
import os
from dataclasses import dataclass

import grpc

from engine.planning.plan import Limits
from muxtune.v1 import (
    admission_pb2,
    admission_pb2_grpc,
    alignment_pb2_grpc,
    key_pb2,
    key_pb2_grpc,
    ledger_pb2,
    ledger_pb2_grpc,
)
from services.admission.admit import Admitter, Quota
from services.admission.database import Database
from services.admission.keys import KeyStore
from services.admission.ledger import Ledger
from services.admission.notifier import Notifier
from services.admission.servicer import AdmissionServicer, KeyServicer, LedgerServicer, authenticator
from services.admission.sweep import sweep_checkpoints
from services.artifacts import ArtifactStore
from services.config import ServerSettings, from_environment
from services.mesh import open_channel
from services.server import serve, start_vital


@dataclass(frozen=True, kw_only=True)
class AdmissionSettings(ServerSettings):
    """`database_url` as SQLAlchemy writes it: sqlite:///path or postgresql+psycopg://..."""

    database_url: str
    artifact_url: str
    alignment_address: str
    max_adapter_bytes: int = 512 << 20
    max_unfinished_tasks: int = 1000
    token_budget: int = 2048
    chunk_tokens: int = 0


async def main() -> None:
    settings = from_environment(AdmissionSettings, os.environ)
    database = Database(settings.database_url)
    database.migrate()
    artifacts = ArtifactStore.open(settings.artifact_url)
    alignment = alignment_pb2_grpc.AlignmentServiceStub(open_channel(settings.alignment_address, settings.mesh_secret))
    quota = Quota(settings.max_unfinished_tasks, Limits(settings.token_budget, settings.chunk_tokens))
    notifier, keys = Notifier(), KeyStore(database)
    ledger = LedgerServicer(Ledger(database), notifier, lambda: sweep_checkpoints(database, artifacts))
    admitter = Admitter(database, artifacts, alignment, quota)
    servicer = AdmissionServicer(database, artifacts, alignment, admitter, notifier, settings.max_adapter_bytes)

    def register(server: grpc.aio.Server) -> list[str]:
        admission_pb2_grpc.add_AdmissionServiceServicer_to_server(servicer, server)
        key_pb2_grpc.add_KeyServiceServicer_to_server(KeyServicer(keys), server)
        ledger_pb2_grpc.add_LedgerServiceServicer_to_server(ledger, server)
        modules = ((admission_pb2, "AdmissionService"), (key_pb2, "KeyService"), (ledger_pb2, "LedgerService"))
        return [module.DESCRIPTOR.services_by_name[name].full_name for module, name in modules]

    async def stop() -> None:
        notifier.close()

    running = [
        start_vital(ledger.announce_expiries(), "leases"),
        start_vital(ledger.sweep_after_changes(), "sweep"),
    ]
    await serve("admission", settings, register, authenticate=authenticator(keys, settings.mesh_secret), on_stop=stop)
    for task in running:
        task.cancel()
    database.close()


if __name__ == "__main__":
    asyncio.run(main())
