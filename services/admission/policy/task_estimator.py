"""What a task would be: its data as alignment reads it, its bytes and seconds as the planner's models foretell them.

All of it is a function of the dataset's version, of what the task trains and how, and of its executors, so it is
remembered: of a sweep over learning rates only the first task is looked at whole.
"""

import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Generic, TypeVar

from engine.methods.base import Method
from engine.planning.cost.memory_model import adapter_bytes, separate_instance_bytes
from engine.planning.placement.eta import seconds_alone
from engine.planning.placement.feasibility import refuse_if_never_fits
from engine.planning.types import BackboneView, ExecutorView, PlannerConfig, TaskView
from engine.task import Affects, TaskSpec, Training, fields_affecting
from muxtune.v1 import alignment_pb2, alignment_pb2_grpc, dataset_pb2, plan_pb2, task_pb2
from services.admission.policy.validation import validate
from services.admission.store.idempotency import body_hash
from services.conversion.plan import executor_to_view
from services.conversion.task import spec_to_domain

INSPECT_SECONDS = 120.0
_REMEMBERED_SECONDS, _MOST_REMEMBERED = 60.0, 1024  # an alignment of another version may read otherwise
_MOST_BYTES = 4096  # of a task whose method is remembered
# What steers the optimizer changes neither data nor time nor bytes; nor does what is the tenant's own affair.
_OWN = ("labels", "priority", "deadline", "budget", "initial_adapter", "dataset")
_STEERING = tuple(
    field.name for field in fields(Training) if field.name not in fields_affecting(~Affects.OPTIMIZER)
)  # fields that affect the optimizer alone
_UNUSED = ("samples", "length_histogram", "refused_rows")  # of a report
T = TypeVar("T")


@dataclass(frozen=True)
class _Known:
    """What is the same for all tasks that differ in what steers them. `method`: None where it is large."""

    method: Method | None
    estimate: task_pb2.TaskEstimate


class TaskEstimator:
    """`limits` are the planner's, for its models."""

    def __init__(self, alignment: "alignment_pb2_grpc.AlignmentServiceAsyncStub", limits: PlannerConfig) -> None:
        self._alignment, self._limits = alignment, limits
        self._reports = _Remembered[dataset_pb2.PreflightReport]()
        self._known = _Remembered[_Known]()

    def recall(
        self, tenant: str, spec: task_pb2.TaskSpec, executors: Sequence[bytes]
    ) -> tuple[TaskSpec, task_pb2.TaskEstimate] | None:
        """What `of` would tell, where a task that differs only in what steers it was looked at before."""
        known = self._known.get(_key(tenant, _core(spec), executors))
        if known is None:
            return None
        domain = spec_to_domain(spec, method=known.method)
        validate(domain, [executor_view(executor).backbone for executor in executors], is_known=True)
        estimate = task_pb2.TaskEstimate()
        estimate.CopyFrom(known.estimate)
        return domain, estimate

    async def of(
        self, tenant: str, spec: task_pb2.TaskSpec, executors: Sequence[bytes]
    ) -> tuple[TaskSpec, task_pb2.TaskEstimate]:
        """The task as the engine reads it, and what it would be. `spec` names its dataset's version; `executors`: each
        a plan.Executor.

        Raises InvalidInputError, WillNeverFitError and what alignment refuses it with.
        """
        if (known := self.recall(tenant, spec, executors)) is not None:
            return known
        domain, core = spec_to_domain(spec), _core(spec)
        views = [executor_view(executor) for executor in executors]
        backbone = validate(domain, [view.backbone for view in views])
        hosts = [view for view in views if view.backbone.name == backbone.name]
        refuse_if_never_fits(domain, hosts, self._limits)
        estimate = self._estimate(await self._inspect(tenant, core), domain, backbone, hosts)
        kept = task_pb2.TaskEstimate()
        kept.CopyFrom(estimate)
        method = domain.method if core.ByteSize() <= _MOST_BYTES else None
        self._known.put(_key(tenant, core, executors), _Known(method, kept))
        return domain, estimate

    async def _inspect(self, tenant: str, core: task_pb2.TaskSpec) -> dataset_pb2.PreflightReport:
        training = core.training.SerializeToString(deterministic=True)
        key = (tenant, core.dataset_version, core.backbone, training)
        if (found := self._reports.get(key)) is not None:
            return found
        options = dataset_pb2.PreflightOptions(backbone=core.backbone, training=core.training, num_samples=1)
        request = alignment_pb2.InspectDatasetRequest(tenant=tenant, sha256=core.dataset_version, options=options)
        report = (await self._alignment.InspectDataset(request, timeout=INSPECT_SECONDS)).report
        for field in _UNUSED:
            report.ClearField(field)  # type: ignore[arg-type]
        return self._reports.put(key, report)

    def _estimate(
        self,
        report: dataset_pb2.PreflightReport,
        spec: TaskSpec,
        backbone: BackboneView,
        hosts: Sequence[ExecutorView],
    ) -> task_pb2.TaskEstimate:
        task = TaskView("", "", spec, 0, report.num_steps, num_train_tokens=report.num_train_tokens,
                        length_quantiles=tuple(report.length_quantiles))  # fmt: skip
        seconds = [seconds_alone(task, executor, self._limits) for executor in hosts if executor.can_predict]
        return task_pb2.TaskEstimate(
            num_train_rows=report.num_train_rows,
            num_heldout_rows=report.num_heldout_rows,
            num_refused_rows=report.num_refused_rows,
            num_steps=report.num_steps,
            num_train_tokens=report.num_train_tokens,
            added_bytes=adapter_bytes(spec, backbone),
            separate_instance_bytes=separate_instance_bytes(spec, backbone),
            length_quantiles=report.length_quantiles,
            num_special_text_rows=report.num_special_text_rows,
            seconds=min(seconds) if seconds else None,
        )


@lru_cache(256)
def executor_view(executor: bytes) -> ExecutorView:
    """Of a plan.Executor as the store keeps it, read once for each change."""
    return executor_to_view(plan_pb2.Executor.FromString(executor))


def _core(spec: task_pb2.TaskSpec) -> task_pb2.TaskSpec:
    """The part of a task that its data, time and bytes depend on."""
    core = task_pb2.TaskSpec()
    core.CopyFrom(spec)
    for field in _OWN:
        core.ClearField(field)  # type: ignore[arg-type]
    for field in _STEERING:
        core.training.ClearField(field)  # type: ignore[arg-type]
    return core


def _key(tenant: str, core: task_pb2.TaskSpec, executors: Sequence[bytes]) -> str:
    return body_hash(tenant.encode(), core.SerializeToString(deterministic=True), *executors)


class _Remembered(Generic[T]):
    """Values by key for a while; of too many the least recently used go."""

    def __init__(self) -> None:
        self._values: OrderedDict[Hashable, tuple[T, float]] = OrderedDict()

    def get(self, key: Hashable) -> T | None:
        value, until = self._values.get(key, (None, 0.0))
        if value is None or until <= time.monotonic():
            return None
        self._values.move_to_end(key)
        return value

    def put(self, key: Hashable, value: T) -> T:
        self._values[key] = (value, time.monotonic() + _REMEMBERED_SECONDS)
        while len(self._values) > _MOST_REMEMBERED:
            self._values.popitem(last=False)
        return value
