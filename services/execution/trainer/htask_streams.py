"""The streams of the plan's hTasks: opened for the members that train now, and opened again when these change."""

import queue
from collections.abc import Callable, Collection
from dataclasses import dataclass

from engine.alignment.microbatch import Microbatch
from muxtune.v1 import plan_pb2
from services.execution.trainer.microbatch_stream import MicrobatchStream
from services.execution.trainer.plan_edits import split_off

_WAIT_SECONDS = 0.2  # for a microbatch, before the inbox is read again

OpenStream = Callable[[plan_pb2.HTask, list[str], bool], MicrobatchStream]  # the hTask, its members, whether to delay


@dataclass
class _OpenHTask:
    """An hTask with an open stream for `members`. `is_late`: its next microbatch has not come: others go first.

    `last_turn`: the number of the turn in which it ran last, to order hTasks of the same tenants.
    """

    members: list[str]
    stream: MicrobatchStream
    is_late: bool = False
    last_turn: int = 0


class HTaskStreams:
    """Streams by the hTask's index in the plan. A step goes on where it was when its stream is opened again."""

    def __init__(self, open_stream: OpenStream) -> None:
        self._open_stream = open_stream
        self.plan = plan_pb2.ExecutorPlan()
        self._open: dict[int, _OpenHTask] = {}
        self._turn = 0
        self._served: set[str] = set()  # tasks of which alignment has sent a microbatch
        self._interrupted: set[str] = set()  # tasks whose stream is opened again after a delay

    def adopt(self, plan: plan_pb2.ExecutorPlan) -> None:
        """Replaces the plan. hTasks that are in both plans keep their streams."""
        kept = {_signature(self.plan.htasks[index]): each for index, each in self._open.items()}
        self.plan = plan
        self._open = {
            index: kept.pop(_signature(htask)) for index, htask in enumerate(plan.htasks) if _signature(htask) in kept
        }
        for each in kept.values():
            each.stream.close()
        planned = {task.task for task in plan.tasks}
        self._served &= planned
        self._interrupted &= planned

    def open_for(self, names: Collection[str]) -> None:
        """Opens a stream for every hTask with members among `names`; again for one whose members have changed."""
        training = set(names)
        for index, htask in enumerate(self.plan.htasks):
            members = [name for name in htask.tasks if name in training]
            before = self._open.get(index)
            if before is not None and before.members == members:
                continue
            if before is not None:
                self.close(index)
            if members:
                is_interrupted = not self._interrupted.isdisjoint(members)
                stream = self._open_stream(htask, members, is_interrupted)
                last_turn = before.last_turn if before is not None else 0
                self._open[index] = _OpenHTask(members, stream, is_interrupted, last_turn)

    def choose(self, order: Callable[[list[str]], float]) -> int | None:
        """Returns the hTask whose members have the least `order`; a late one only if its microbatch has come, or if
        all are late. None if no stream is open."""
        indices = sorted(self._open, key=lambda index: (order(self._open[index].members), self._open[index].last_turn))
        ready = (index for index in indices if not self._open[index].is_late or self._open[index].stream.is_ready)
        return next(ready, indices[0] if indices else None)

    def members(self, index: int) -> list[str]:
        return self._open[index].members

    def next(self, index: int) -> Microbatch | None:
        """Returns the hTask's next microbatch, for which it waits a moment; None at the end of its stream.

        Raises queue.Empty if it is late, and alignment's error.
        """
        each = self._open[index]
        self._turn += 1
        each.last_turn = self._turn
        try:
            microbatch = each.stream.next(_WAIT_SECONDS)
        except queue.Empty:
            each.is_late = True
            raise
        each.is_late = False
        if microbatch is not None:
            names = {range_.task for range_ in microbatch.ranges}
            self._served |= names
            self._interrupted -= names
        return microbatch

    def close(self, index: int) -> list[str]:
        """Closes the hTask's stream. Returns its members."""
        each = self._open.pop(index)
        each.stream.close()
        return each.members

    def close_all(self) -> None:
        """Closes all streams and forgets the plan."""
        self.adopt(plan_pb2.ExecutorPlan())

    def interrupt(self, index: int) -> None:
        """Opens the stream again after a delay, because it failed.

        A member that alignment has never served may be the cause, so those it has served do not wait for it.
        """
        members = self.close(index)
        unserved = [name for name in members if name not in self._served]
        if 0 < len(unserved) < len(members):
            split_off(self.plan, index, unserved)
            members = unserved
        self._interrupted.update(members)


def _signature(htask: plan_pb2.HTask) -> bytes:
    return htask.SerializeToString(deterministic=True)
