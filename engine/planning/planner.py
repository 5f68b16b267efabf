"""Which tasks are resident where, fused how. Pure: the same snapshot gives the same plan."""

from dataclasses import dataclass

from engine.errors import InvalidInputError
from engine.planning.cost.chunk_size import allowed_padding_tokens, choose_chunk
from engine.planning.cost.round_time import StepCost
from engine.planning.cost.task_demand import DemandEstimator, TaskDemand
from engine.planning.fusion.fusion import Fusion, Group, fuse, of_partition
from engine.planning.placement.executor_state import ClusterState, ExecutorState
from engine.planning.placement.explain import explain_residents
from engine.planning.placement.feasibility import refuse_if_never_fits
from engine.planning.placement.placement import Placement, place
from engine.planning.types import Explanation, HTask, Plan, PlannerConfig, Snapshot, TaskView

KEEP_WITHIN = 1.05  # hTasks that run are kept while their period is within this of the best


@dataclass(frozen=True)
class Decision:
    """What a plan is made of, before it is explained."""

    pool: ClusterState
    placement: Placement
    htasks: dict[str, tuple[HTask, ...]]
    refused: dict[str, str]  # can run nowhere, and why


def plan(snapshot: Snapshot, limits: PlannerConfig, appraiser: DemandEstimator | None = None) -> Plan:
    """One scheduling decision, explained. `appraiser` may live from plan to plan: it only remembers."""
    decision = decide(snapshot, limits, appraiser or DemandEstimator(limits))
    placement, hosts = decision.placement, decision.pool.hosts.values()
    waiting = {name: why for name, (_, why) in placement.waiting.items()} | decision.refused
    explanations = [
        *(told for host in hosts for told in explain_residents(host, decision.htasks[host.name], placement.reasons)),
        *(Explanation(name, "", (), why) for name, why in waiting.items()),
    ]
    return Plan(decision.htasks, tuple(explanations))


def decide(snapshot: Snapshot, limits: PlannerConfig, appraiser: DemandEstimator) -> Decision:
    """The decision, on one screen."""
    pool = ClusterState(
        (ExecutorState(e, limits) for e in snapshot.executors if not e.is_draining), snapshot.tenant_weights
    )
    # 1. Who runs stays where it is. Who can run nowhere says why.
    newcomers, refused = list[TaskDemand](), dict[str, str]()
    for task in sorted(snapshot.tasks, key=lambda task: (task.age, task.name)):
        need = _need(task, pool, limits, appraiser)
        if isinstance(need, str):
            refused[task.name] = need
        elif not _stays(need, pool):
            newcomers.append(need)
    pool.count()
    # 2. The others by fairness, where the round will be shortest; the rest waits.
    placement = place(pool, newcomers, limits.preempts)
    # 3. On each executor: which share microbatches, in what order.
    htasks = {name: _htasks(host, snapshot.running.get(name, ()), limits) for name, host in pool.hosts.items()}
    appraiser.forget_all_but({task.name for task in snapshot.tasks})
    return Decision(pool, placement, htasks, refused)


def _need(task: TaskView, pool: ClusterState, limits: PlannerConfig, appraiser: DemandEstimator) -> TaskDemand | str:
    """The need, or why no executor can meet it."""
    hosts = pool.of_backbone(task.spec.backbone)
    if not hosts:
        return f"no executor of backbone {task.spec.backbone} is ready"
    try:
        need = appraiser.need(task, hosts[0].executor.backbone)
        if not any(host.could_hold(need) for host in hosts):
            executors = [host.executor for host in hosts]
            refuse_if_never_fits(task.spec, executors, limits)
    except InvalidInputError as error:  # it fitted an executor that has left, or other operators
        return str(error)
    return need


def _stays(need: TaskDemand, pool: ClusterState) -> bool:
    """Puts a resident back where it is, oldest first, if it still fits there."""
    host = pool.hosts.get(need.task.executor)
    stays = host is not None and host.executor.backbone.name == need.task.spec.backbone and host.fits(need)
    if host is not None and stays:
        pool.keep(need, host)
    return stays


def _htasks(host: ExecutorState, running: tuple[HTask, ...], limits: PlannerConfig) -> tuple[HTask, ...]:
    """The best hTasks, or those that run where they serve the same tasks nearly as well (hysteresis)."""
    if not host.residents:
        return ()
    is_same = limits.fuses and {name for htask in running for name in htask.tasks} == host.residents.keys()
    if is_same and len(running) == host.executor.num_stages == 1:  # one hTask on one stage: there is nothing better
        return running
    jobs, stage = host.jobs(), host.stage()
    best = fuse(list(jobs.values()), stage) if limits.fuses else of_partition([[job] for job in jobs.values()], stage)
    if is_same:
        kept = of_partition([[jobs[name] for name in htask.tasks] for htask in running], stage)
        if kept.period_seconds <= KEEP_WITHIN * best.period_seconds:
            return running
    return _in_order(best, host, limits)


def _in_order(fusion: Fusion, host: ExecutorState, limits: PlannerConfig) -> tuple[HTask, ...]:
    """As the pipeline's template has them: sizes rising and falling; members oldest first."""
    rising = sorted(fusion.groups, key=lambda group: (group.microbatch_seconds, group.jobs[0].name))
    return tuple(_htask(group, host, limits) for group in rising[::2] + rising[1::2][::-1])


def _htask(group: Group, host: ExecutorState, limits: PlannerConfig) -> HTask:
    chunk = limits.chunk_tokens or _chunk(group, host)
    return HTask(_by_age(group.jobs, host), _token_budget(group, host, chunk), chunk)


def _chunk(group: Group, host: ExecutorState) -> int:
    """The largest whose padding costs little of the hTask's round."""
    tasks = [host.residents[job.name].ragged for job in group.jobs]
    tokens, seconds = sum(task.num_tokens for task in tasks), group.work_seconds * host.executor.num_stages
    allowed = allowed_padding_tokens(tokens, group.num_microbatches, seconds, host.profile)
    return choose_chunk(tasks, group.num_microbatches, allowed)


def _by_age(jobs: tuple[StepCost, ...], host: ExecutorState) -> tuple[str, ...]:
    return tuple(sorted((job.name for job in jobs), key=lambda name: (host.residents[name].task.age, name)))


def _token_budget(group: Group, host: ExecutorState, chunk: int) -> int:
    """So much that the round has about so many microbatches; on one stage all there is room for."""
    largest = host.stage().max_tokens
    if host.executor.num_stages == 1:
        return largest
    evenly = sum(job.num_tokens for job in group.jobs) / group.num_microbatches
    wanted = max(max(job.longest_tokens for job in group.jobs), evenly)
    return min(largest, -(-int(wanted) // chunk) * chunk)
