"""Plans a snapshot on a thread of its own, so that leases are renewed meanwhile, and without tasks that make planning
fail, so that one of them does not stop all others."""

import copy
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress

from engine.planning.cost.task_demand import DemandEstimator
from engine.planning.crash_isolation import plan as make_plan
from engine.planning.placement.executor_state import ClusterState, ExecutorState
from engine.planning.planner import estimate_demand, is_estimated
from engine.planning.types import Explanation, HTask, Plan, PlannerConfig, Snapshot, TaskView
from services.concurrency.threads import Threads
from services.conversion.plan import executor_to_view, snapshot_task_to_view
from services.scheduling.ledger_reader import LedgerSnapshot

_log = logging.getLogger(__name__)


class SnapshotPlanner:
    """Makes one plan at a time. `weights`: of tenants, as in `engine.planning.types.Snapshot`. `estimate_seconds`: CPU
    time that a cycle spends on new tasks."""

    def __init__(self, config: PlannerConfig, weights: Mapping[str, float], estimate_seconds: float = 1.0) -> None:
        self._config, self._weights, self._estimate_seconds = config, weights, estimate_seconds
        self._estimator = DemandEstimator(config)
        self._thread = Threads("planner", 1)
        self._faulty: dict[str, str] = {}  # by task, why it is left out
        self._num_turns = 0
        self._served: dict[str, int] = {}  # last turns of tenants with tasks that are not estimated yet
        self.has_more = False  # tasks were left out that a next cycle can plan
        self._leases: set[tuple[str, int]] = set()  # with which the faulty tasks were found

    async def plan(self, snapshot: LedgerSnapshot, running: Mapping[str, tuple[HTask, ...]]) -> tuple[Snapshot, Plan]:
        """Return the planner's input and its plan, in which each unfinished task has an explanation.

        `running`: the hTasks that each executor runs, which are kept where they are good enough.
        """
        return await self._thread.run(self._plan, snapshot, running)

    def _plan(self, snapshot: LedgerSnapshot, running: Mapping[str, tuple[HTask, ...]]) -> tuple[Snapshot, Plan]:
        now = time.time_ns() // 1000  # wall time, as deadlines are
        tasks = tuple(
            snapshot_task_to_view(entry, snapshot.specs[entry.task.name], age, now)
            for age, entry in enumerate(snapshot.tasks)
            if entry.task.name in snapshot.specs
        )
        executors = tuple(executor_to_view(executor) for executor in snapshot.executors)
        self._forget_faulty(snapshot)
        left_out = {name: f"cannot be planned: {reason}" for name, reason in snapshot.unreadable.items()}
        view = self._without_unestimated(Snapshot(tasks, executors, running, self._weights), left_out)
        suspects = {entry.task.name for entry in snapshot.tasks if entry.num_crashes}
        view, plan = self._plan_without_faulty(view, suspects)
        left_out |= {name: f"cannot be planned: {reason}" for name, reason in self._faulty.items()}
        waiting = (Explanation(name, "", (), reason) for name, reason in left_out.items())
        return view, Plan(plan.htasks, (*plan.explanations, *waiting))

    def _without_unestimated(self, view: Snapshot, left_out: dict[str, str]) -> Snapshot:
        """Estimate tasks that are new, tenants in turn, for as long as a cycle may spend on it. Return the snapshot
        without the others, and add the reason to `left_out`: one tenant's costly specs delay no other's tasks."""
        cluster = ClusterState((ExecutorState(e, self._config) for e in view.executors if not e.is_draining), {})
        queues: dict[str, deque[TaskView]] = {}
        for task in view.tasks:
            must_stay = task.executor or task.name in self._faulty  # a task that runs must be in each plan
            if not must_stay and not is_estimated(task, cluster, self._estimator):
                queues.setdefault(task.tenant, deque()).append(task)
        turns = deque(sorted(queues, key=lambda name: self._served.get(name, 0)))
        end = time.thread_time() + self._estimate_seconds
        while turns:
            tenant = turns.popleft()
            with suppress(Exception):  # planning finds the task that raises
                estimate_demand(queues[tenant].popleft(), cluster, self._config, self._estimator)
            self._num_turns += 1
            self._served[tenant] = self._num_turns
            if queues[tenant]:
                turns.append(tenant)
            if time.thread_time() >= end:
                break
        self._served = {tenant: turn for tenant, turn in self._served.items() if queues.get(tenant)}
        waiting = {task.name for queue in queues.values() for task in queue}
        left_out.update(dict.fromkeys(waiting, "waits until its demand is estimated, which is soon"))
        self.has_more = bool(waiting)
        return _part(view, (task for task in view.tasks if task.name not in waiting)) if waiting else view

    def _forget_faulty(self, snapshot: LedgerSnapshot) -> None:
        """Forget tasks that have ended, and all of them where an executor came or left: it may have been the cause."""
        leases = {(executor.name, executor.lease_term) for executor in snapshot.executors}
        if leases != self._leases:
            self._leases, self._faulty = leases, {}
        self._faulty = {name: reason for name, reason in self._faulty.items() if name in snapshot.specs}

    def _plan_without_faulty(self, view: Snapshot, suspects: Collection[str]) -> tuple[Snapshot, Plan]:
        """Return the snapshot without the tasks that planning fails with, and its plan."""
        view = _part(view, (task for task in view.tasks if task.name not in self._faulty))
        try:
            return view, self._make_plan(view, suspects, self._estimator)
        except Exception:
            _log.exception("Planning failed")
            faulty = dict(self._find_faulty(view, suspects))
            if not faulty or len(faulty) == len(view.tasks) > 1:
                raise  # no single task is the cause
            for name, fault in faulty.items():
                _log.error("%s is left out of plans, other tasks are not: planning with it raises %s", name, fault)
                self._faulty[name] = f"planning with it raises {fault}"
            view = _part(view, (task for task in view.tasks if task.name not in faulty))
            return view, self._make_plan(view, suspects, self._estimator)

    def _find_faulty(self, view: Snapshot, suspects: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yield the tasks with which planning fails, and its error, by halves."""
        try:
            self._make_plan(view, suspects, copy.copy(self._estimator))  # the original forgets no task
        except Exception as error:
            if len(view.tasks) == 1:
                yield view.tasks[0].name, type(error).__name__
            elif view.tasks:
                middle = len(view.tasks) // 2
                for half in (view.tasks[:middle], view.tasks[middle:]):
                    yield from self._find_faulty(_part(view, half), suspects)

    def _make_plan(self, view: Snapshot, suspects: Collection[str], estimator: DemandEstimator) -> Plan:
        return make_plan(view, [task.name for task in view.tasks if task.name in suspects], self._config, estimator)


def _part(snapshot: Snapshot, tasks: Iterable[TaskView]) -> Snapshot:
    return dataclasses.replace(snapshot, tasks=tuple(tasks))
