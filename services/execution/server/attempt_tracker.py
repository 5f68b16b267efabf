"""Tracks the attempts that the trainer runs, so that the server can release them all when the trainer dies.

Pure: no pipe, no gRPC.
"""

from collections.abc import Iterable

from muxtune.v1 import plan_pb2
from services.conversion.results import ATTEMPT_ENDS


class AttemptTracker:
    """Follows the plans that go to the trainer and the results that come from it."""

    def __init__(self) -> None:
        self._running: dict[str, int] = {}  # attempt by task
        self._ended: dict[str, int] = {}  # newest ended attempt by task
        self._on_device: set[str] = set()
        self._off_device: set[str] = set()  # running tasks that left the device: only their uploads are not done yet
        self._dropped: dict[str, int] = {}  # attempts that lost the lease, until the trainer has let them go

    def start(self, plan: plan_pb2.ExecutorPlan) -> plan_pb2.ExecutorPlan:
        """Returns the plan without attempts that ended here, and records the others.

        Scheduling may not have known of the ends when it made the plan.
        """
        planned = {task.task for task in plan.tasks}  # later plans do not name ended attempts of the other tasks
        self._ended = {task: attempt for task, attempt in self._ended.items() if task in planned}
        running = [task for task in plan.tasks if self._ended.get(task.task, 0) < task.attempt]
        self._off_device -= {task.task for task in running if self._running.get(task.task) != task.attempt}
        self._running |= {task.task: task.attempt for task in running}
        reduced_plan = plan_pb2.ExecutorPlan()
        reduced_plan.CopyFrom(plan)
        del reduced_plan.tasks[:]
        reduced_plan.tasks.extend(running)
        return reduced_plan

    def record_resident(self, tasks: Iterable[str]) -> None:
        """Records the tasks that the trainer reports on its device."""
        resident = set(tasks)
        self._off_device = ((self._off_device | self._on_device) - resident) & self._running.keys()
        self._on_device = resident
        self._dropped = {task: attempt for task, attempt in self._dropped.items() if task in resident}

    def record_results(self, results: Iterable[plan_pb2.TaskResult]) -> list[plan_pb2.TaskResult]:
        """Records the trainer's results.

        Returns those of running attempts: the trainer may not know yet that an attempt was dropped.
        """
        valid = []
        for result in results:
            if self._running.get(result.task) != result.attempt:
                continue
            valid.append(result)
            kind = result.WhichOneof("result")
            if kind in ATTEMPT_ENDS:
                self._end(result.task, result.attempt)
        return valid

    def drop_all(self) -> None:
        """Forgets every running attempt: the lease is lost. The trainer may still die with them."""
        self._dropped |= {task: attempt for task, attempt in self._running.items() if task in self._on_device}
        self._running.clear()

    def drop_stale(self, tasks: Iterable[str], acknowledged: Iterable[plan_pb2.TaskResult]) -> list[str]:
        """Forgets superseded attempts among `tasks`, whose results admission found stale. Returns their tasks.

        `acknowledged`: the results that the request acknowledges. A stale result of an earlier attempt, sent again over
        a new stream, does not end the running attempt.
        """
        attempts: dict[str, int] = {}
        for result in acknowledged:
            attempts[result.task] = max(result.attempt, attempts.get(result.task, 0))
        running = ((task, self._running.get(task, 0)) for task in tasks)
        stale = [task for task, attempt in running if attempts.get(task, attempt) >= attempt]
        for task in stale:
            self._running.pop(task, None)
        return stale

    def release_all(self, reason: str) -> list[plan_pb2.TaskResult]:
        """Returns a `released` result for every running attempt: the trainer died.

        Each task may have caused the crash, except those that had left the device before. Admission counts the
        suspects. They include tasks that lost the lease and were still on the device.
        """
        running, results = list((self._dropped | self._running).items()), []
        num_suspects = sum(task not in self._off_device for task, _ in running)
        for task, attempt in running:
            suspects = 0 if task in self._off_device else num_suspects
            released = plan_pb2.TaskReleased(reason=reason, num_suspects=suspects)
            results.append(plan_pb2.TaskResult(task=task, attempt=attempt, released=released))
            self._end(task, attempt)
        self._on_device, self._off_device, self._dropped = set(), set(), {}
        return results

    def _end(self, task: str, attempt: int) -> None:
        self._ended[task] = max(attempt, self._ended.get(task, 0))
        if self._running.get(task) == attempt:
            del self._running[task]
