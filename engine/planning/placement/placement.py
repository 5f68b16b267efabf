"""Who runs, and where: weighted max-min fairness over tenants, by their share of device time.

The tenant with the least share (over its weight) goes next; among equals, the one whose next task has the earliest
deadline, then the oldest. Within a tenant: priority, then deadline, then age; a task that finds no room holds back its
tenant's later ones on that backbone, so that large tasks don't starve. A task goes where the round will be shortest.

Hysteresis. Who runs stays, but for three cases, none of which qualifies for its own undoing:
- a tenant's task of higher priority takes the place of that tenant's own tasks of lower priority;
- a tenant takes another's place only if it has no more than that one afterwards;
- an executor takes a task over from a busier one if its round, with it, is shorter by a quarter than the other's was.
A task that leaves does so at its round's end, checkpointed: nothing is lost. A task that had to leave makes no other
leave in the same plan, so that planning ends.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.planning.cost.task_demand import TaskDemand
from engine.planning.placement.executor_state import ClusterState, ExecutorState

MOVE_GAIN = 0.25
_MAX_VICTIMS = 4
_TURN = "its tenant's turn, and the shortest round"
_FULL = "waits for memory: every executor of its backbone is full"
_Key = tuple[str, str]  # tenant, backbone


@dataclass
class Placement:
    """Who is where, why those came that are new there, why those left that had to, and why others wait."""

    pool: ClusterState
    reasons: dict[str, str] = field(default_factory=dict)
    evicted: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, tuple[TaskDemand, str]] = field(default_factory=dict)


def place(pool: ClusterState, newcomers: Iterable[TaskDemand], preempts: bool = True) -> Placement:
    """Fills the pool, then evens it out, until neither finds anything to do."""
    made, queued = Placement(pool), list(newcomers)
    while True:
        _fill(made, queued, preempts)
        if not _even_out(made):
            return made
        queued = [need for need, _ in made.waiting.values()]


def _fill(made: Placement, newcomers: Iterable[TaskDemand], preempts: bool) -> None:
    """Every newcomer ends on a host, or waiting."""
    pool, queues = made.pool, _Queues(newcomers)
    while (need := queues.next(pool)) is not None:
        host, victims, why = _best_host(pool, need), list[str](), _TURN
        if host is None and preempts and need.task.name not in made.evicted:
            host, victims = _make_room(made, need)
            why = f"takes the place of {', '.join(victims)}"
        if host is None:
            queues.block(need)
            continue
        for name in victims:
            queues.add(pool.take(name, host))
            made.evicted[name] = f"gave way to {need.task.name}"
            made.reasons.pop(name, None)
        if victims:
            queues.unblock()
        queues.remove(need)
        pool.put(need, host)
        made.reasons[need.task.name] = why
    made.waiting = {name: (need, made.evicted.get(name, why)) for name, (need, why) in queues.waiting().items()}


class _Queues:
    """Who waits, by tenant and backbone, each in its tenant's order. Of a blocked queue none is next."""

    def __init__(self, needs: Iterable[TaskDemand]) -> None:
        self._queues: dict[_Key, list[TaskDemand]] = {}
        self._blocked: set[_Key] = set()
        for need in needs:
            self.add(need)

    def add(self, need: TaskDemand) -> None:
        insort(self._queues.setdefault(_key(need), []), need, key=_order)

    def remove(self, need: TaskDemand) -> None:
        self._queues[_key(need)].remove(need)

    def next(self, pool: ClusterState) -> TaskDemand | None:
        heads = [queue[0] for key, queue in self._queues.items() if queue and key not in self._blocked]
        return min(heads, key=lambda need: (pool.share(need.task.tenant), *_order(need)[1:]), default=None)

    def block(self, need: TaskDemand) -> None:
        self._blocked.add(_key(need))

    def unblock(self) -> None:
        self._blocked.clear()

    def waiting(self) -> dict[str, tuple[TaskDemand, str]]:
        queues = [queue for queue in self._queues.values() if queue]
        behind = {need.task.name: f"waits behind {queue[0].task.name}" for queue in queues for need in queue[1:]}
        return {need.task.name: (need, behind.get(need.task.name, _FULL)) for queue in queues for need in queue}


def _key(need: TaskDemand) -> _Key:
    return need.task.tenant, need.task.spec.backbone


def _order(need: TaskDemand) -> tuple[float, float, float, str]:
    task = need.task
    return -task.spec.priority, task.seconds_to_deadline, task.age, task.name


def _best_host(pool: ClusterState, need: TaskDemand) -> ExecutorState | None:
    fitting = [host for host in pool.of_backbone(need.task.spec.backbone) if host.fits(need)]
    return min(fitting, key=lambda host: (host.load_seconds(need), len(host.residents), host.name), default=None)


def _make_room(made: Placement, need: TaskDemand) -> tuple[ExecutorState | None, list[str]]:
    """The host where the fewest have to leave for it, and who, if they may be asked to."""
    found: list[tuple[int, str, list[str]]] = []
    for host in made.pool.of_backbone(need.task.spec.backbone):
        candidates = _who_may_leave(made, host, need)
        for count in range(1, min(len(candidates), _MAX_VICTIMS) + 1):
            victims = candidates[:count]
            if host.fits(need, victims):
                if _is_fair(made.pool, host, need, victims):
                    found.append((count, host.name, victims))
                break
    if not found:
        return None, []
    _, name, victims = min(found)
    return made.pool.hosts[name], victims


def _who_may_leave(made: Placement, host: ExecutorState, need: TaskDemand) -> list[str]:
    """The tenant's own of lower priority, lowest first, then those of tenants with more, most first; newest first."""
    pool, tenant = made.pool, need.task.tenant
    share, candidates = pool.share(tenant), []
    for name, resident in host.residents.items():
        task = resident.task
        is_lower = task.tenant == tenant and task.spec.priority < need.task.spec.priority
        has_more = task.tenant != tenant and pool.share(task.tenant) > share
        if (is_lower or has_more) and not task.is_cancelling and name not in made.evicted:
            candidates.append((has_more, -pool.share(task.tenant), task.spec.priority, -task.age, name))
    return [name for *_, name in sorted(candidates)]


def _is_fair(pool: ClusterState, host: ExecutorState, need: TaskDemand, victims: list[str]) -> bool:
    """Whether no other tenant that gives way is left with less than the one it gives way to."""
    losers = {host.residents[name].task.tenant for name in victims} - {need.task.tenant}
    gained = pool.share_if(need.task.tenant, host, need, victims)
    return all(pool.share_if(loser, host, need, victims) >= gained for loser in losers)


def _even_out(made: Placement) -> bool:
    """Moves tasks from the busiest executor of a backbone while that pays; whether any moved."""
    has_moved = False
    for backbone in made.pool.backbones():
        while (move := _best_move(made.pool, backbone)) is not None:
            name, source, target = move
            made.pool.put(made.pool.take(name, source), target)
            made.reasons[name] = f"moved from {source.name}, whose round is longer"
            has_moved = True
    return has_moved


def _best_move(pool: ClusterState, backbone: str) -> tuple[str, ExecutorState, ExecutorState] | None:
    """From the host of the longest round to that of the shortest, the task that shortens the longer most."""
    hosts = sorted(pool.of_backbone(backbone), key=lambda host: (host.load_seconds(), host.name))
    if len(hosts) < 2 or not hosts[-1].residents:
        return None
    source, target = hosts[-1], hosts[0]
    limit = (1 - MOVE_GAIN) * source.load_seconds()
    moves = [
        (max(source.load_seconds(None, [name]), target.load_seconds(need)), -need.task.age, name)
        for name, need in source.residents.items()
        if not need.task.is_cancelling and target.load_seconds(need) <= limit and target.fits(need)
    ]
    return (min(moves)[-1], source, target) if moves else None
