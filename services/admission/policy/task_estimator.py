"""Estimates a task: alignment inspects its data, the planner's models predict its bytes and seconds.

The estimate is a function of the dataset's version, the spec and the executors, and it is cached: of a sweep over
learning rates only the first task is inspected.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Generic, TypeVar

from engine.methods.base import Method
from engine.planning.cost.memory_model import adapter_bytes, separate_instance_bytes
from engine.planning.placement.eta import seconds_alone
from engine.planning.placement.feasibility import refuse_if_never_fits
from engine.planning.types import BackboneView, ExecutorView, PlannerConfig, TaskView
from engine.task import Affects, TaskSpec, Training, fields_affecting
from muxtune.v1 import alignment_pb2, alignment_pb2_grpc, dataset_pb2, plan_pb2, task_pb2
from services.admission.policy.validation import validate
from services.admission.store.idempotency import hash_parts
from services.admission.threads import AdmissionThreads
from services.conversion.plan import executor_to_view
from services.conversion.task import spec_to_domain

INSPECT_SECONDS = 3600.0  # alignment's own limit; the caller's deadline is usually sooner, and stops alignment, too
_CACHE_SECONDS, _MAX_CACHED = 60.0, 1024  # after an upgrade alignment may read the data differently
_MAX_CACHED_METHOD_BYTES = 4096  # the size of a task's spec up to which its method is cached
# Fields that affect neither data nor time nor bytes.
_IRRELEVANT_FIELDS = ("labels", "priority", "deadline", "budget", "initial_adapter", "dataset")
_OPTIMIZER_FIELDS = tuple(
    field.name for field in fields(Training) if field.name not in fields_affecting(~Affects.OPTIMIZER)
)  # fields that affect the optimizer alone
_UNUSED_REPORT_FIELDS = ("samples", "length_histogram", "refused_rows")
T = TypeVar("T")


@dataclass(frozen=True)
class _CachedEstimate:
    """Shared by tasks that differ in optimizer fields only. `method`: None where the method is large."""

    method: Method | None
    estimate: task_pb2.TaskEstimate


class ExecutorParser:
    """Converts serialized plan.Executor messages to the planner's type; an unchanged executor is converted once."""

    def __init__(self) -> None:
        self._last: dict[bytes, ExecutorView] = {}  # of the last call: costs, so bytes, change every second

    def parse(self, executors: Sequence[bytes]) -> list[ExecutorView]:
        last = self._last  # read once: other threads replace it
        self._last = views = {
            executor: last.get(executor) or executor_to_view(plan_pb2.Executor.FromString(executor))
            for executor in executors
        }
        return [views[executor] for executor in executors]


class TaskEstimator:
    """Estimates tasks and refuses those that no executor can hold. Computes in the tenant's turns."""

    def __init__(
        self,
        alignment: "alignment_pb2_grpc.AlignmentServiceAsyncStub",
        config: PlannerConfig,
        threads: AdmissionThreads,
        parser: ExecutorParser,
    ) -> None:
        self._alignment, self._config, self._threads, self._parser = alignment, config, threads, parser
        self._reports = _ExpiringCache[dataset_pb2.PreflightReport]()
        self._estimates = _ExpiringCache[_CachedEstimate]()

    def estimate_from_cache(
        self, tenant: str, spec: task_pb2.TaskSpec, executors: Sequence[bytes]
    ) -> tuple[TaskSpec, task_pb2.TaskEstimate] | None:
        """Return the result of `estimate` if a task that differs in optimizer fields only is cached, else None."""
        cached = self._estimates.get(_cache_key(tenant, _without_irrelevant_fields(spec), executors))
        if cached is None:
            return None
        domain = spec_to_domain(spec, method=cached.method)
        validate(domain, [view.backbone for view in self._parser.parse(executors)], is_method_valid=True)
        estimate = task_pb2.TaskEstimate()
        estimate.CopyFrom(cached.estimate)
        return domain, estimate

    async def estimate(
        self, tenant: str, spec: task_pb2.TaskSpec, executors: Sequence[bytes]
    ) -> tuple[TaskSpec, task_pb2.TaskEstimate]:
        """Return the task as the engine's type, and its estimate. `spec` names the dataset's version; `executors` are
        serialized plan.Executor messages.

        Raises InvalidInputError, WillNeverFitError, and alignment's error if it refuses the data.
        """
        if (cached := self.estimate_from_cache(tenant, spec, executors)) is not None:
            return cached
        core = _without_irrelevant_fields(spec)
        domain, backbone, hosts = await self._threads.compute(tenant, partial(self._validate, spec, executors))
        report = await self._inspect(tenant, core)
        predict = partial(self._predict, report, domain, backbone, hosts)
        estimate = await self._threads.compute(tenant, predict)
        copied = task_pb2.TaskEstimate()
        copied.CopyFrom(estimate)
        method = domain.method if core.ByteSize() <= _MAX_CACHED_METHOD_BYTES else None
        self._estimates.put(_cache_key(tenant, core, executors), _CachedEstimate(method, copied))
        return domain, estimate

    def _validate(
        self, spec: task_pb2.TaskSpec, executors: Sequence[bytes], yield_turn: Callable[[], object]
    ) -> tuple[TaskSpec, BackboneView, list[ExecutorView]]:
        """Return the task, its backbone and the executors of that. Raises InvalidInputError, WillNeverFitError."""
        domain, views = spec_to_domain(spec), self._parser.parse(executors)
        backbone = validate(domain, [view.backbone for view in views])
        hosts = [view for view in views if view.backbone.name == backbone.name]
        yield_turn()
        refuse_if_never_fits(domain, hosts, self._config)
        return domain, backbone, hosts

    async def _inspect(self, tenant: str, core: task_pb2.TaskSpec) -> dataset_pb2.PreflightReport:
        training = core.training.SerializeToString(deterministic=True)
        key = (tenant, core.dataset_version, core.backbone, training)
        if (cached := self._reports.get(key)) is not None:
            return cached
        options = dataset_pb2.PreflightOptions(backbone=core.backbone, training=core.training, num_samples=1)
        request = alignment_pb2.InspectDatasetRequest(tenant=tenant, sha256=core.dataset_version, options=options)
        report = (await self._alignment.InspectDataset(request, timeout=INSPECT_SECONDS)).report
        for field in _UNUSED_REPORT_FIELDS:
            report.ClearField(field)  # type: ignore[arg-type]
        return self._reports.put(key, report)

    def _predict(
        self,
        report: dataset_pb2.PreflightReport,
        spec: TaskSpec,
        backbone: BackboneView,
        hosts: Sequence[ExecutorView],
        yield_turn: Callable[[], object],
    ) -> task_pb2.TaskEstimate:
        task = TaskView("", "", spec, 0, report.num_steps, num_train_tokens=report.num_train_tokens,
                        length_quantiles=tuple(report.length_quantiles),
                        num_heldout_rows=report.num_heldout_rows)  # fmt: skip
        seconds = list[float]()
        for executor in hosts:
            yield_turn()
            if executor.can_predict:
                seconds.append(seconds_alone(task, executor, self._config))
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


def _without_irrelevant_fields(spec: task_pb2.TaskSpec) -> task_pb2.TaskSpec:
    """Return a copy with only those fields that the task's data, time and bytes depend on."""
    core = task_pb2.TaskSpec()
    core.CopyFrom(spec)
    for field in _IRRELEVANT_FIELDS:
        core.ClearField(field)  # type: ignore[arg-type]
    for field in _OPTIMIZER_FIELDS:
        core.training.ClearField(field)  # type: ignore[arg-type]
    return core


def _cache_key(tenant: str, core: task_pb2.TaskSpec, executors: Sequence[bytes]) -> str:
    return hash_parts(tenant.encode(), core.SerializeToString(deterministic=True), *executors)


class _ExpiringCache(Generic[T]):
    """Keeps values for a minute; drops the least recently used ones when there are too many."""

    def __init__(self) -> None:
        self._values: OrderedDict[Hashable, tuple[T, float]] = OrderedDict()

    def get(self, key: Hashable) -> T | None:
        value, expiry = self._values.get(key, (None, 0.0))
        if value is None or expiry <= time.monotonic():
            return None
        self._values.move_to_end(key)
        return value

    def put(self, key: Hashable, value: T) -> T:
        self._values[key] = (value, time.monotonic() + _CACHE_SECONDS)
        while len(self._values) > _MAX_CACHED:
            self._values.popitem(last=False)
        return value
