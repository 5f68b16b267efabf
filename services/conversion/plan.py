"""Converts between protobuf and the planner's dataclasses: executors, costs, tasks, plans, explanations."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidInputError
from engine.methods.base import Site, SiteKind
from engine.planning.types import (
    UNKNOWN_COST,
    BackboneView,
    CostProfile,
    ExecutorView,
    Explanation,
    HTask,
    PlannerConfig,
    TaskView,
)
from engine.task import Affects, TaskSpec, Training, fields_affecting
from muxtune.v1 import ledger_pb2, plan_pb2, scheduling_pb2, task_pb2
from services.conversion.task import spec_to_domain
from services.resource_names import tenant_of

# Of a spec, and of Training, where fields that affect the optimizer alone are left out too.
_UNPLANNED_FIELDS = ("dataset", "dataset_version", "initial_adapter", "labels", "budget")
_UNPLANNED_TRAINING_FIELDS = ("seed", *(f.name for f in dataclasses.fields(Training)
                                        if f.name not in fields_affecting(~Affects.OPTIMIZER)))  # fmt: skip


def cost_to_proto(cost: CostProfile) -> plan_pb2.CostProfile:
    return plan_pb2.CostProfile(**dataclasses.asdict(cost))


def cost_to_domain(cost: plan_pb2.CostProfile) -> CostProfile:
    """Return the costs; a negative or non-finite one counts as 0, because executors are not trusted."""
    values = {field.name: float(getattr(cost, field.name)) for field in dataclasses.fields(CostProfile)}
    valid = {name: value if math.isfinite(value) and value > 0 else 0.0 for name, value in values.items()}
    return CostProfile(**valid)


def site_to_module(site: Site, input_group: int = 0) -> plan_pb2.AdaptableModule:
    return plan_pb2.AdaptableModule(
        name=site.name,
        in_features=site.in_features,
        out_features=site.out_features,
        kind=plan_pb2.ModuleKind.Value(f"MODULE_KIND_{site.kind.name}"),
        has_bias=site.has_bias,
        group_size=site.group_size,
        input_group=input_group,
    )


def module_to_site(module: plan_pb2.AdaptableModule) -> Site:
    kinds = {plan_pb2.ModuleKind.Value(f"MODULE_KIND_{kind.name}"): kind for kind in SiteKind}
    kind = kinds.get(module.kind, SiteKind.LINEAR)
    group_size = max(1, module.group_size)
    return Site(module.name, module.in_features, module.out_features, kind, module.has_bias, group_size)


def backbone_to_view(backbone: plan_pb2.Backbone) -> BackboneView:
    return BackboneView(
        name=backbone.name,
        num_parameters=backbone.num_parameters,
        num_layers=backbone.num_layers,
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        max_sequence_tokens=backbone.max_sequence_tokens,
        weight_bytes=backbone.weight_bytes,
        dtype=backbone.dtype,
        sites=tuple(module_to_site(module) for module in backbone.adaptable_modules),
        kept_token_bytes=max(0.0, backbone.kept_token_bytes),
        process_bytes=max(0, backbone.process_bytes),
        allocator_slack=max(1.0, backbone.allocator_slack)
        if backbone.allocator_slack
        else BackboneView.allocator_slack,
        recomputed_token_bytes=max(0.0, backbone.recomputed_token_bytes),
        packed_weight_bytes=max(0, backbone.packed_weight_bytes),
        input_groups={module.name: module.input_group for module in backbone.adaptable_modules if module.input_group},
    )


def executor_to_view(executor: plan_pb2.Executor) -> ExecutorView:
    return ExecutorView(
        name=executor.name,
        backbone=backbone_to_view(executor.backbone),
        memory_bytes=executor.device.memory_bytes,
        effective_tokens_per_second=executor.device.effective_tokens_per_second,
        is_draining=executor.draining,
        cost=cost_to_domain(executor.device.cost) if executor.device.HasField("cost") else UNKNOWN_COST,
        num_stages=max(1, executor.num_stages),
        hop_seconds=executor.hop_seconds,
    )


@dataclass(frozen=True)
class PlanningSpec:
    """The part of a task that the planner needs and that never changes. A sweep over learning rates shares one."""

    spec: TaskSpec
    num_steps: int
    num_train_tokens: int
    length_quantiles: tuple[int, ...]
    num_heldout_rows: int


def planning_fields(stored: ledger_pb2.StoredTaskSpec) -> ledger_pb2.StoredTaskSpec:
    """Return a copy with only those fields of spec and estimate that the planner needs."""
    estimate = stored.estimate
    needed = task_pb2.TaskEstimate(
        num_steps=estimate.num_steps,
        num_train_tokens=estimate.num_train_tokens,
        length_quantiles=estimate.length_quantiles,
        num_heldout_rows=estimate.num_heldout_rows,
    )
    copy = ledger_pb2.StoredTaskSpec(spec=stored.spec, estimate=needed)
    for field in _UNPLANNED_FIELDS:
        copy.spec.ClearField(field)  # type: ignore[arg-type]
    for field in _UNPLANNED_TRAINING_FIELDS:
        copy.spec.training.ClearField(field)  # type: ignore[arg-type]
    return copy


def stored_spec_to_planning(stored: ledger_pb2.StoredTaskSpec) -> PlanningSpec:
    """Raises InvalidInputError for a spec that this version cannot read."""
    estimate = stored.estimate
    return PlanningSpec(
        spec_to_domain(stored.spec),
        estimate.num_steps,
        estimate.num_train_tokens,
        tuple(estimate.length_quantiles),
        estimate.num_heldout_rows,
    )


def snapshot_task_to_view(
    entry: ledger_pb2.SnapshotTask, planning: PlanningSpec, age: int, now_microseconds: int
) -> TaskView:
    task, progress = entry.task, entry.task.progress
    deadline = planning.spec.deadline_microseconds
    return TaskView(
        name=task.name,
        tenant=tenant_of(task.name),
        spec=planning.spec,
        age=age,
        num_steps=planning.num_steps,
        step=progress.step,
        num_train_tokens=planning.num_train_tokens,
        length_quantiles=planning.length_quantiles,
        executor=entry.executor,
        is_cancelling=task.state == task_pb2.TASK_STATE_CANCELLING,
        seconds_to_deadline=(deadline - now_microseconds) / 1e6 if deadline else math.inf,
        device_seconds=progress.device_seconds,
        num_effective_tokens=progress.effective_tokens,
        num_padding_tokens=progress.padding_tokens,
        num_heldout_rows=planning.num_heldout_rows,
    )


def planner_config_to_proto(config: PlannerConfig) -> scheduling_pb2.PlannerLimits:
    return scheduling_pb2.PlannerLimits(
        token_budget=config.token_budget,
        chunk_tokens=config.chunk_tokens,
        fusion_off=not config.fuses,
        interleaving_off=not config.interleaves,
        preemption_off=not config.preempts,
        max_resident_tasks=config.max_resident_tasks,
    )


def planner_config_to_domain(message: scheduling_pb2.PlannerLimits) -> PlannerConfig:
    """Return the planner's settings. Raises InvalidInputError."""
    chunk_tokens = message.chunk_tokens
    if message.token_budget < 0:
        raise InvalidInputError.of_field("limits.token_budget", f"{message.token_budget} must not be negative")
    if chunk_tokens < 0 or chunk_tokens & (chunk_tokens - 1):
        raise InvalidInputError.of_field("limits.chunk_tokens", f"{chunk_tokens} is neither 0 nor a power of two")
    if message.max_resident_tasks < 0:
        raise InvalidInputError.of_field(
            "limits.max_resident_tasks", f"{message.max_resident_tasks} must not be negative"
        )
    return PlannerConfig(
        message.token_budget or PlannerConfig.token_budget,
        chunk_tokens,
        not message.fusion_off,
        not message.interleaving_off,
        not message.preemption_off,
        message.max_resident_tasks or PlannerConfig.max_resident_tasks,
    )


def htask_to_proto(htask: HTask) -> plan_pb2.HTask:
    return plan_pb2.HTask(
        tasks=htask.tasks,
        token_budget=htask.token_budget,
        chunk_tokens=htask.chunk_tokens,
        round_tokens=htask.round_tokens,
    )


def htask_to_domain(htask: plan_pb2.HTask) -> HTask:
    return HTask(tuple(htask.tasks), htask.token_budget, htask.chunk_tokens, tuple(htask.round_tokens))


def explanation_to_proto(explanation: Explanation) -> plan_pb2.TaskExplanation:
    """Copy the fields by name; a field that is None stays unset."""
    fields: dict[str, Any] = {f.name: getattr(explanation, f.name) for f in dataclasses.fields(explanation)}
    return plan_pb2.TaskExplanation(**{name: value for name, value in fields.items() if value is not None})
