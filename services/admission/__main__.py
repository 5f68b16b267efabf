"""Starts the admission service: `python -m services.admission`, with settings from MUXTUNE_* variables."""

import asyncio
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
from grpc_health.v1.health import aio as health_aio

from engine.errors import UnavailableError
from engine.planning.types import PlannerConfig
from muxtune.v1 import (
    admission_pb2,
    admission_pb2_grpc,
    alignment_pb2_grpc,
    key_pb2,
    key_pb2_grpc,
    ledger_pb2,
    ledger_pb2_grpc,
    operator_pb2,
    operator_pb2_grpc,
)
from services.admission.api.oidc import OidcProvider, TokenVerifier
from services.admission.api.operator_rpcs import OperatorServicer
from services.admission.api.servicer import AdmissionServicer, KeyServicer, LedgerServicer
from services.admission.api.token_authenticator import create_authenticator
from services.admission.cleanup.garbage_collection_loop import GarbageCollectionLoop
from services.admission.cleanup.garbage_collector import GarbageCollector
from services.admission.cleanup.retention import OldRows, RetentionPolicy
from services.admission.ledger.ledger import Ledger
from services.admission.ledger.limits_watcher import LimitsWatcher
from services.admission.ledger.replicas import Replicas, SingleReplica
from services.admission.ledger_leader import LEDGER_SERVICE, LedgerLeader
from services.admission.policy.admission_controller import AdmissionController, DefaultQuota
from services.admission.store.api_keys import KeyStore
from services.admission.store.audit_log import create_audit_writer
from services.admission.store.change_notifier import ChangeNotifier
from services.admission.store.database import Database
from services.admission.threads import AdmissionThreads
from services.concurrency.byte_budget import ByteBudget
from services.rpc.authentication import Authenticate
from services.rpc.certificates import Certificates
from services.rpc.client_channel import open_channel
from services.rpc.rate_limit import RateLimit
from services.rpc.server import serve, start_critical_task
from services.rpc.server_settings import ServerSettings
from services.rpc.unauthenticated_limiter import UnauthenticatedCallLimiter
from services.settings import SettingsError, from_environment
from services.storage.artifact_store import ArtifactStore
from services.storage.scratch_folder import ScratchFolder


@dataclass(frozen=True, kw_only=True)
class AdmissionSettings(ServerSettings):
    """Settings of the admission service. 0 is no limit for `*_per_second` and its own `max_*` but `max_crashes`.

    `database_url`: an SQLAlchemy URL, sqlite:///path or postgresql+psycopg://...
    `listen`: address for clients, with the certificate in `public_certs` (default: `certs`).
    `internal_listen`: address for services and operators, which present certificates.
    `oidc_*`: the issuer of tenants' tokens (services/admission/api/oidc.py); without an issuer, tokens are refused.
    `requests_per_second`: maximum calls of one tenant. `watch_events_per_second`: events that all its WatchTask streams
    together receive; later ones wait.
    `refusals_per_second`: maximum unauthenticated calls from one address; 0 behind a proxy, where all share an address.
    `scratch`: folder of temporary files, on a local disk; by default one in the system's temporary folder.
    `max_unfinished_upload_bytes`, `max_tenant_unfinished_upload_bytes`: of uploads in progress, of all tenants and of
    one; 0 allows none.
    `max_upload_bytes`: maximum size of one adapter. The other `max_*` are the quota of tenants that have no quota set.
    `keep_*`: how long rows are kept (services/admission/cleanup/retention.py); 0 keeps them for ever.
    `max_crashes`: a task fails when this many of its executors died in a row before it completed a step, and it ran
    alone on the last one.
    """

    database_url: str
    artifact_url: str
    alignment_address: str
    internal_listen: str = "127.0.0.1:0"
    max_connection_calls: int = 1024  # more than a tenant may have; few, as they wait for each other
    public_certs: Path | None = None
    oidc_issuer: str = ""
    oidc_audience: str = ""
    oidc_keys: str = ""
    oidc_algorithms: str = "RS256,ES256"
    oidc_tenant_claim: str = "tenant"
    requests_per_second: float = 500.0
    watch_events_per_second: float = 500.0
    refusals_per_second: float = 20.0
    scratch: Path | None = None
    max_unfinished_upload_bytes: int = 8 << 30
    max_tenant_unfinished_upload_bytes: int = 2 << 30
    max_upload_bytes: int = 512 << 20
    max_unfinished_tasks: int = 1000
    max_crashes: int = 3
    max_dataset_bytes: int = 0
    max_adapter_bytes: int = 0
    max_unfinished_spec_bytes: int = 4 << 20  # 1,000 tasks of 4 kB, or 256 of the largest size
    max_tokens_per_day: int = 0
    max_device_seconds_per_day: float = 0.0
    keep_events_days: float = RetentionPolicy.events_days
    keep_tasks_days: float = RetentionPolicy.tasks_days
    keep_num_tasks: int = RetentionPolicy.num_tasks
    keep_requests_days: float = RetentionPolicy.requests_days
    keep_num_requests: int = RetentionPolicy.num_requests
    keep_audit_days: float = RetentionPolicy.audit_days
    token_budget: int = PlannerConfig.token_budget
    chunk_tokens: int = PlannerConfig.chunk_tokens

    def secure_ports(self, certificates: Certificates) -> list[tuple[str, grpc.ServerCredentials | None]]:
        public = self._certificates(self.public_certs) if self.public_certs else certificates
        return [
            (self.listen, public.for_server(is_mutual=False)),
            (self.internal_listen, certificates.for_server(is_mutual=True)),
        ]

    def quota(self) -> DefaultQuota:
        return DefaultQuota(
            self.max_unfinished_tasks,
            PlannerConfig(self.token_budget, self.chunk_tokens),
            self.max_dataset_bytes,
            self.max_tokens_per_day,
            self.max_device_seconds_per_day,
            self.max_adapter_bytes,
            self.max_unfinished_spec_bytes,
        )

    def retention(self) -> RetentionPolicy:
        return RetentionPolicy(
            self.keep_events_days,
            self.keep_tasks_days,
            self.keep_num_tasks,
            self.keep_requests_days,
            self.keep_num_requests,
            self.keep_audit_days,
        )

    def upload_budget(self) -> ByteBudget:
        return ByteBudget(
            "unfinished uploads", self.max_unfinished_upload_bytes, self.max_tenant_unfinished_upload_bytes
        )

    def authenticate(self, keys: KeyStore) -> Authenticate:
        """Return the function that authenticates API keys, and the issuer's tokens if an issuer is set."""
        verifier = None
        if self.oidc_issuer:
            algorithms = tuple(filter(None, map(str.strip, self.oidc_algorithms.split(","))))
            provider = OidcProvider(
                self.oidc_issuer, self.oidc_audience, self.oidc_keys, algorithms, self.oidc_tenant_claim
            )
            verifier = TokenVerifier(provider)
        return create_authenticator(keys, self.mesh_secret, verifier, RateLimit(self.requests_per_second))


async def main() -> None:
    settings = from_environment(AdmissionSettings, os.environ)
    database = _open_database(settings.database_url)
    artifacts = ArtifactStore.open(settings.artifact_url)
    alignment_channel = open_channel(settings.alignment_address, settings.mesh_secret, settings.client_tls("alignment"))
    alignment = alignment_pb2_grpc.AlignmentServiceStub(alignment_channel)
    quota, notifier, keys, threads = settings.quota(), ChangeNotifier(), KeyStore(database), AdmissionThreads()
    default = quota.to_proto()
    controller = AdmissionController(database, artifacts, alignment, quota, threads)
    watch_rate = RateLimit(settings.watch_events_per_second)
    servicer = AdmissionServicer(
        database, artifacts, alignment, controller, notifier, settings.max_upload_bytes, threads, watch_rate,
        ScratchFolder.open(settings.scratch, "admission"), settings.upload_budget(),
    )  # fmt: skip
    collector, remove_datasets = GarbageCollector(database, artifacts), servicer.dataset_objects.remove_all_unreferenced
    delete_rows = OldRows(database, collector, settings.retention()).delete
    collection = GarbageCollectionLoop(collector, remove_datasets, threads.cleanup, delete_rows)
    ledger = LedgerServicer(notifier, collection.add, threads.ledger)
    limits = LimitsWatcher(database, default, notifier, threads.ledger)
    acquire = partial(Ledger, database, quota=default, max_crashes=settings.max_crashes)
    health = health_aio.HealthServicer()
    jobs = (ledger.watch_lease_deadlines, collection.run, limits.run)
    alone = not database.is_shared
    replicas = SingleReplica(database, threads.ledger) if alone else Replicas(database, notifier, threads.ledger)
    leader = LedgerLeader(acquire, ledger, jobs, health, threads.ledger, replicas)
    running: list[asyncio.Task[None]] = []

    audit = create_audit_writer(database)
    unauthenticated_limiter = UnauthenticatedCallLimiter(RateLimit(settings.refusals_per_second), audit)

    operators = OperatorServicer(database, default, notifier, threads.operators)
    register = partial(_register, servicer, KeyServicer(keys, threads.operators), operators, ledger)

    async def start(address: str) -> None:
        running.append(start_critical_task(replicas.run(leader.lead), "replicas"))
        running.append(start_critical_task(leader.watch_health(), "health"))
        running.append(start_critical_task(replicas.publish_changes(), "notices to other replicas"))
        running.append(start_critical_task(unauthenticated_limiter.run(), "unauthenticated calls"))

    async def stop() -> None:
        notifier.close()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    await serve(
        "admission",
        settings,
        register,
        authenticate=settings.authenticate(keys),
        audit=audit,
        unauthenticated_limiter=unauthenticated_limiter,
        on_ready=start,
        on_stop=stop,
        health=health,
        services_with_own_health=["", LEDGER_SERVICE],
    )
    await replicas.publish_pending()
    await database.finish()
    database.close()


def _open_database(url: str) -> Database:
    """Return the database, claimed before its schema is migrated. Raises SettingsError if it cannot be used."""
    database = Database(url)
    try:
        database.claim()
    except UnavailableError as error:
        raise SettingsError(f"MUXTUNE_DATABASE_URL: {error}.") from error
    database.migrate()
    return database


def _register(
    clients: AdmissionServicer,
    keys: KeyServicer,
    operators: OperatorServicer,
    ledger: LedgerServicer,
    server: grpc.aio.Server,
) -> list[str]:
    """Add the servicers to the server; return the full names of their services."""
    admission_pb2_grpc.add_AdmissionServiceServicer_to_server(clients, server)
    key_pb2_grpc.add_KeyServiceServicer_to_server(keys, server)
    operator_pb2_grpc.add_OperatorServiceServicer_to_server(operators, server)
    ledger_pb2_grpc.add_LedgerServiceServicer_to_server(ledger, server)
    modules = (admission_pb2, key_pb2, operator_pb2, ledger_pb2)
    return [service.full_name for m in modules for service in m.DESCRIPTOR.services_by_name.values()]


if __name__ == "__main__":
    asyncio.run(main())
