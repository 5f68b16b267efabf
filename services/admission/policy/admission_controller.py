"""The decision to take a task: validate, look at the data, ask the memory model, count against the quota.

Nothing is stored here. Source of the order: authorize, then idempotency, then validation (AIP-211, AIP-155).
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from engine.errors import InvalidInputError, NotFoundError
from engine.planning.types import PlannerConfig
from engine.strict_json import parse_strict_json
from engine.task import TaskSpec
from muxtune.v1 import alignment_pb2_grpc, operator_pb2, task_pb2
from services.admission.policy import quotas
from services.admission.policy.adapter_upload import CONFIG_FILE
from services.admission.policy.task_estimator import TaskEstimator
from services.admission.store import datasets_and_adapters, tables
from services.admission.store.database import Database
from services.admission.store.prepared_statements import PreparedStatement
from services.admission.store.tables import datasets, executors
from services.rpc.authorization import Principal, authorize, denied
from services.storage.artifact_store import ArtifactStore

# One statement: by itself each of the two takes as long.
_STANDING = PreparedStatement(
    sa.select(
        sa.select(tables.quotas.c.quota)
        .where(tables.quotas.c.tenant == sa.bindparam("tenant"))
        .scalar_subquery()
        .label("quota"),
        sa.select(datasets.c.sha256)
        .where(datasets.c.name == sa.bindparam("dataset"))
        .scalar_subquery()
        .label("version"),
    )
)
_EXECUTORS = PreparedStatement(
    sa.select(executors.c.executor)
)  # one that is away for now still says what its backbone takes
_MAX_SPEC_BYTES = 256 << 10  # it is read again at every scheduling cycle


@dataclass(frozen=True)
class Quota:
    """What holds for tenants without limits of their own (0: none). `limits` are the planner's, for its models."""

    max_unfinished_tasks: int
    limits: PlannerConfig
    max_dataset_bytes: int = 0
    max_tokens_per_day: int = 0
    max_device_seconds_per_day: float = 0.0
    max_adapter_bytes: int = 0

    def to_proto(self) -> operator_pb2.Quota:
        return operator_pb2.Quota(
            max_dataset_bytes=self.max_dataset_bytes,
            max_unfinished_tasks=self.max_unfinished_tasks,
            max_tokens_per_day=self.max_tokens_per_day,
            max_device_seconds_per_day=self.max_device_seconds_per_day,
            max_adapter_bytes=self.max_adapter_bytes,
        )


@dataclass(frozen=True)
class Found:
    """What the store has of a task that is asked for: its spec with the dataset's version, the key of its initial
    adapter's manifest, the executors there are (plan.Executor)."""

    spec: task_pb2.TaskSpec
    initial_adapter_key: str
    executors: Sequence[bytes] = field(compare=False)  # which tell of themselves faster than a task may be examined


@dataclass(frozen=True)
class Admissible:
    """A task that may be stored while the store has what was found, and what is expected of it."""

    found: Found
    estimate: task_pb2.TaskEstimate


class AdmissionController:
    """Reads the store, asks alignment; decides."""

    def __init__(
        self,
        database: Database,
        artifacts: ArtifactStore,
        alignment: "alignment_pb2_grpc.AlignmentServiceAsyncStub",
        quota: Quota,
    ) -> None:
        self._database, self._artifacts, self._quota = database, artifacts, quota
        self._quota_proto, self._appraisals = quota.to_proto(), TaskEstimator(alignment, quota.limits)

    async def examine(self, principal: Principal, found: Found) -> Admissible:
        """Raises PermissionDeniedError, InvalidInputError or WillNeverFitError."""
        domain, estimate = await self._appraisals.of(str(principal.tenant), found.spec, found.executors)
        if key := found.initial_adapter_key:
            try:
                await asyncio.to_thread(self._check_initial_adapter, domain, key)
            except NotFoundError as error:  # deleted meanwhile
                raise denied(domain.initial_adapter) from error
        return _admissible(found, domain, estimate)

    def recall(self, principal: Principal, found: Found) -> Admissible | None:
        """What `examine` would tell; None where it has to be asked."""
        if found.initial_adapter_key:
            return None
        known = self._appraisals.recall(str(principal.tenant), found.spec, found.executors)
        return None if known is None else _admissible(found, *known)

    def look(self, connection: sa.Connection, principal: Principal, spec: task_pb2.TaskSpec) -> Found:
        """What `examine` needs, and whether the quota has a place for the task. Raises PermissionDeniedError,
        InvalidInputError or QuotaExceededError."""
        if (size := spec.ByteSize()) > _MAX_SPEC_BYTES:
            raise InvalidInputError.of_field("spec", f"has {size} bytes; at most {_MAX_SPEC_BYTES}")
        quotas.check_budget(spec.budget)
        resolved = task_pb2.TaskSpec()
        resolved.CopyFrom(spec)
        key, tenant = "", str(principal.tenant)
        dataset = authorize(principal, spec.dataset, "datasets") if spec.dataset else ""
        version, quota = self._standing(connection, tenant, dataset)
        if dataset:
            if not version:
                raise denied(dataset)
            if spec.dataset_version not in ("", version):
                raise InvalidInputError.of_field(
                    "spec.dataset_version", f'"{spec.dataset_version}" is not {version}, what {spec.dataset} holds'
                )
            resolved.dataset_version = version
        if spec.initial_adapter:
            name = authorize(principal, spec.initial_adapter, "adapters")
            key = datasets_and_adapters.adapter_row(connection, name).manifest_key
        quotas.check_task(connection, tenant, quota)
        return Found(resolved, key, [row.executor for row in _EXECUTORS.fetch_all(connection)])

    def _standing(self, connection: sa.Connection, tenant: str, dataset: str) -> tuple[str, operator_pb2.Quota]:
        """The dataset's version, empty where there is none, and the tenant's quota."""
        row = _STANDING.fetch_all(connection, tenant=tenant, dataset=dataset)[0]
        return row.version or "", quotas.over(self._quota_proto, row.quota)

    def check_bytes(self, tenant: str, added_bytes: int) -> None:
        """Before a dataset is taken in. Raises QuotaExceededError."""
        with self._database.read() as connection:
            quotas.check_datasets(connection, tenant, added_bytes, self._quota_proto)

    def check_bytes_again(self, connection: sa.Connection, tenant: str, added_bytes: int) -> None:
        """In the transaction that stores the dataset."""
        quotas.check_datasets(connection, tenant, added_bytes, self._quota_proto)

    def check_adapters(self, connection: sa.Connection, tenant: str, added_bytes: int) -> None:
        """Whether an adapter may be stored. Raises QuotaExceededError."""
        quotas.check_adapters(connection, tenant, added_bytes, self._quota_proto)

    def _check_initial_adapter(self, spec: TaskSpec, key: str) -> None:
        manifest = self._artifacts.read_manifest(key)
        config = parse_strict_json(self._artifacts.read_file(manifest, CONFIG_FILE))
        try:
            why = spec.method.incompatibility(config)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            why = f"{CONFIG_FILE} has a field of another type than PEFT writes ({type(error).__name__})"
        if why:
            raise InvalidInputError.of_field("spec.initial_adapter", why)


def _admissible(found: Found, domain: TaskSpec, estimate: task_pb2.TaskEstimate) -> Admissible:
    if domain.training.warmup_steps > estimate.num_steps:
        raise InvalidInputError.of_field(
            "spec.training.warmup_steps", f"{domain.training.warmup_steps} of {estimate.num_steps} steps in all"
        )
    return Admissible(found, estimate)
