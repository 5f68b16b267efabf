"""State of the executors while a plan is made: residents, free memory, and tenants' shares of device time."""

import functools
import math
import operator
from collections import Counter, defaultdict
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
        self._usages: dict[str, ResourceUsage] = {}  # of each resident
        self._usage = ResourceUsage()  # of all
        self._num_alike: Counter[_Maxima] = Counter()  # residents by what counts as a maximum
        self._claims: dict[str, dict[str, float]] = {}  # seconds of each resident, by tenant
        self._tenant_seconds: dict[str, float] = {}
        self._seconds = 0.0  # of all tenants

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

    def tenants(self) -> Collection[str]:
        return self._tenant_seconds.keys()

    def of_tenant(self, tenant: str) -> Collection[str]:
        """Return the names of the tenant's residents."""
        return self._claims.get(tenant, {}).keys()

    def share(self, tenant: str) -> float:
        """Return the tenant's share of the executor's time."""
        return self._tenant_seconds.get(tenant, 0.0) / (self._seconds or 1.0)

    def share_after(self, tenant: str, joining: TaskDemand, leaving: Collection[str]) -> float:
        """Return the tenant's share of the executor's time after the change."""
        seconds = dict(self._tenant_seconds)
        for changed in {joining.task.tenant, *(self.residents[name].task.tenant for name in leaving)}:
            staying = [claim for name, claim in self._claims.get(changed, {}).items() if name not in leaving]
            added = [joining.seconds(self.profile)] if changed == joining.task.tenant else []
            seconds[changed] = math.fsum([*staying, *added])
        return seconds.get(tenant, 0.0) / (math.fsum(seconds.values()) or 1.0)

    def add(self, demand: TaskDemand) -> None:
        name, usage = demand.task.name, self._usage_alone(demand)
        self.residents[name], self._usages[name] = demand, usage
        self._usage += usage
        self._num_alike[_maxima(usage)] += 1
        self._claims.setdefault(demand.task.tenant, {})[name] = demand.seconds(self.profile)
        self._sum_claims(demand.task.tenant)

    def remove(self, name: str) -> TaskDemand:
        demand = self.residents.pop(name)
        self._num_alike -= Counter([_maxima(self._usages.pop(name))])
        self._usage = sum(self._usages.values(), ResourceUsage())
        del self._claims[demand.task.tenant][name]
        self._sum_claims(demand.task.tenant)
        return demand

    def _sum_claims(self, tenant: str) -> None:
        """Sum up the claims again, exactly: equal tenants have equal sums, whatever came and left before."""
        self._tenant_seconds[tenant] = math.fsum(self._claims[tenant].values())
        if not self._claims[tenant]:
            del self._claims[tenant], self._tenant_seconds[tenant]
        self._seconds = math.fsum(self._tenant_seconds.values())

    def _usage_after(self, joining: TaskDemand | None, leaving: Collection[str]) -> ResourceUsage:
        usage = self._usage_without(leaving) if leaving else self._usage
        return usage + self._usage_alone(joining) if joining else usage

    def _usage_without(self, leaving: Collection[str]) -> ResourceUsage:
        """Return the usage of the residents that stay: sums by subtraction, maxima over residents that differ."""
        gone = [self._usages[name] for name in leaving]
        num_gone = Counter(map(_maxima, gone))
        staying = [maxima for maxima, number in self._num_alike.items() if number > num_gone[maxima]]
        return ResourceUsage(
            self._usage.num_tokens - sum(usage.num_tokens for usage in gone),
            self._usage.extra_seconds - sum(usage.extra_seconds for usage in gone),
            self._usage.adapter_bytes - sum(usage.adapter_bytes for usage in gone),
            max((maxima[0] for maxima in staying), default=0.0),
            functools.reduce(operator.or_, (maxima[1] for maxima in staying), 0),
            max((maxima[2] for maxima in staying), default=0),
            max((maxima[3] for maxima in staying), default=0),
        )

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


_Maxima = tuple[float, int, int, int]


def _maxima(usage: ResourceUsage) -> _Maxima:
    """Return the parts of a usage of which an executor needs the largest, or the union, and not the sum."""
    return usage.saved_token_bytes, usage.input_mask, usage.sequence_tokens, usage.slice_tokens


class ClusterState:
    """All usable executors, and each tenant's share of their time: counted in executors, divided by its weight."""

    def __init__(self, executors: Iterable[ExecutorState], weights: Mapping[str, float]) -> None:
        self.executors = {executor.name: executor for executor in sorted(executors, key=lambda e: e.name)}
        self.weights, self.num_changes = weights, 0
        self._hosts: dict[str, dict[str, ExecutorState]] = defaultdict(dict)  # executors by tenant
        self._shares: dict[str, float] = {}  # of tenants that were asked for, since the last change
        self._by_backbone: dict[str, list[ExecutorState]] = defaultdict(list)
        for executor in self.executors.values():
            self._by_backbone[executor.view.backbone.name].append(executor)
        self._sizes = {
            backbone: tuple((executor.name, executor.view.memory_bytes) for executor in executors)
            for backbone, executors in self._by_backbone.items()
        }

    def of_backbone(self, name: str) -> list[ExecutorState]:
        return self._by_backbone.get(name, [])

    def sizes(self, backbone: str) -> tuple[tuple[str, int], ...]:
        """Return the backbone's executors with their memory, on which it depends whether a task fits."""
        return self._sizes.get(backbone, ())

    def backbones(self) -> list[str]:
        return list(self._by_backbone)

    def share(self, tenant: str) -> float:
        if tenant not in self._shares:
            shares = math.fsum(executor.share(tenant) for executor in self._hosts[tenant].values())
            self._shares[tenant] = shares / self.weights.get(tenant, 1.0)
        return self._shares[tenant]

    def share_after(self, tenant: str, executor: ExecutorState, joining: TaskDemand, leaving: Collection[str]) -> float:
        """Return the tenant's share after a change of one executor."""
        others = [host.share(tenant) for host in self._hosts[tenant].values() if host is not executor]
        after = executor.share_after(tenant, joining, leaving)
        return math.fsum([*others, after]) / self.weights.get(tenant, 1.0)

    def add(self, demand: TaskDemand, executor: ExecutorState) -> None:
        executor.add(demand)
        self._hosts[demand.task.tenant][executor.name] = executor
        self._forget_shares()

    def remove(self, name: str, executor: ExecutorState) -> TaskDemand:
        demand = executor.remove(name)
        if not executor.of_tenant(demand.task.tenant):
            del self._hosts[demand.task.tenant][executor.name]
        self._forget_shares()
        return demand

    def count_hosts(self) -> None:
        """Find each tenant's executors once, after residents that stay were added to their executors directly."""
        for executor in self.executors.values():
            for tenant in executor.tenants():
                self._hosts[tenant][executor.name] = executor

    def _forget_shares(self) -> None:
        self.num_changes += 1
        self._shares.clear()
