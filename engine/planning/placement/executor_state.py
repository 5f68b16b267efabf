"""Executors while a plan is made: who is on each, what that leaves free, and whose share of device time it is."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from engine.planning.cost.memory_model import largest_tokens, resident_bytes
from engine.planning.cost.round_time import StageModel, StepCost
from engine.planning.cost.task_demand import TaskDemand
from engine.planning.types import ExecutorView, PlannerConfig


@dataclass(frozen=True)
class ResourceUsage:
    """What tasks on one executor add up to: sums of their steps, maxima of what a microbatch must hold."""

    num_tokens: float = 0.0
    extra_seconds: float = 0.0
    adapter_bytes: int = 0
    kept_bytes: float = 0.0
    input_mask: int = 0
    sequence_tokens: int = 0
    slice_tokens: int = 0

    def __add__(self, other: "ResourceUsage") -> "ResourceUsage":
        return ResourceUsage(
            self.num_tokens + other.num_tokens,
            self.extra_seconds + other.extra_seconds,
            self.adapter_bytes + other.adapter_bytes,
            max(self.kept_bytes, other.kept_bytes),
            self.input_mask | other.input_mask,
            max(self.sequence_tokens, other.sequence_tokens),
            max(self.slice_tokens, other.slice_tokens),
        )


class ExecutorState:
    """One executor and its residents."""

    def __init__(self, executor: ExecutorView, limits: PlannerConfig) -> None:
        self.executor, self.name, self._limits = executor, executor.name, limits
        self.profile = executor.profile
        self.residents: dict[str, TaskDemand] = {}
        self._claims: dict[str, float] = {}
        self._crowd = ResourceUsage()

    def fits(self, joining: TaskDemand, leaving: Collection[str] = ()) -> bool:
        """Whether all would be within memory, the largest microbatch included."""
        return self.bytes_of(self._crowd_with(joining, leaving)) <= self.executor.memory_bytes

    def could_hold(self, need: TaskDemand) -> bool:
        """Were there nobody else."""
        return self.bytes_of(self._alone(need)) <= self.executor.memory_bytes

    def load_seconds(self, joining: TaskDemand | None = None, leaving: Collection[str] = ()) -> float:
        """The round as it is, or would be: in it every resident takes one step, all fused."""
        return self.round_seconds(self._crowd_with(joining, leaving))

    def round_seconds(self, crowd: ResourceUsage) -> float:
        number = max(1, math.ceil(crowd.num_tokens / self.microbatch_tokens(crowd)))
        seconds = self.profile.base_seconds(crowd.num_tokens, number) + crowd.extra_seconds
        return seconds / self.executor.num_stages if crowd.num_tokens else 0.0

    def bytes_of(self, crowd: ResourceUsage) -> int:
        tokens = self.microbatch_tokens(crowd)
        return resident_bytes(self.executor.backbone, crowd.adapter_bytes, crowd.kept_bytes, crowd.input_mask, tokens)

    def alone_bytes(self, need: TaskDemand) -> int:
        """In a process of its own, with a backbone of its own and microbatches of its own size. What any process has,
        with or without a backbone, is left out, and packed weights, as in `memory.separate_instance_bytes`."""
        held, backbone = need.footprint, self.executor.backbone
        whole = resident_bytes(backbone, held.adapter_bytes, held.kept_bytes, held.input_mask, held.slice_tokens)
        return whole - backbone.process_bytes - backbone.packed_weight_bytes

    def microbatch_tokens(self, crowd: ResourceUsage) -> int:
        limits = self._limits
        return largest_tokens(
            crowd.sequence_tokens, crowd.slice_tokens, limits.token_budget, limits.largest_chunk_tokens
        )

    def crowd_of(self, *needs: TaskDemand) -> ResourceUsage:
        return sum((self._alone(need) for need in needs), ResourceUsage())

    def jobs(self) -> dict[str, StepCost]:
        """The residents as fusion sees them."""
        return {name: need.job(self.profile) for name, need in self.residents.items()}

    def stage(self) -> StageModel:
        """What fusion may count on. That a microbatch of so many tokens fits is seen to when tasks are placed."""
        executor, tokens = self.executor, self.microbatch_tokens(self._crowd)
        return StageModel(self.profile, tokens, math.inf, executor.num_stages, executor.hop_seconds,
                     self._limits.interleaves)  # fmt: skip

    def shares(self, joining: TaskDemand | None = None, leaving: Collection[str] = ()) -> dict[str, float]:
        """The part of its time that each tenant's residents have, or would have."""
        claims: dict[str, float] = defaultdict(float)
        for need in self._staying(joining, leaving):
            seconds = self._claims.get(need.task.name)
            claims[need.task.tenant] += need.seconds(self.profile) if seconds is None else seconds
        whole = sum(claims.values()) or 1.0
        return {tenant: claim / whole for tenant, claim in claims.items()}

    def put(self, need: TaskDemand) -> None:
        self.residents[need.task.name] = need
        self._claims[need.task.name] = need.seconds(self.profile)
        self._crowd += self._alone(need)

    def take(self, name: str) -> TaskDemand:
        need = self.residents.pop(name)
        del self._claims[name]
        self._crowd = self.crowd_of(*self.residents.values())
        return need

    def _staying(self, joining: TaskDemand | None, leaving: Collection[str]) -> Iterable[TaskDemand]:
        staying = [need for name, need in self.residents.items() if name not in leaving]
        return [*staying, joining] if joining else staying

    def _crowd_with(self, joining: TaskDemand | None, leaving: Collection[str]) -> ResourceUsage:
        if leaving:
            return self.crowd_of(*self._staying(joining, leaving))
        return self._crowd + self._alone(joining) if joining else self._crowd

    def _alone(self, need: TaskDemand) -> ResourceUsage:
        held = need.footprint
        return ResourceUsage(
            need.step.num_tokens,
            self.profile.extra_seconds(need.step),
            held.adapter_bytes,
            held.kept_bytes,
            held.input_mask,
            held.sequence_tokens,
            held.slice_tokens,
        )


class ClusterState:
    """All usable executors, and each tenant's share of their time, in executors, over its weight."""

    def __init__(self, hosts: Iterable[ExecutorState], weights: Mapping[str, float]) -> None:
        self.hosts = {host.name: host for host in sorted(hosts, key=lambda host: host.name)}
        self._weights = weights
        self._shares: dict[str, float] = defaultdict(float)
        self._by_backbone: dict[str, list[ExecutorState]] = defaultdict(list)
        for host in self.hosts.values():
            self._by_backbone[host.executor.backbone.name].append(host)

    def of_backbone(self, name: str) -> list[ExecutorState]:
        return self._by_backbone.get(name, [])

    def backbones(self) -> list[str]:
        return list(self._by_backbone)

    def share(self, tenant: str) -> float:
        return self._shares[tenant] / self._weights.get(tenant, 1.0)

    def share_if(self, tenant: str, host: ExecutorState, joining: TaskDemand, leaving: Collection[str]) -> float:
        """The tenant's share after a change of one executor."""
        changed = host.shares(joining, leaving).get(tenant, 0.0) - host.shares().get(tenant, 0.0)
        return (self._shares[tenant] + changed) / self._weights.get(tenant, 1.0)

    def put(self, need: TaskDemand, host: ExecutorState) -> None:
        self._count(host, -1)
        host.put(need)
        self._count(host, 1)

    def keep(self, need: TaskDemand, host: ExecutorState) -> None:
        """As `put`, while the pool is being filled with those who stay: shares are counted once, by `count`."""
        host.put(need)

    def count(self) -> None:
        for host in self.hosts.values():
            self._count(host, 1)

    def take(self, name: str, host: ExecutorState) -> TaskDemand:
        self._count(host, -1)
        need = host.take(name)
        self._count(host, 1)
        return need

    def _count(self, host: ExecutorState, sign: int) -> None:
        for tenant, share in host.shares().items():
            self._shares[tenant] += sign * share
