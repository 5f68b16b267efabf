"""Which attempts are in the trainer's hands, as its server knows it: so that a trainer's death is nobody's loss.

Pure: no pipe, no gRPC.
"""

from collections.abc import Iterable

from muxtune.v1 import plan_pb2

_ENDS = ("finished", "failed", "released")


class AttemptTracker:
    """Follows plans down and results up."""

    def __init__(self) -> None:
        self._running: dict[str, int] = {}  # attempt by task
        self._ended: dict[str, int] = {}
        self._resident: set[str] = set()  # on the device
        self._off: set[str] = set()  # that were, and now only wait for the store to have what they leave

    def start(self, plan: plan_pb2.ExecutorPlan) -> plan_pb2.ExecutorPlan:
        """The plan without attempts that ended here: it may have been made before scheduling knew."""
        named = {task.task for task in plan.tasks}  # who is not will not be again in an attempt that ended
        self._ended = {task: attempt for task, attempt in self._ended.items() if task in named}
        going = [task for task in plan.tasks if self._ended.get(task.task, 0) < task.attempt]
        self._off -= {task.task for task in going if self._running.get(task.task) != task.attempt}
        self._running |= {task.task: task.attempt for task in going}
        left = plan_pb2.ExecutorPlan()
        left.CopyFrom(plan)
        del left.tasks[:]
        left.tasks.extend(going)
        return left

    def note_resident(self, tasks: Iterable[str]) -> None:
        """What the trainer says is on its device."""
        now = set(tasks)
        self._off = ((self._off | self._resident) - now) & self._running.keys()
        self._resident = now

    def note(self, results: Iterable[plan_pb2.TaskResult]) -> list[plan_pb2.TaskResult]:
        """What the trainer says of its tasks; answers what of it counts: it may not have heard of a drop yet."""
        counting = []
        for result in results:
            if self._running.get(result.task) != result.attempt:
                continue
            counting.append(result)
            kind = result.WhichOneof("result")
            if kind in _ENDS:
                self._end(result.task, result.attempt)
        return counting

    def drop_all(self) -> None:
        """The lease is lost."""
        self._running.clear()

    def drop_stale(self, tasks: Iterable[str], judged: Iterable[plan_pb2.TaskResult]) -> list[str]:
        """Forgets attempts that were superseded, and answers which: those whose own results were found stale.

        A result of an earlier attempt, sent again over a new stream, is stale as well, and says nothing of this one.
        """
        attempts: dict[str, int] = {}
        for result in judged:
            attempts[result.task] = max(result.attempt, attempts.get(result.task, 0))
        running = ((task, self._running.get(task, 0)) for task in tasks)
        stale = [task for task, attempt in running if attempts.get(task, attempt) >= attempt]
        for task in stale:
            self._running.pop(task, None)
        return stale

    def hand_back(self, reason: str) -> list[plan_pb2.TaskResult]:
        """The trainer died: every attempt is released. Any may be why, which admission counts, but none of those
        that were off its device already."""
        held, results = list(self._running.items()), []
        num_suspects = sum(task not in self._off for task, _ in held)
        for task, attempt in held:
            released = plan_pb2.TaskReleased(reason=reason, num_suspects=0 if task in self._off else num_suspects)
            results.append(plan_pb2.TaskResult(task=task, attempt=attempt, released=released))
            self._end(task, attempt)
        self._resident, self._off = set(), set()
        return results

    def _end(self, task: str, attempt: int) -> None:
        self._ended[task] = max(attempt, self._ended.get(task, 0))
        if self._running.get(task) == attempt:
            del self._running[task]
