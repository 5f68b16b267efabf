"""Decides which tasks run, and where: weighted max-min fairness over tenants, by their share of device time.

The tenant with the least share (over its weight) goes next; among equals, the one whose next task has the earliest
deadline, then the oldest. Within a tenant: priority, then deadline, then age; a task that does not fit holds back its
tenant's later ones on that backbone, so that large tasks don't starve. A task goes where the round will be shortest.

Hysteresis: a running task stays, with three exceptions, none of which qualifies for its own reversal:
- a tenant's task of higher priority takes the place of that tenant's own tasks of lower priority;
- a tenant takes another's place only if it has no more than that one afterwards;
- an executor takes a task over from a busier one if its round, with it, is shorter by a quarter than the other's was.
A task that leaves is checkpointed as it was after its last step. A task that was evicted evicts no other in the same
plan, so that planning ends.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.planning.cost.task_demand import TaskDemand
from engine.planning.placement.executor_state import ClusterState, ExecutorState

MOVE_GAIN = 0.25
_MAX_VICTIMS = 4
_NEXT = "its tenant has the smallest share of device time, and the round is shortest here"
_FULL = "waits for memory: every executor of its backbone is full"
_CROWDED = "waits: every executor of its backbone has the largest number of tasks"
_QueueKey = tuple[str, str]  # tenant, backbone


@dataclass
class Placement:
    """The cluster after placement, with the reasons of tasks that were placed, evicted, or left waiting."""

    cluster: ClusterState
    reasons: dict[str, str] = field(default_factory=dict)
    evicted: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, tuple[TaskDemand, str]] = field(default_factory=dict)
    _victims: dict[str, tuple[int, list[tuple[float, str, str]]]] = field(default_factory=dict)

    def victims(self, executor: ExecutorState) -> list[tuple[float, str, str]]:
        """Return (share, tenant, name) of the executor's residents that may give way to another tenant: the largest
        share first, in it the lowest priority, then the newest. Computed once for each change of the cluster."""
        num_changes, victims = self._victims.get(executor.name, (-1, []))
        if num_changes != self.cluster.num_changes:
            tasks = [resident.task for name, resident in executor.residents.items() if name not in self.evicted]
            ordered = sorted(
                (-self.cluster.share(task.tenant), task.spec.priority, -task.age, task.name, task.tenant)
                for task in tasks
                if not task.is_cancelling
            )
            victims = [(-negative, tenant, name) for negative, _, _, name, tenant in ordered]
            self._victims[executor.name] = self.cluster.num_changes, victims
        return victims


def place(cluster: ClusterState, newcomers: Iterable[TaskDemand], preempts: bool = True) -> Placement:
    """Fill the cluster with newcomers and balance its executors, until neither changes anything."""
    placement, queued = Placement(cluster), list(newcomers)
    while True:
        _fill(placement, queued, preempts)
        if not _balance(placement):
            return placement
        queued = [demand for demand, _ in placement.waiting.values()]


def _fill(placement: Placement, newcomers: Iterable[TaskDemand], preempts: bool) -> None:
    """Place every newcomer on an executor, or leave it waiting."""
    cluster, queues = placement.cluster, _Queues(newcomers)
    while (demand := queues.next(cluster)) is not None:
        executor, victims, reason = _best_executor(cluster, demand), list[str](), _NEXT
        if executor is None and preempts and demand.task.name not in placement.evicted:
            executor, victims = _make_room(placement, demand)
            reason = f"takes the place of {', '.join(victims)}"
        if executor is None:
            queues.block(demand)
            continue
        for name in victims:
            queues.add(cluster.remove(name, executor))
            placement.evicted[name] = f"gave way to {demand.task.name}"
            placement.reasons.pop(name, None)
        if victims:
            queues.unblock()
        queues.remove(demand)
        cluster.add(demand, executor)
        placement.reasons[demand.task.name] = reason
    placement.waiting = {
        name: (demand, placement.evicted.get(name, reason))
        for name, (demand, reason) in queues.waiting(cluster).items()
    }


class _Queues:
    """Waiting tasks by tenant and backbone, each queue in its tenant's order. A blocked queue is passed over."""

    def __init__(self, demands: Iterable[TaskDemand]) -> None:
        self._queues: dict[_QueueKey, list[TaskDemand]] = {}
        self._blocked: set[_QueueKey] = set()
        self._turns: list[TaskDemand] = []  # heads of queues that are not blocked, the next one last
        self._sorted_at = -1  # the cluster's changes then
        for demand in demands:
            self.add(demand)

    def add(self, demand: TaskDemand) -> None:
        insort(self._queues.setdefault(_key(demand), []), demand, key=_order)

    def remove(self, demand: TaskDemand) -> None:
        self._queues[_key(demand)].remove(demand)

    def next(self, cluster: ClusterState) -> TaskDemand | None:
        """Return the demand whose turn it is. Shares change only with the cluster, so turns are sorted once for each
        change of it: while all executors are full, one queue after the other is blocked."""
        if self._sorted_at != cluster.num_changes:
            self._sorted_at = cluster.num_changes
            heads = [queue[0] for key, queue in self._queues.items() if queue and key not in self._blocked]
            heads.sort(key=lambda demand: (cluster.share(demand.task.tenant), *_order(demand)[1:]), reverse=True)
            self._turns = heads
        while self._turns and _key(self._turns[-1]) in self._blocked:
            self._turns.pop()
        return self._turns[-1] if self._turns else None

    def block(self, demand: TaskDemand) -> None:
        self._blocked.add(_key(demand))

    def unblock(self) -> None:
        self._blocked.clear()

    def waiting(self, cluster: ClusterState) -> dict[str, tuple[TaskDemand, str]]:
        """Return every waiting task with the reason."""
        result = {}
        for (_, backbone), queue in self._queues.items():
            is_crowded = all(executor.is_crowded for executor in cluster.of_backbone(backbone))
            reason = _CROWDED if is_crowded else _FULL
            for demand in queue:
                result[demand.task.name] = demand, reason
                reason = f"waits behind {queue[0].task.name}"
        return result


def _key(demand: TaskDemand) -> _QueueKey:
    return demand.task.tenant, demand.task.spec.backbone


def _order(demand: TaskDemand) -> tuple[float, float, float, str]:
    task = demand.task
    return -task.spec.priority, task.seconds_to_deadline, task.age, task.name


def _best_executor(cluster: ClusterState, demand: TaskDemand) -> ExecutorState | None:
    fitting = [executor for executor in cluster.of_backbone(demand.task.spec.backbone) if executor.fits(demand)]
    return min(fitting, key=lambda e: (e.load_seconds(demand), len(e.residents), e.name), default=None)


def _make_room(placement: Placement, demand: TaskDemand) -> tuple[ExecutorState | None, list[str]]:
    """Return the executor where the fewest tasks have to leave for this one, and their names, if that is fair."""
    cluster, options = placement.cluster, list[tuple[int, str, list[str]]]()
    for executor in cluster.of_backbone(demand.task.spec.backbone):
        candidates = _eviction_candidates(placement, executor, demand)
        for count in range(1, min(len(candidates), _MAX_VICTIMS) + 1):
            victims = candidates[:count]
            if executor.fits(demand, victims):
                if _is_fair(cluster, executor, demand, victims):
                    options.append((count, executor.name, victims))
                break
    if not options:
        return None, []
    _, name, victims = min(options)
    return cluster.executors[name], victims


def _eviction_candidates(placement: Placement, executor: ExecutorState, demand: TaskDemand) -> list[str]:
    """Return the first residents that may give way, in this order: tasks of the same tenant with a lower priority,
    lowest first; tasks of tenants with a larger share, largest first; newest first."""
    own = (executor.residents[name].task for name in executor.of_tenant(demand.task.tenant))
    lower = [
        (task.spec.priority, -task.age, task.name)
        for task in own
        if task.spec.priority < demand.task.spec.priority
        and not task.is_cancelling
        and task.name not in placement.evicted
    ]
    candidates = [name for *_, name in sorted(lower)]
    share = placement.cluster.share(demand.task.tenant)
    for victim_share, tenant, name in placement.victims(executor):
        if len(candidates) >= _MAX_VICTIMS or victim_share <= share:
            break
        if tenant != demand.task.tenant:
            candidates.append(name)
    return candidates


def _is_fair(cluster: ClusterState, executor: ExecutorState, demand: TaskDemand, victims: list[str]) -> bool:
    """Return whether every other tenant that gives way keeps at least the share of the tenant that it gives way to."""
    losers = {executor.residents[name].task.tenant for name in victims} - {demand.task.tenant}
    gained = cluster.share_after(demand.task.tenant, executor, demand, victims)
    return all(cluster.share_after(loser, executor, demand, victims) >= gained for loser in losers)


def _balance(placement: Placement) -> bool:
    """Move tasks from the busiest executor of each backbone while that pays. Return whether any task moved."""
    has_moved, cluster = False, placement.cluster
    for backbone in cluster.backbones():
        while (move := _best_move(cluster, backbone)) is not None:
            name, source, target = move
            cluster.add(cluster.remove(name, source), target)
            placement.reasons[name] = f"moved from {source.name}, which has a longer round"
            has_moved = True
    return has_moved


def _best_move(cluster: ClusterState, backbone: str) -> tuple[str, ExecutorState, ExecutorState] | None:
    """Return the move, from the executor of the longest round to that of the shortest, that shortens the longer one
    most."""
    executors = sorted(cluster.of_backbone(backbone), key=lambda e: (e.load_seconds(), e.name))
    if len(executors) < 2 or not executors[-1].residents:
        return None
    source, target = executors[-1], executors[0]
    limit = (1 - MOVE_GAIN) * source.load_seconds()
    moves = [
        (max(source.load_seconds(None, [name]), target.load_seconds(demand)), -demand.task.age, name)
        for name, demand in source.residents.items()
        if not demand.task.is_cancelling and target.load_seconds(demand) <= limit and target.fits(demand)
    ]
    return (min(moves)[-1], source, target) if moves else None
