"""Plans a snapshot on a thread of its own, so that leases are renewed meanwhile, and without tasks that make planning
fail, so that one of them does not stop all others."""

import dataclasses
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping

from engine.planning.cost.task_demand import DemandEstimator
from engine.planning.crash_isolation import plan as make_plan
from engine.planning.types import Explanation, HTask, Plan, PlannerConfig, Snapshot, TaskView
from services.concurrency.threads import Threads
from services.conversion.plan import executor_to_view, snapshot_task_to_view
from services.scheduling.ledger_reader import LedgerSnapshot

_log = logging.getLogger(__name__)


class SnapshotPlanner:
    """Makes one plan at a time. `weights`: of tenants, as in `engine.planning.types.Snapshot`."""

    def __init__(self, config: PlannerConfig, weights: Mapping[str, float]) -> None:
        self._config, self._weights = config, weights
        self._estimator = DemandEstimator(config)
        self._thread = Threads("planner", 1)
        self._faulty: dict[str, str] = {}  # by task, why it is left out
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
        view = Snapshot(tasks, executors, running, self._weights)
        suspects = {entry.task.name for entry in snapshot.tasks if entry.num_crashes}
        self._forget_faulty(snapshot)
        view, plan = self._plan_without_faulty(view, suspects)
        left_out = {**snapshot.unreadable, **self._faulty}
        waiting = (Explanation(name, "", (), f"cannot be planned: {reason}") for name, reason in left_out.items())
        return view, Plan(plan.htasks, (*plan.explanations, *waiting))

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
            self._estimator = DemandEstimator(self._config)
            return view, self._make_plan(view, suspects, self._estimator)

    def _find_faulty(self, view: Snapshot, suspects: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yield the tasks with which planning fails, and its error, by halves."""
        try:
            self._make_plan(view, suspects, DemandEstimator(self._config))
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
