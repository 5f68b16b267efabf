"""Decides whether a task is admitted: validation, inspection of the data, the memory model, the tenant's quota.

Stores nothing. The order is authorization, then idempotency, then validation (AIP-211, AIP-155).
"""

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
from services.admission.policy.task_estimator import ExecutorParser, TaskEstimator
from services.admission.store import datasets_and_adapters, tables
from services.admission.store.database import Database
from services.admission.store.prepared_statements import PreparedStatement
from services.admission.store.tables import datasets, executors
from services.admission.threads import AdmissionThreads
from services.conversion.spec_limits import check_spec_limits, normalize_spec
from services.rpc.authorization import Principal, authorize, denied
from services.storage.artifact_store import ArtifactStore

# One statement for both: its time is the time of one.
_QUOTA_AND_VERSION = PreparedStatement(
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
# All executors that ever registered: also one without a lease has the limits of its backbone.
_EXECUTORS = PreparedStatement(sa.select(executors.c.executor))
# LoRA has four at an operator (A, B, DoRA's magnitude, a bias), as has a bottleneck adapter. 4,096 tensors are checked
# in milliseconds; so many are allowed even if the backbone that has them is not served yet.
_TENSORS_PER_SITE, _MIN_ADAPTER_TENSORS = 4, 4096


@dataclass(frozen=True)
class DefaultQuota:
    """Limits of tenants without limits of their own (0: no limit), and the planner's settings for its models."""

    max_unfinished_tasks: int
    planner: PlannerConfig
    max_dataset_bytes: int = 0
    max_tokens_per_day: int = 0
    max_device_seconds_per_day: float = 0.0
    max_adapter_bytes: int = 0
    max_unfinished_spec_bytes: int = 0

    def to_proto(self) -> operator_pb2.Quota:
        return operator_pb2.Quota(
            max_dataset_bytes=self.max_dataset_bytes,
            max_unfinished_tasks=self.max_unfinished_tasks,
            max_tokens_per_day=self.max_tokens_per_day,
            max_device_seconds_per_day=self.max_device_seconds_per_day,
            max_adapter_bytes=self.max_adapter_bytes,
            max_unfinished_spec_bytes=self.max_unfinished_spec_bytes,
        )


@dataclass(frozen=True)
class ResolvedTask:
    """A requested task with the rows that it refers to: the spec with the dataset's version, the key of the initial
    adapter's manifest, and all executors (serialized plan.Executor)."""

    spec: task_pb2.TaskSpec
    initial_adapter_key: str
    executors: Sequence[bytes] = field(compare=False)  # they change faster than a task is evaluated


@dataclass(frozen=True)
class AdmittedTask:
    """A task and its estimate. It may be stored while `resolve` still returns an equal ResolvedTask."""

    resolved: ResolvedTask
    estimate: task_pb2.TaskEstimate


class AdmissionController:
    """Admits or refuses tasks, datasets and adapters: reads the database and asks alignment."""

    def __init__(
        self,
        database: Database,
        artifacts: ArtifactStore,
        alignment: "alignment_pb2_grpc.AlignmentServiceAsyncStub",
        quota: DefaultQuota,
        threads: AdmissionThreads,
    ) -> None:
        self._database, self._artifacts, self._threads = database, artifacts, threads
        self._quota_proto, self._executor_parser = quota.to_proto(), ExecutorParser()
        self._estimator = TaskEstimator(alignment, quota.planner, threads, self._executor_parser)

    async def evaluate(self, principal: Principal, task: ResolvedTask) -> AdmittedTask:
        """Estimate the task and admit it. Raises PermissionDeniedError, InvalidInputError or WillNeverFitError."""
        domain, estimate = await self._estimator.estimate(str(principal.tenant), task.spec, task.executors)
        if key := task.initial_adapter_key:
            try:
                await self._threads.transfers.run(str(principal.tenant), self._check_initial_adapter, domain, key)
            except NotFoundError as error:  # the adapter was deleted meanwhile
                raise denied(domain.initial_adapter) from error
        return _admit(task, domain, estimate)

    def evaluate_from_cache(self, principal: Principal, task: ResolvedTask) -> AdmittedTask | None:
        """Return the result of `evaluate`, or None if that would call alignment or the artifact store."""
        if task.initial_adapter_key:
            return None
        cached = self._estimator.estimate_from_cache(str(principal.tenant), task.spec, task.executors)
        return None if cached is None else _admit(task, *cached)

    def resolve(self, connection: sa.Connection, principal: Principal, spec: task_pb2.TaskSpec) -> ResolvedTask:
        """Read what `evaluate` needs, and check that the quota allows another task. Raises PermissionDeniedError,
        InvalidInputError or QuotaExceededError."""
        check_spec_limits(spec)
        quotas.check_budget(spec.budget)
        resolved = normalize_spec(spec)
        key, tenant = "", str(principal.tenant)
        dataset = authorize(principal, spec.dataset, "datasets") if spec.dataset else ""
        version, quota = self._read_version_and_quota(connection, tenant, dataset)
        if dataset:
            if not version:
                raise denied(dataset)
            if spec.dataset_version not in ("", version):
                raise InvalidInputError.of_field(
                    "spec.dataset_version",
                    f'"{spec.dataset_version}" must be {version}, the version of {spec.dataset}, or empty',
                )
            resolved.dataset_version = version
        if spec.initial_adapter:
            name = authorize(principal, spec.initial_adapter, "adapters")
            key = datasets_and_adapters.get_adapter_row(connection, name).manifest_key
        quotas.check_new_task(connection, tenant, quota, resolved.ByteSize())
        return ResolvedTask(resolved, key, [row.executor for row in _EXECUTORS.fetch_all(connection)])

    def _read_version_and_quota(
        self, connection: sa.Connection, tenant: str, dataset: str
    ) -> tuple[str, operator_pb2.Quota]:
        """Return the dataset's version, empty if the dataset does not exist, and the tenant's quota."""
        row = _QUOTA_AND_VERSION.fetch_all(connection, tenant=tenant, dataset=dataset)[0]
        return row.version or "", quotas.merge_quota(self._quota_proto, row.quota)

    def check_unfinished(self, table: sa.Table, tenant: str, num_bytes: int, may_exist: bool) -> None:
        """Check the quota before a dataset or an adapter is received. Raises QuotaExceededError.

        `num_bytes`: of all that the tenant is sending. What it has stored is added, but for an upload that may repeat
        an earlier one, which is checked again when its bytes are known.
        """
        with self._database.read() as connection:
            quotas.check_bytes(connection, table, tenant, num_bytes, self._quota_proto, count_stored=not may_exist)

    def max_adapter_tensors(self, connection: sa.Connection) -> int:
        """Return how many tensors an adapter may have: as the largest known backbone can have."""
        executors = self._executor_parser.parse([row.executor for row in _EXECUTORS.fetch_all(connection)])
        num_sites = max((len(executor.backbone.sites) for executor in executors), default=0)
        return max(_MIN_ADAPTER_TENSORS, _TENSORS_PER_SITE * num_sites)

    def check_dataset_bytes(self, connection: sa.Connection, tenant: str, added_bytes: int) -> None:
        """Check the quota in the transaction that stores the dataset. Raises QuotaExceededError."""
        quotas.check_bytes(connection, datasets, tenant, added_bytes, self._quota_proto)

    def check_adapter_bytes(self, connection: sa.Connection, tenant: str, added_bytes: int) -> None:
        """Check whether an adapter may be stored. Raises QuotaExceededError."""
        quotas.check_bytes(connection, tables.adapters, tenant, added_bytes, self._quota_proto)

    def _check_initial_adapter(self, spec: TaskSpec, key: str) -> None:
        manifest = self._artifacts.read_manifest(key)
        config = parse_strict_json(self._artifacts.read_file(manifest, CONFIG_FILE))
        try:
            reason = spec.method.incompatibility(config)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            reason = f"{CONFIG_FILE} has a field of another type than PEFT writes ({type(error).__name__})"
        if reason:
            raise InvalidInputError.of_field("spec.initial_adapter", reason)


def _admit(task: ResolvedTask, domain: TaskSpec, estimate: task_pb2.TaskEstimate) -> AdmittedTask:
    """Check the warm-up against the estimated number of steps. Raises InvalidInputError."""
    if domain.training.warmup_steps > estimate.num_steps:
        raise InvalidInputError.of_field(
            "spec.training.warmup_steps",
            f"{domain.training.warmup_steps} must be at most the task's {estimate.num_steps} steps",
        )
    return AdmittedTask(task, estimate)
