"""Reads the ledger: snapshots page by page, and the specs of tasks that are new since the last snapshot.

A spec never changes, so that its task's part that planning needs is kept from snapshot to snapshot; tasks whose parts
are equal share one.
"""

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from engine.errors import InvalidInputError
from muxtune.v1 import ledger_pb2, ledger_pb2_grpc, plan_pb2
from services.conversion.plan import PlanningSpec, planning_fields, stored_spec_to_planning

_NAMES_OF_A_CALL = 1000  # the ledger accepts no more
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LedgerSnapshot:
    """The ledger at one time: unfinished tasks, oldest first, and executors with a lease.

    `specs`: by task, what planning needs of its spec. `unreadable`: why a task has none; it cannot be planned.
    """

    tasks: Sequence[ledger_pb2.SnapshotTask] = ()
    executors: Sequence[plan_pb2.Executor] = ()
    plan_version: int = 0
    specs: Mapping[str, PlanningSpec] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)


class LedgerReader:
    """Reads for one scheduler."""

    def __init__(self, ledger: "ledger_pb2_grpc.LedgerServiceAsyncStub") -> None:
        self._ledger = ledger
        self._specs: dict[str, PlanningSpec] = {}
        self._unreadable: dict[str, str] = {}
        self._shared: WeakValueDictionary[bytes, PlanningSpec] = WeakValueDictionary()

    async def read_snapshot(self) -> LedgerSnapshot:
        """Return a new snapshot. Raises SupersededError if it was gone before its last page was read."""
        tasks, executors, token = list[ledger_pb2.SnapshotTask](), list[plan_pb2.Executor](), ""
        while True:
            page = await self._ledger.GetSnapshot(ledger_pb2.GetSnapshotRequest(page_token=token))
            tasks += page.tasks
            executors += page.executors
            if not (token := page.next_page_token):
                break
        names = [entry.task.name for entry in tasks]
        await self._learn([name for name in names if name not in self._specs and name not in self._unreadable])
        specs, unreadable = self._specs, self._unreadable
        self._specs = {name: specs[name] for name in names if name in specs}
        self._unreadable = {name: unreadable[name] for name in names if name in unreadable}
        return LedgerSnapshot(tasks, executors, page.plan_version, self._specs, self._unreadable)

    async def read_specs(self, names: Sequence[str]) -> AsyncIterator[ledger_pb2.StoredTaskSpec]:
        """Yield the whole specs of these tasks, as they are stored; nothing for a name of no task."""
        start = 0
        while start < len(names):
            request = ledger_pb2.BatchGetTaskSpecsRequest(tasks=names[start : start + _NAMES_OF_A_CALL])
            answer = await self._ledger.BatchGetTaskSpecs(request)
            for stored in answer.specs:
                yield stored
            start += max(1, answer.num_read)

    def forget(self, task: str) -> None:
        """Have the next snapshot read the task's spec again."""
        self._specs.pop(task, None)

    async def _learn(self, names: Sequence[str]) -> None:
        """Read what planning needs of these tasks' specs."""
        missing = set(names)
        async for stored in self.read_specs(names):
            missing.discard(stored.task)
            try:
                if stored.unreadable:
                    raise InvalidInputError(stored.unreadable)
                self._specs[stored.task] = self._share(stored)
            except InvalidInputError as error:
                self._report_unreadable(stored.task, error.message)
        for name in missing:
            self._report_unreadable(name, "the ledger has no spec of it")

    def _share(self, stored: ledger_pb2.StoredTaskSpec) -> PlanningSpec:
        needed = planning_fields(stored)
        key = needed.SerializeToString(deterministic=True)
        if (planning := self._shared.get(key)) is None:
            planning = self._shared[key] = stored_spec_to_planning(needed)
        return planning

    def _report_unreadable(self, task: str, reason: str) -> None:
        """One task that cannot be read must not stop the others: it waits, and says why."""
        _log.error("%s cannot be planned, other tasks are: %s", task, reason)
        self._unreadable[task] = reason
