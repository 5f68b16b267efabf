"""The decision to take a task: validate, look at the data, ask the memory model, count against the quota.

Nothing is stored here. Source of the order: authorize, then idempotency, then validation (AIP-211, AIP-155).
"""

import asyncio
from dataclasses import dataclass

import sqlalchemy as sa

from engine.errors import InvalidInputError
from engine.plain_json import plain_json
from engine.planning.eta import seconds_alone
from engine.planning.memory import adapter_bytes, separate_instance_bytes
from engine.planning.plan import BackboneView, ExecutorView, Limits, TaskView
from engine.planning.remedy import refuse_if_never_fits
from engine.task import TaskSpec
from muxtune.v1 import alignment_pb2, alignment_pb2_grpc, dataset_pb2, operator_pb2, task_pb2
from services.admission import accounts, catalog
from services.admission.database import Database
from services.admission.ledger import known_executors
from services.admission.names import authorize, denied
from services.admission.receipt import CONFIG_FILE
from services.admission.validation import validate
from services.artifacts import ArtifactStore
from services.auth import Principal
from services.convert import spec_to_domain
from services.plan_convert import executor_to_view

INSPECT_SECONDS = 120.0
_MAX_SPEC_BYTES = 256 << 10  # it is read again at every scheduling cycle


@dataclass(frozen=True)
class Admissible:
    """A task that may be stored: its spec with what was resolved, and what is expected of it."""

    spec: task_pb2.TaskSpec
    estimate: task_pb2.TaskEstimate
    initial_adapter_key: str


@dataclass(frozen=True)
class Quota:
    """What holds for tenants without limits of their own (0: none). `limits` are the planner's, for its models."""

    max_unfinished_tasks: int
    limits: Limits
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


class Admitter:
    """Reads the store, asks alignment; decides."""

    def __init__(
        self,
        database: Database,
        artifacts: ArtifactStore,
        alignment: "alignment_pb2_grpc.AlignmentServiceAsyncStub",
        quota: Quota,
    ) -> None:
        self._database, self._artifacts, self._alignment, self._quota = database, artifacts, alignment, quota

    async def examine(self, principal: Principal, spec: task_pb2.TaskSpec) -> Admissible:
        """Raises PermissionDeniedError, InvalidInputError, WillNeverFitError or QuotaExceededError."""
        if (size := spec.ByteSize()) > _MAX_SPEC_BYTES:
            raise InvalidInputError.of_field("spec", f"has {size} bytes; at most {_MAX_SPEC_BYTES}")
        accounts.check_budget(spec.budget)
        resolved, key, executors = await asyncio.to_thread(self._resolve, principal, spec)
        domain = spec_to_domain(resolved)
        backbone = validate(domain, [executor.backbone for executor in executors])
        if key:
            await asyncio.to_thread(self._check_initial_adapter, domain, key)
        refuse_if_never_fits(domain, executors, self._quota.limits)
        report = await self._inspect(str(principal.tenant), resolved)
        if domain.training.warmup_steps > report.num_steps:
            raise InvalidInputError.of_field(
                "spec.training.warmup_steps", f"{domain.training.warmup_steps} of {report.num_steps} steps in all"
            )
        estimate = _estimate(report, domain, backbone)
        task = TaskView("", "", domain, 0, report.num_steps, num_train_tokens=report.num_train_tokens,
                        length_quantiles=tuple(report.length_quantiles))  # fmt: skip
        hosts = [executor for executor in executors if executor.backbone.name == backbone.name]
        seconds = [seconds_alone(task, executor, self._quota.limits) for executor in hosts if executor.can_predict]
        if seconds:
            estimate.seconds = min(seconds)
        return Admissible(resolved, estimate, key)

    def _resolve(
        self, principal: Principal, spec: task_pb2.TaskSpec
    ) -> tuple[task_pb2.TaskSpec, str, list[ExecutorView]]:
        """The dataset's version, the initial adapter's manifest, the executors there are."""
        resolved = task_pb2.TaskSpec()
        resolved.CopyFrom(spec)
        key = ""
        with self._database.read() as connection:
            if spec.dataset:
                row = catalog.dataset_row(connection, authorize(principal, spec.dataset, "datasets"))
                if spec.dataset_version not in ("", row.sha256):
                    raise InvalidInputError.of_field(
                        "spec.dataset_version", f'"{spec.dataset_version}" is not {row.sha256}, what {row.name} holds'
                    )
                resolved.dataset_version = row.sha256
            if spec.initial_adapter:
                name = authorize(principal, spec.initial_adapter, "adapters")
                key = catalog.adapter_row(connection, name).manifest_key
            accounts.check_task(connection, str(principal.tenant), self._quota.to_proto())
            executors = [executor_to_view(executor) for executor in known_executors(connection)]
        return resolved, key, executors

    def check_again(self, connection: sa.Connection, tenant: str, admissible: Admissible) -> None:
        """In the transaction that stores the task: the quota, and that what it starts from is what was examined."""
        accounts.check_task(connection, tenant, self._quota.to_proto())
        if catalog.dataset_row(connection, admissible.spec.dataset).sha256 != admissible.spec.dataset_version:
            raise denied(admissible.spec.dataset)
        adapter = admissible.spec.initial_adapter
        if adapter and catalog.adapter_row(connection, adapter).manifest_key != admissible.initial_adapter_key:
            raise denied(adapter)

    def check_bytes(self, tenant: str, added_bytes: int) -> None:
        """Before a dataset is taken in. Raises QuotaExceededError."""
        with self._database.read() as connection:
            accounts.check_datasets(connection, tenant, added_bytes, self._quota.to_proto())

    def check_bytes_again(self, connection: sa.Connection, tenant: str, added_bytes: int) -> None:
        """In the transaction that stores the dataset."""
        accounts.check_datasets(connection, tenant, added_bytes, self._quota.to_proto())

    def check_adapters(self, connection: sa.Connection, tenant: str, added_bytes: int) -> None:
        """Whether an adapter may be stored. Raises QuotaExceededError."""
        accounts.check_adapters(connection, tenant, added_bytes, self._quota.to_proto())

    def _check_initial_adapter(self, spec: TaskSpec, key: str) -> None:
        manifest = self._artifacts.read_manifest(key)
        config = plain_json(self._artifacts.read_file(manifest, CONFIG_FILE))
        try:
            why = spec.method.misfit(config)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            why = f"{CONFIG_FILE} has a field of another type than PEFT writes ({type(error).__name__})"
        if why:
            raise InvalidInputError.of_field("spec.initial_adapter", why)

    async def _inspect(self, tenant: str, spec: task_pb2.TaskSpec) -> dataset_pb2.PreflightReport:
        options = dataset_pb2.PreflightOptions(backbone=spec.backbone, training=spec.training, num_samples=1)
        answer = await self._alignment.InspectDataset(
            alignment_pb2.InspectDatasetRequest(tenant=tenant, sha256=spec.dataset_version, options=options),
            timeout=INSPECT_SECONDS,
        )
        return answer.report


def _estimate(report: dataset_pb2.PreflightReport, spec: TaskSpec, backbone: BackboneView) -> task_pb2.TaskEstimate:
    return task_pb2.TaskEstimate(
        num_train_rows=report.num_train_rows,
        num_heldout_rows=report.num_heldout_rows,
        num_refused_rows=report.num_refused_rows,
        num_steps=report.num_steps,
        num_train_tokens=report.num_train_tokens,
        added_bytes=adapter_bytes(spec, backbone),
        separate_instance_bytes=separate_instance_bytes(spec, backbone),
        length_quantiles=report.length_quantiles,
    )
