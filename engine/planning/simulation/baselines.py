"""Policies for the simulator: the planner, and the two that it is compared with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from engine.planning.cost.cost_model import Part
from engine.planning.cost.task_demand import DemandEstimator, TaskDemand
from engine.planning.fusion.fusion import of_partition
from engine.planning.placement.executor_state import ExecutorState
from engine.planning.planner import decide
from engine.planning.simulation.simulator import SimulatedAssignment
from engine.planning.types import ExecutorView, HTask, PlannerConfig, Snapshot, TaskView


@dataclass
class Multiplexed:
    """muxtune's own planner, with its switches in `limits`."""

    limits: PlannerConfig
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    _running: dict[str, tuple[HTask, ...]] = field(default_factory=dict)
    _periods: dict[tuple[str, tuple[HTask, ...]], float] = field(default_factory=dict)
    _appraiser: DemandEstimator | None = None

    def assign(self, tasks: Sequence[TaskView], executors: Sequence[ExecutorView]) -> Mapping[str, SimulatedAssignment]:
        self._appraiser = self._appraiser or DemandEstimator(self.limits)
        snapshot = Snapshot(tuple(tasks), tuple(executors), self._running, self.tenant_weights)
        decision = decide(snapshot, self.limits, self._appraiser)
        hosts = decision.pool.hosts
        assignments = {name: self._assignment(host, decision.htasks[name]) for name, host in hosts.items()}
        self._running = decision.htasks
        return assignments

    def _assignment(self, host: ExecutorState, htasks: tuple[HTask, ...]) -> SimulatedAssignment:
        """Its period is worked out when its hTasks change."""
        if (key := (host.name, htasks)) not in self._periods:
            jobs = host.jobs()
            partition = [[jobs[name] for name in htask.tasks] for htask in htasks]
            self._periods = {k: v for k, v in self._periods.items() if k[0] != host.name}
            self._periods[key] = of_partition(partition, host.stage()).period_seconds if partition else 0.0
        return SimulatedAssignment(tuple(name for htask in htasks for name in htask.tasks), self._periods[key])


@dataclass
class OneInstanceEach:
    """Every task a process with a backbone of its own: as many on an executor as its memory holds, oldest first, taking
    turns, each running its own slices as they are."""

    limits: PlannerConfig
    _appraiser: DemandEstimator | None = None

    def assign(self, tasks: Sequence[TaskView], executors: Sequence[ExecutorView]) -> Mapping[str, SimulatedAssignment]:
        self._appraiser = self._appraiser or DemandEstimator(self.limits)
        places = [_Place(ExecutorState(executor, self.limits)) for executor in executors]
        by_name = {place.host.name: place for place in places}
        for task in sorted(tasks, key=lambda task: (not task.executor, task.age)):
            need = self._appraiser.need(task, places[0].host.executor.backbone)
            candidates = [by_name[task.executor]] if task.executor else places
            fitting = [place for place in candidates if place.free_bytes >= place.host.alone_bytes(need)]
            if fitting:
                min(fitting, key=lambda place: (place.seconds, place.host.name)).put(need)
            elif not task.executor and all(
                place.free_bytes < place.host.executor.backbone.weight_bytes for place in places
            ):
                break  # not even a backbone: nobody else finds a place
        return {place.host.name: SimulatedAssignment(tuple(place.tasks), place.seconds) for place in places}


class _Place:
    """An executor while instances are given to it."""

    def __init__(self, host: ExecutorState) -> None:
        self.host, self.free_bytes, self.seconds = host, host.executor.memory_bytes, 0.0
        self.tasks: list[str] = []

    def put(self, need: TaskDemand) -> None:
        self.tasks.append(need.task.name)
        self.free_bytes -= self.host.alone_bytes(need)
        self.seconds += _own_slices_seconds(self.host, need)


@dataclass
class BatchEverything:
    """One backbone an executor, all its tasks in one batch, every sequence padded to the longest that any may have."""

    limits: PlannerConfig
    _appraiser: DemandEstimator | None = None

    def assign(self, tasks: Sequence[TaskView], executors: Sequence[ExecutorView]) -> Mapping[str, SimulatedAssignment]:
        self._appraiser = self._appraiser or DemandEstimator(self.limits)
        snapshot = Snapshot(tuple(tasks), tuple(executors))
        decision = decide(snapshot, replace(self.limits, preempts=False), self._appraiser)
        return {
            name: SimulatedAssignment(tuple(host.residents), _padded_seconds(host, list(host.residents.values())))
            for name, host in decision.pool.hosts.items()
        }


def _own_slices_seconds(host: ExecutorState, need: TaskDemand) -> float:
    training = need.task.spec.training
    slices = math.ceil(training.global_batch_size / max(1, training.micro_batch_size))
    seconds = host.profile.base_seconds(need.step.num_tokens, slices) + host.profile.extra_seconds(need.step)
    return seconds / host.executor.num_stages


def _padded_seconds(host: ExecutorState, needs: Sequence[TaskDemand]) -> float:
    if not needs:
        return 0.0
    longest = max(need.footprint.sequence_tokens for need in needs)
    parts = []
    for need in needs:
        tokens = need.task.spec.training.global_batch_size * longest
        grown = tokens / need.step.num_tokens
        step = need.step
        parts.append(
            Part(tokens, tokens * longest, step.num_targets, step.num_modules, step.num_multiplications * grown,
                 step.num_stepped_parameters, step.num_segments)
        )  # fmt: skip
    whole = sum(part.num_tokens for part in parts)
    number = max(1, math.ceil(whole / host.stage().max_tokens))
    extra = sum(host.profile.extra_seconds(part) for part in parts)
    return (host.profile.base_seconds(whole, number) + extra) / host.executor.num_stages
