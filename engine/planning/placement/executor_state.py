"""State of the executors while a plan is made: residents, free memory, and tenants' shares of device time."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from engine.planning.cost.cost_model import base_seconds, extra_seconds
from engine.planning.cost.memory_model import largest_microbatch_tokens, resident_bytes
from engine.planning.cost.round_time import StageModel, StepCost
from engine.planning.cost.task_demand import TaskDemand
from engine.planning.fusion.fair_groups import FairGroup, divide, task_rates
from engine.planning.types import ExecutorView, PlannerConfig, TaskRate


@dataclass(frozen=True)
class ResourceUsage:
    """Resources that tasks on one executor use together: sums over their steps, maxima for a microbatch."""

    num_tokens: float = 0.0
    extra_seconds: float = 0.0
    adapter_bytes: int = 0
    saved_token_bytes: float = 0.0
    input_mask: int = 0
    sequence_tokens: int = 0
    slice_tokens: int = 0

    def __add__(self, other: "ResourceUsage") -> "ResourceUsage":
        return ResourceUsage(
            self.num_tokens + other.num_tokens,
            self.extra_seconds + other.extra_seconds,
            self.adapter_bytes + other.adapter_bytes,
            max(self.saved_token_bytes, other.saved_token_bytes),
            self.input_mask | other.input_mask,
            max(self.sequence_tokens, other.sequence_tokens),
            max(self.slice_tokens, other.slice_tokens),
        )


class ExecutorState:
    """An executor and its residents while a plan is made. `view`: the executor in the snapshot."""

    def __init__(self, view: ExecutorView, config: PlannerConfig) -> None:
        self.view, self.name, self._config = view, view.name, config
        self.profile = view.profile
        self.residents: dict[str, TaskDemand] = {}
        self._claims: dict[str, float] = {}
        self._usage = ResourceUsage()

    def fits(self, joining: TaskDemand, leaving: Collection[str] = ()) -> bool:
        """Return whether all tasks fit into memory after the change, the largest microbatch included, and are not more
        than an executor may have."""
        if len(self.residents) - len(leaving) >= self._config.max_resident_tasks:
            return False
        return self.bytes_of(self._usage_after(joining, leaving)) <= self.view.memory_bytes

    @property
    def is_crowded(self) -> bool:
        """Return whether it has as many tasks as an executor may have."""
        return len(self.residents) >= self._config.max_resident_tasks

    def fits_alone(self, demand: TaskDemand) -> bool:
        """Return whether the task fits into memory without neighbours."""
        return self.bytes_of(self._usage_alone(demand)) <= self.view.memory_bytes

    def load_seconds(self, joining: TaskDemand | None = None, leaving: Collection[str] = ()) -> float:
        """Return the seconds of a round now, or after the change: one step of every resident, all fused."""
        return self.round_seconds(self._usage_after(joining, leaving))

    def round_seconds(self, usage: ResourceUsage) -> float:
        num_microbatches = max(1, math.ceil(usage.num_tokens / self.microbatch_tokens(usage)))
        seconds = base_seconds(self.profile, usage.num_tokens, num_microbatches) + usage.extra_seconds
        return seconds / self.view.num_stages if usage.num_tokens else 0.0

    def bytes_of(self, usage: ResourceUsage) -> int:
        tokens = self.microbatch_tokens(usage)
        return resident_bytes(
            self.view.backbone, usage.adapter_bytes, usage.saved_token_bytes, usage.input_mask, tokens
        )

    def alone_bytes(self, demand: TaskDemand) -> int:
        """Return the bytes of a separate process for the task, as `memory_model.separate_instance_bytes` does."""
        footprint, backbone = demand.footprint, self.view.backbone
        whole = resident_bytes(
            backbone,
            footprint.adapter_bytes,
            footprint.saved_token_bytes,
            footprint.input_mask,
            footprint.slice_tokens,
        )
        return whole - backbone.process_bytes - backbone.packed_weight_bytes

    def microbatch_tokens(self, usage: ResourceUsage) -> int:
        config = self._config
        return largest_microbatch_tokens(
            usage.sequence_tokens, usage.slice_tokens, config.token_budget, config.largest_chunk_tokens
        )

    def usage_of(self, *demands: TaskDemand) -> ResourceUsage:
        return sum((self._usage_alone(demand) for demand in demands), ResourceUsage())

    def groups(self, weights: Mapping[str, float], running: Collection[frozenset[str]] = ()) -> tuple[FairGroup, ...]:
        """Return the groups of tenants that share rounds; those that run now, `running`, if they are nearly as good."""
        return self.groups_of(self.residents.values(), weights, running)

    def groups_of(
        self, demands: Iterable[TaskDemand], weights: Mapping[str, float], running: Collection[frozenset[str]] = ()
    ) -> tuple[FairGroup, ...]:
        return divide(demands, weights, self.profile, self.microbatch_tokens(self._usage), running)

    def rates(self, groups: Sequence[FairGroup], residents: Mapping[str, TaskDemand]) -> dict[str, TaskRate]:
        tokens = self.microbatch_tokens(self._usage)
        return task_rates(groups, residents, self.profile, tokens, self.view.num_stages)

    def step_costs(self) -> dict[str, StepCost]:
        """Return the residents' steps as fusion sees them."""
        return {name: demand.step_cost(self.profile) for name, demand in self.residents.items()}

    def stage(self) -> StageModel:
        """Return the pipeline that fusion plans for. Placement has checked that its largest microbatch fits."""
        tokens = self.microbatch_tokens(self._usage)
        return StageModel(self.profile, tokens, math.inf, self.view.num_stages, self.view.hop_seconds,
                          self._config.interleaves)  # fmt: skip

    def shares(self, joining: TaskDemand | None = None, leaving: Collection[str] = ()) -> dict[str, float]:
        """Return each tenant's share of the executor's time, now or after the change."""
        claims: dict[str, float] = defaultdict(float)
        for demand in self._residents_after(joining, leaving):
            seconds = self._claims.get(demand.task.name)
            claims[demand.task.tenant] += demand.seconds(self.profile) if seconds is None else seconds
        whole = sum(claims.values()) or 1.0
        return {tenant: claim / whole for tenant, claim in claims.items()}

    def add(self, demand: TaskDemand) -> None:
        self.residents[demand.task.name] = demand
        self._claims[demand.task.name] = demand.seconds(self.profile)
        self._usage += self._usage_alone(demand)

    def remove(self, name: str) -> TaskDemand:
        demand = self.residents.pop(name)
        del self._claims[name]
        self._usage = self.usage_of(*self.residents.values())
        return demand

    def _residents_after(self, joining: TaskDemand | None, leaving: Collection[str]) -> Iterable[TaskDemand]:
        staying = [demand for name, demand in self.residents.items() if name not in leaving]
        return [*staying, joining] if joining else staying

    def _usage_after(self, joining: TaskDemand | None, leaving: Collection[str]) -> ResourceUsage:
        if leaving:
            return self.usage_of(*self._residents_after(joining, leaving))
        return self._usage + self._usage_alone(joining) if joining else self._usage

    def _usage_alone(self, demand: TaskDemand) -> ResourceUsage:
        footprint = demand.footprint
        return ResourceUsage(
            demand.step.num_tokens,
            extra_seconds(self.profile, demand.step),
            footprint.adapter_bytes,
            footprint.saved_token_bytes,
            footprint.input_mask,
            footprint.sequence_tokens,
            footprint.slice_tokens,
        )


class ClusterState:
    """All usable executors, and each tenant's share of their time: counted in executors, divided by its weight."""

    def __init__(self, executors: Iterable[ExecutorState], weights: Mapping[str, float]) -> None:
        self.executors = {executor.name: executor for executor in sorted(executors, key=lambda e: e.name)}
        self.weights = weights
        self._shares: dict[str, float] = defaultdict(float)
        self._by_backbone: dict[str, list[ExecutorState]] = defaultdict(list)
        for executor in self.executors.values():
            self._by_backbone[executor.view.backbone.name].append(executor)

    def of_backbone(self, name: str) -> list[ExecutorState]:
        return self._by_backbone.get(name, [])

    def backbones(self) -> list[str]:
        return list(self._by_backbone)

    def share(self, tenant: str) -> float:
        return self._shares[tenant] / self.weights.get(tenant, 1.0)

    def share_after(self, tenant: str, executor: ExecutorState, joining: TaskDemand, leaving: Collection[str]) -> float:
        """Return the tenant's share after a change of one executor."""
        change = executor.shares(joining, leaving).get(tenant, 0.0) - executor.shares().get(tenant, 0.0)
        return (self._shares[tenant] + change) / self.weights.get(tenant, 1.0)

    def add(self, demand: TaskDemand, executor: ExecutorState) -> None:
        self._count(executor, -1)
        executor.add(demand)
        self._count(executor, 1)

    def remove(self, name: str, executor: ExecutorState) -> TaskDemand:
        self._count(executor, -1)
        demand = executor.remove(name)
        self._count(executor, 1)
        return demand

    def count_shares(self) -> None:
        """Count the shares once, after residents that stay were added to their executors directly."""
        for executor in self.executors.values():
            self._count(executor, 1)

    def _count(self, executor: ExecutorState, sign: int) -> None:
        for tenant, share in executor.shares().items():
            self._shares[tenant] += sign * share
