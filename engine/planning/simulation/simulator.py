"""The planner over time: tasks arrive, executors run rounds, plans follow, until all is done. No clock but its own.

An executor's rounds are all alike until a plan or a task's end changes who is on it: progress is linear in between, so
that each change, and nothing else, is an event. Changes within `replan_seconds` share a plan, as hints do in the mesh.
"""

import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from engine.planning.types import ExecutorView, TaskView


@dataclass(frozen=True)
class Arrival:
    """A task, and when it comes."""

    seconds: float
    task: TaskView


@dataclass(frozen=True)
class Outcome:
    """What became of a task. `device_seconds`: its executors' time while it was there, divided among residents."""

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
    """Who is on an executor, and the seconds in which each of them takes one step."""

    tasks: tuple[str, ...]
    round_seconds: float


class Policy(Protocol):
    """Decides who is where. Tasks come with the executor they are on."""

    def assign(self, tasks: Sequence[TaskView], executors: Sequence[ExecutorView]) -> Mapping[str, SimulatedAssignment]:
        """By executor; who is on none waits."""
        ...


@dataclass(frozen=True)
class SimulationResult:
    """All outcomes, in order of finishing, and tasks that no plan ever placed."""

    outcomes: tuple[Outcome, ...]
    num_plans: int
    never_placed: tuple[str, ...] = ()


def simulate(
    arrivals: Iterable[Arrival], executors: Sequence[ExecutorView], policy: Policy, *,
    replan_seconds: float = 0.0, switch_seconds: float = 0.0,
) -> SimulationResult:  # fmt: skip
    """Until every task that can run is done. A task that starts, or is moved, loses `switch_seconds` first."""
    world = _World(executors, policy, switch_seconds)
    events: list[tuple[float, int, Arrival | str]] = []  # an arrival, the name of an executor, or "" for a plan
    order = itertools.count()
    for arrival in sorted(arrivals, key=lambda arrival: (arrival.seconds, arrival.task.age)):
        heapq.heappush(events, (arrival.seconds, next(order), arrival))
    is_planned = False
    while events:
        now, _, event = heapq.heappop(events)
        if isinstance(event, Arrival):
            world.arrive(event)
        elif event:
            if not world.machines[event].is_due(now):
                continue  # what it would have finished then has changed since
            world.finish(event, now)
        changed = [event] if isinstance(event, str) and event else []
        if event == "":
            is_planned, changed = False, world.plan(now)
        elif not is_planned:
            is_planned = True
            heapq.heappush(events, (now + replan_seconds, next(order), ""))
        for name in changed:
            if (due := world.machines[name].due_seconds) is not None:
                heapq.heappush(events, (due, next(order), name))
    return SimulationResult(tuple(world.outcomes), world.num_plans, tuple(world.active))


@dataclass
class _Life:
    """A task from its arrival to its end."""

    task: TaskView
    arrived_seconds: float
    steps_left: float
    started_seconds: float | None = None
    device_seconds: float = 0.0
    num_evictions: int = 0


@dataclass
class _Machine:
    """An executor: its residents, how long a round is, and up to when progress was counted."""

    residents: dict[str, _Life] = field(default_factory=dict)
    round_seconds: float = 0.0
    counted_seconds: float = 0.0
    due_seconds: float | None = None

    def advance(self, now: float) -> None:
        elapsed = max(0.0, now - self.counted_seconds)
        for life in self.residents.values():
            life.steps_left -= elapsed / self.round_seconds
            life.device_seconds += elapsed / len(self.residents)
        self.counted_seconds = max(self.counted_seconds, now)

    def settle(self) -> None:
        """When the next of them will be done."""
        least = min((life.steps_left for life in self.residents.values()), default=None)
        self.due_seconds = None if least is None else self.counted_seconds + max(0.0, least) * self.round_seconds

    def is_due(self, now: float) -> bool:
        return self.due_seconds is not None and self.due_seconds <= now + 1e-9 * max(1.0, now)


class _World:
    def __init__(self, executors: Sequence[ExecutorView], policy: Policy, switch_seconds: float) -> None:
        self._executors, self._policy, self._switch_seconds = executors, policy, switch_seconds
        self.machines = {executor.name: _Machine() for executor in executors}
        self.active: dict[str, _Life] = {}
        self.outcomes: list[Outcome] = []
        self.num_plans = 0

    def arrive(self, arrival: Arrival) -> None:
        self.active[arrival.task.name] = _Life(arrival.task, arrival.seconds, float(arrival.task.num_steps_left))

    def finish(self, executor: str, now: float) -> None:
        """Those who are done leave; the others wait for the next plan to shorten their rounds."""
        machine = self.machines[executor]
        machine.advance(now)
        done = [name for name, life in machine.residents.items() if life.steps_left <= 1e-6]
        for name in done:
            life = machine.residents.pop(name)
            del self.active[name]
            started = life.arrived_seconds if life.started_seconds is None else life.started_seconds
            self.outcomes.append(
                Outcome(life.task, life.arrived_seconds, started, now, life.device_seconds, life.num_evictions)
            )
        machine.settle()

    def plan(self, now: float) -> list[str]:
        """The executors whose residents changed."""
        self.num_plans += 1
        assignments = self._policy.assign([life.task for life in self.active.values()], self._executors)
        changed = []
        for name, machine in self.machines.items():
            assigned = assignments.get(name, SimulatedAssignment((), 0.0))
            if assigned.tasks == tuple(machine.residents) and assigned.round_seconds == machine.round_seconds:
                continue
            machine.advance(now)
            changed.append(name)
        for name in changed:
            self._leave(name, set(assignments[name].tasks) if name in assignments else set())
        for name in changed:
            self._settle_in(name, assignments.get(name, SimulatedAssignment((), 0.0)), now)
        return changed

    def _leave(self, executor: str, staying: set[str]) -> None:
        machine = self.machines[executor]
        for name in [name for name in machine.residents if name not in staying]:
            life = machine.residents.pop(name)
            life.task = replace(life.task, executor="")
            life.num_evictions += 1

    def _settle_in(self, executor: str, assigned: SimulatedAssignment, now: float) -> None:
        machine = self.machines[executor]
        for name in assigned.tasks:
            life = self.active[name]
            if life.task.executor != executor:
                life.task = replace(life.task, executor=executor)
                life.started_seconds = now if life.started_seconds is None else life.started_seconds
                life.steps_left += self._switch_seconds / assigned.round_seconds
        machine.residents = {name: self.active[name] for name in assigned.tasks}
        machine.round_seconds = assigned.round_seconds
        machine.counted_seconds = now
        machine.settle()
