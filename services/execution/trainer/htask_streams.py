"""The streams of the plan's hTasks: opened for the members that train now, and opened again when these change."""

import queue
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from engine.alignment.microbatch import Microbatch, MicrobatchKind, Range
from muxtune.v1 import plan_pb2
from services.execution.trainer.microbatch_stream import MicrobatchStream
from services.execution.trainer.plan_edits import split_off
from services.resource_names import tenant_of

_WAIT_SECONDS = 0.2  # for a microbatch, before the inbox is read again

OpenStream = Callable[[plan_pb2.HTask, list[str], bool], MicrobatchStream]  # the hTask, its members, whether to delay


@dataclass
class _OpenHTask:
    """An hTask with an open stream for `members`. `is_late`: its next microbatch has not come: others go first.

    `last_turn`: the number of the turn in which it ran last, to order hTasks of the same tenants.
    """

    members: list[str]
    tenants: list[str]
    stream: MicrobatchStream
    is_late: bool = False
    last_turn: int = 0


class HTaskStreams:
    """Streams by the hTask's index in the plan. A step goes on where it was when its stream is opened again."""

    def __init__(self, open_stream: OpenStream) -> None:
        self._open_stream = open_stream
        self.plan = plan_pb2.ExecutorPlan()
        self._open: dict[int, _OpenHTask] = {}
        self._tasks: dict[str, plan_pb2.PlannedTask] = {}  # of the plan
        self._is_in_step = False  # nothing has changed since `open_for`
        self._names: list[str] = []  # that `open_for` was called with
        self._sharing: list[set[str]] = []  # the tenants of each hTask that has several
        self._held: set[str] = set()  # tenants that had to wait
        self._turn = 0
        self._served: set[str] = set()  # tasks of which alignment has sent a microbatch
        self._interrupted: set[str] = set()  # tasks whose stream is opened again after a delay
        self._ended: set[str] = set()  # tasks whose last microbatch has come

    def adopt(self, plan: plan_pb2.ExecutorPlan) -> None:
        """Replaces the plan. An hTask keeps its stream if the new plan has it with the same members and layout."""
        kept = {_signature(self.plan.htasks[index], each.members): each for index, each in self._open.items()}
        self.plan, self._is_in_step = plan, False
        self._tasks = {task.task: task for task in plan.tasks}
        self._open = {}
        for index, htask in enumerate(plan.htasks):
            if (each := kept.pop(_signature(htask, htask.tasks), None)) is not None:
                self._open[index] = each
        for each in kept.values():
            each.stream.close()
        self._ended &= self._tasks.keys()
        self._served &= self._tasks.keys()
        self._interrupted &= self._tasks.keys()

    def open_for(self, names: list[str], hold: Callable[[Collection[str]], set[str]]) -> None:
        """Opens a stream for every hTask with members among `names`; again for one whose members have changed.

        `hold`: returns which of the tenants that share an hTask have to wait. Called before every turn, so it does
        nothing where nothing has changed.
        """
        if not self._is_in_step or names != self._names:
            groups = [{tenant_of(name) for name in htask.tasks} for htask in self.plan.htasks]
            self._sharing, self._is_in_step = [group for group in groups if len(group) > 1], False
        held = {tenant for tenants in self._sharing for tenant in hold(tenants)}
        if self._is_in_step and held == self._held:
            return
        self._names, self._held = names, held
        training = {name for name in names if tenant_of(name) not in held}
        for index, htask in enumerate(self.plan.htasks):
            self._open_or_keep(index, htask, [name for name in htask.tasks if name in training])
        self._is_in_step = True

    def _open_or_keep(self, index: int, htask: plan_pb2.HTask, members: list[str]) -> None:
        before = self._open.get(index)
        tenants = sorted({tenant_of(name) for name in members})
        if before is not None and members == [name for name in before.members if name not in self._ended]:
            before.members, before.tenants = members, tenants
            if members:
                return
        if before is not None:
            self.close(index)
        if members:
            is_interrupted = not self._interrupted.isdisjoint(members)
            stream = self._open_stream(htask, members, is_interrupted)
            last_turn = before.last_turn if before is not None else 0
            self._open[index] = _OpenHTask(members, tenants, stream, is_interrupted, last_turn)

    def choose(self, order: Callable[[list[str]], float]) -> int | None:
        """Returns the hTask whose tenants have the least `order`; a late one only if its microbatch has come, or if
        all are late. None if no stream is open."""
        indices = sorted(self._open, key=lambda index: (order(self._open[index].tenants), self._open[index].last_turn))
        ready = (index for index in indices if not self._open[index].is_late or self._open[index].stream.is_ready)
        return next(ready, indices[0] if indices else None)

    def members(self, index: int) -> list[str]:
        return self._open[index].members

    def tenants(self, index: int) -> list[str]:
        return self._open[index].tenants

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
            self._ended |= {range_.task for range_ in microbatch.ranges if self._is_last(microbatch.kind, range_)}
        return microbatch

    def _is_last(self, kind: MicrobatchKind, range_: Range) -> bool:
        """Returns whether no microbatch with tokens of the task follows."""
        task = self._tasks.get(range_.task)
        if task is None or not range_.is_last:
            return False
        if kind is MicrobatchKind.EVALUATE:
            return range_.step >= task.num_steps
        return range_.step + 1 >= task.num_steps and task.spec.training.heldout_fraction <= 0

    def close(self, index: int) -> list[str]:
        """Closes the hTask's stream. Returns its members."""
        each, self._is_in_step = self._open.pop(index), False
        each.stream.close()
        self._ended.difference_update(each.members)  # their last microbatch may come again
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


def _signature(htask: plan_pb2.HTask, members: Sequence[str]) -> tuple[object, ...]:
    """Returns what a stream of the hTask for these members depends on."""
    tokens = dict(zip(htask.tasks, htask.round_tokens, strict=False))
    round_tokens = tuple(tokens.get(name, 0) for name in members)
    return tuple(members), round_tokens, htask.token_budget, htask.chunk_tokens
