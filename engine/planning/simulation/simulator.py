"""Simulates a scheduling policy over time: tasks arrive, executors run rounds, plans follow, until all is done.

An executor's rounds and shares are all alike until a plan or the end of a task changes its residents: progress is
linear in between, so only such changes are events. Changes within `replan_seconds` share a plan, as in the mesh.
"""

import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from engine.planning.types import ExecutorView, TaskRate, TaskView


@dataclass(frozen=True)
class Arrival:
    """A task, and the time at which it arrives."""

    seconds: float
    task: TaskView


@dataclass(frozen=True)
class TaskOutcome:
    """The course of a finished task. `device_seconds`: its shares of its executors' time."""

    task: TaskView
    arrived_seconds: float
    started_seconds: float
    finished_seconds: float
    device_seconds: float
    num_evictions: int

    @property
    def completion_seconds(self) -> float:
        return self.finished_seconds - self.arrived_seconds


@dataclass(frozen=True)
class SimulatedAssignment:
    """The tasks on an executor, and the seconds in which each of them takes one step.

    `rates`: the tasks' shares of time and seconds for each step. A task that it does not contain has an even share, and
    takes a step in each round.
    """

    tasks: tuple[str, ...]
    round_seconds: float
    rates: Mapping[str, TaskRate] = field(default_factory=dict)

    def rate(self, task: str) -> TaskRate:
        return self.rates.get(task) or TaskRate(1 / len(self.tasks), self.round_seconds)


class SchedulingPolicy(Protocol):
    """Decides which tasks run on which executor. Each task names the executor that it is on."""

    def assign(self, tasks: Sequence[TaskView], executors: Sequence[ExecutorView]) -> Mapping[str, SimulatedAssignment]:
        """Return the assignment of each executor by its name. A task in no assignment waits."""
        ...


@dataclass(frozen=True)
class SimulationResult:
    """All outcomes in order of finishing, and the tasks that no plan ever placed."""

    outcomes: tuple[TaskOutcome, ...]
    num_plans: int
    never_placed: tuple[str, ...] = ()


def simulate(
    arrivals: Iterable[Arrival], executors: Sequence[ExecutorView], policy: SchedulingPolicy, *,
    replan_seconds: float = 0.0, switch_seconds: float = 0.0,
) -> SimulationResult:  # fmt: skip
    """Run until every task that can run is done. A task that starts or moves loses `switch_seconds` first."""
    cluster = _SimulatedCluster(executors, policy, switch_seconds)
    events: list[tuple[float, int, Arrival | str]] = []  # an arrival, the name of an executor, or "" for a plan
    order = itertools.count()
    for arrival in sorted(arrivals, key=lambda arrival: (arrival.seconds, arrival.task.age)):
        heapq.heappush(events, (arrival.seconds, next(order), arrival))
    is_planned = False
    while events:
        now, _, event = heapq.heappop(events)
        if isinstance(event, Arrival):
            cluster.arrive(event)
        elif event:
            if not cluster.executors[event].is_due(now):
                continue  # the executor has changed since this event was scheduled
            cluster.finish(event, now)
        changed = [event] if isinstance(event, str) and event else []
        if event == "":
            is_planned, changed = False, cluster.plan(now)
        elif not is_planned:
            is_planned = True
            heapq.heappush(events, (now + replan_seconds, next(order), ""))
        for name in changed:
            if (due := cluster.executors[name].due_seconds) is not None:
                heapq.heappush(events, (due, next(order), name))
    return SimulationResult(tuple(cluster.outcomes), cluster.num_plans, tuple(cluster.active))


@dataclass
class _SimulatedTask:
    """A task from its arrival to its end."""

    view: TaskView
    arrived_seconds: float
    steps_left: float
    started_seconds: float | None = None
    device_seconds: float = 0.0
    num_evictions: int = 0


@dataclass
class _SimulatedExecutor:
    """An executor with its residents and round time. Progress is counted up to `counted_seconds`."""

    residents: dict[str, _SimulatedTask] = field(default_factory=dict)
    assignment: SimulatedAssignment = SimulatedAssignment((), 0.0)
    counted_seconds: float = 0.0
    due_seconds: float | None = None

    def advance(self, now: float) -> None:
        elapsed = max(0.0, now - self.counted_seconds)
        for name, task in self.residents.items():
            rate = self.assignment.rate(name)
            task.steps_left -= elapsed / rate.seconds_per_step
            task.device_seconds += elapsed * rate.device_share
        self.counted_seconds = max(self.counted_seconds, now)

    def schedule_next_end(self) -> None:
        """Set the time at which the next resident will be done."""
        seconds = [
            max(0.0, task.steps_left) * self.assignment.rate(name).seconds_per_step
            for name, task in self.residents.items()
        ]
        self.due_seconds = self.counted_seconds + min(seconds) if seconds else None

    def is_due(self, now: float) -> bool:
        return self.due_seconds is not None and self.due_seconds <= now + 1e-9 * max(1.0, now)


class _SimulatedCluster:
    """All executors and unfinished tasks of a simulation."""

    def __init__(self, executors: Sequence[ExecutorView], policy: SchedulingPolicy, switch_seconds: float) -> None:
        self._views, self._policy, self._switch_seconds = executors, policy, switch_seconds
        self.executors = {executor.name: _SimulatedExecutor() for executor in executors}
        self.active: dict[str, _SimulatedTask] = {}
        self.outcomes: list[TaskOutcome] = []
        self.num_plans = 0

    def arrive(self, arrival: Arrival) -> None:
        view = arrival.task
        self.active[view.name] = _SimulatedTask(view, arrival.seconds, float(view.num_steps_left))

    def finish(self, name: str, now: float) -> None:
        """Remove finished tasks; the others' rounds stay as long as they are until the next plan."""
        executor = self.executors[name]
        executor.advance(now)
        for done in [key for key, task in executor.residents.items() if task.steps_left <= 1e-6]:
            task = executor.residents.pop(done)
            del self.active[done]
            started = task.arrived_seconds if task.started_seconds is None else task.started_seconds
            self.outcomes.append(
                TaskOutcome(task.view, task.arrived_seconds, started, now, task.device_seconds, task.num_evictions)
            )
        executor.schedule_next_end()

    def plan(self, now: float) -> list[str]:
        """Apply a new plan. Return the executors with changed residents."""
        self.num_plans += 1
        assignments = self._policy.assign([task.view for task in self.active.values()], self._views)
        changed = []
        for name, executor in self.executors.items():
            assigned = assignments.get(name, SimulatedAssignment((), 0.0))
            if assigned.tasks == tuple(executor.residents) and assigned == executor.assignment:
                continue
            executor.advance(now)
            changed.append(name)
        for name in changed:
            self._evict(name, set(assignments[name].tasks) if name in assignments else set())
        for name in changed:
            self._admit(name, assignments.get(name, SimulatedAssignment((), 0.0)), now)
        return changed

    def _evict(self, name: str, staying: set[str]) -> None:
        residents = self.executors[name].residents
        for leaving in [resident for resident in residents if resident not in staying]:
            task = residents.pop(leaving)
            task.view = replace(task.view, executor="")
            task.num_evictions += 1

    def _admit(self, name: str, assigned: SimulatedAssignment, now: float) -> None:
        executor = self.executors[name]
        for task in (self.active[task_name] for task_name in assigned.tasks):
            if task.view.executor != name:
                task.view = replace(task.view, executor=name)
                task.started_seconds = now if task.started_seconds is None else task.started_seconds
                task.steps_left += self._switch_seconds / assigned.rate(task.view.name).seconds_per_step
        executor.residents = {task_name: self.active[task_name] for task_name in assigned.tasks}
        executor.assignment = assigned
        executor.counted_seconds = now
        executor.schedule_next_end()
