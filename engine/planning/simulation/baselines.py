"""Policies for the simulator: muxtune's planner, and two baselines to compare it with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from engine.planning.cost.cost_model import MicrobatchWork, base_seconds, extra_seconds
from engine.planning.cost.task_demand import DemandEstimator, TaskDemand
from engine.planning.fusion.fusion import fuse_as
from engine.planning.placement.executor_state import ExecutorState
from engine.planning.planner import decide
from engine.planning.simulation.simulator import SimulatedAssignment
from engine.planning.types import ExecutorView, HTask, PlannerConfig, Snapshot, TaskRate, TaskView


@dataclass
class PlannerPolicy:
    """muxtune's own planner, with its switches in `config`."""

    config: PlannerConfig
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    _running: dict[str, tuple[HTask, ...]] = field(default_factory=dict)
    _periods: dict[tuple[str, tuple[HTask, ...]], float] = field(default_factory=dict)
    _estimator: DemandEstimator | None = None

    def assign(self, tasks: Sequence[TaskView], executors: Sequence[ExecutorView]) -> Mapping[str, SimulatedAssignment]:
        self._estimator = self._estimator or DemandEstimator(self.config)
        snapshot = Snapshot(tuple(tasks), tuple(executors), self._running, self.tenant_weights)
        decision = decide(snapshot, self.config, self._estimator)
        states = decision.cluster.executors
        assignments = {
            name: replace(self._assignment(state, decision.htasks[name]), rates=_rates_of(state, decision.rates))
            for name, state in states.items()
        }
        self._running = decision.htasks
        return assignments

    def _assignment(self, executor: ExecutorState, htasks: tuple[HTask, ...]) -> SimulatedAssignment:
        """Return the executor's tasks and period, which is computed anew when its hTasks change."""
        if (key := (executor.name, htasks)) not in self._periods:
            costs = executor.step_costs()
            partition = [[costs[name] for name in htask.tasks] for htask in htasks]
            self._periods = {k: v for k, v in self._periods.items() if k[0] != executor.name}
            self._periods[key] = fuse_as(partition, executor.stage()).period_seconds if partition else 0.0
        return SimulatedAssignment(tuple(name for htask in htasks for name in htask.tasks), self._periods[key])


def _rates_of(executor: ExecutorState, rates: Mapping[str, TaskRate]) -> dict[str, TaskRate]:
    return {name: rates[name] for name in executor.residents}


@dataclass
class SeparateInstances:
    """Baseline: every task is a separate process with its own copy of the backbone.

    An executor runs as many as its memory holds, oldest first; they take turns, each with its own slices as they are.
    """

    config: PlannerConfig
    _estimator: DemandEstimator | None = None

    def assign(self, tasks: Sequence[TaskView], executors: Sequence[ExecutorView]) -> Mapping[str, SimulatedAssignment]:
        self._estimator = self._estimator or DemandEstimator(self.config)
        hosts = [_InstanceHost(ExecutorState(executor, self.config)) for executor in executors]
        by_name = {host.executor.name: host for host in hosts}
        for task in sorted(tasks, key=lambda task: (not task.executor, task.age)):
            demand = self._estimator.estimate(task, hosts[0].executor.view.backbone)
            candidates = [by_name[task.executor]] if task.executor else hosts
            fitting = [host for host in candidates if host.free_bytes >= host.executor.alone_bytes(demand)]
            if fitting:
                min(fitting, key=lambda host: (host.seconds, host.executor.name)).add(demand)
            elif not task.executor and all(
                host.free_bytes < host.executor.view.backbone.weight_bytes for host in hosts
            ):
                break  # no executor has room for one more backbone
        return {host.executor.name: SimulatedAssignment(tuple(host.tasks), host.seconds) for host in hosts}


class _InstanceHost:
    """An executor while instances are assigned to it."""

    def __init__(self, executor: ExecutorState) -> None:
        self.executor, self.free_bytes, self.seconds = executor, executor.view.memory_bytes, 0.0
        self.tasks: list[str] = []

    def add(self, demand: TaskDemand) -> None:
        self.tasks.append(demand.task.name)
        self.free_bytes -= self.executor.alone_bytes(demand)
        self.seconds += _instance_seconds(self.executor, demand)


@dataclass
class PaddedBatching:
    """Baseline: one backbone for each executor, all its tasks in one batch, all sequences padded to the longest."""

    config: PlannerConfig
    _estimator: DemandEstimator | None = None

    def assign(self, tasks: Sequence[TaskView], executors: Sequence[ExecutorView]) -> Mapping[str, SimulatedAssignment]:
        self._estimator = self._estimator or DemandEstimator(self.config)
        snapshot = Snapshot(tuple(tasks), tuple(executors))
        decision = decide(snapshot, replace(self.config, preempts=False), self._estimator)
        return {
            name: SimulatedAssignment(tuple(state.residents), _padded_seconds(state, list(state.residents.values())))
            for name, state in decision.cluster.executors.items()
        }


def _instance_seconds(executor: ExecutorState, demand: TaskDemand) -> float:
    """Return the seconds of a step in microbatches of the task's own slices."""
    training = demand.task.spec.training
    num_slices = math.ceil(training.global_batch_size / max(1, training.micro_batch_size))
    base = base_seconds(executor.profile, demand.step.num_tokens, num_slices)
    return (base + extra_seconds(executor.profile, demand.step)) / executor.view.num_stages


def _padded_seconds(executor: ExecutorState, demands: Sequence[TaskDemand]) -> float:
    """Return the seconds in which every task takes one step, all sequences padded to the longest."""
    if not demands:
        return 0.0
    longest = max(demand.footprint.sequence_tokens for demand in demands)
    parts = []
    for demand in demands:
        step, num_tokens = demand.step, demand.task.spec.training.global_batch_size * longest
        growth = num_tokens / step.num_tokens
        parts.append(
            MicrobatchWork(num_tokens, num_tokens * longest, step.num_targets, step.num_modules,
                           step.num_multiplications * growth, step.num_stepped_parameters, step.num_segments)
        )  # fmt: skip
    all_tokens = sum(part.num_tokens for part in parts)
    num_microbatches = max(1, math.ceil(all_tokens / executor.stage().max_tokens))
    extra = sum(extra_seconds(executor.profile, part) for part in parts)
    return (base_seconds(executor.profile, all_tokens, num_microbatches) + extra) / executor.view.num_stages
