"""Plans which tasks run on which executor, and which share an hTask. Pure: the same snapshot gives the same plan."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.errors import InvalidInputError
from engine.planning.cost.chunk_size import allowed_padding_tokens, choose_chunk
from engine.planning.cost.round_time import StepCost
from engine.planning.cost.task_demand import DemandEstimator, TaskDemand
from engine.planning.fusion.fair_groups import KEEP_WITHIN, FairGroup
from engine.planning.fusion.fusion import FusedGroup, Fusion, fuse, fuse_as
from engine.planning.placement.executor_state import ClusterState, ExecutorState
from engine.planning.placement.explain import explain_residents
from engine.planning.placement.feasibility import refuse_if_never_fits
from engine.planning.placement.placement import Placement, place
from engine.planning.types import Explanation, HTask, Plan, PlannerConfig, Snapshot, TaskRate, TaskView


@dataclass(frozen=True)
class Decision:
    """A plan without its explanations. `rates`: of each resident; `refused`: tasks that no executor can run, with the
    reason."""

    cluster: ClusterState
    placement: Placement
    htasks: dict[str, tuple[HTask, ...]]
    rates: dict[str, TaskRate]
    refused: dict[str, str]


def plan(snapshot: Snapshot, config: PlannerConfig, estimator: DemandEstimator | None = None) -> Plan:
    """Return one scheduling decision, explained. An `estimator` kept from plan to plan is only a cache."""
    decision = decide(snapshot, config, estimator or DemandEstimator(config))
    placement, executors = decision.placement, decision.cluster.executors.values()
    waiting = {name: reason for name, (_, reason) in placement.waiting.items()} | decision.refused
    explanations = [
        *(e for executor in executors
          for e in explain_residents(executor, decision.htasks[executor.name], placement.reasons,
                                     snapshot.tenant_weights, decision.rates)),
        *(Explanation(name, "", (), reason) for name, reason in waiting.items()),
    ]  # fmt: skip
    return Plan(decision.htasks, tuple(explanations))


def decide(snapshot: Snapshot, config: PlannerConfig, estimator: DemandEstimator) -> Decision:
    """Decide in three steps: which tasks stay, where the others run, and which tasks of an executor share an hTask."""
    cluster = ClusterState(
        (ExecutorState(e, config) for e in snapshot.executors if not e.is_draining), snapshot.tenant_weights
    )
    # 1. A task that no executor can run is refused. A running task stays on its executor, the oldest first.
    newcomers, refused = list[TaskDemand](), dict[str, str]()
    for task in sorted(snapshot.tasks, key=lambda task: (task.age, task.name)):
        demand = estimate_demand(task, cluster, config, estimator)
        if isinstance(demand, str):
            refused[task.name] = demand
        elif not _keep_running(demand, cluster):
            newcomers.append(demand)
    cluster.count_hosts()
    # 2. Fairness decides which of the other tasks run, each where the round will be shortest. The rest wait.
    placement = place(cluster, newcomers, config.preempts)
    # 3. On each executor, tenants are grouped so that each gets its fair share of time, and the tasks of each group are
    #    fused into hTasks. Groups and hTasks that run nearly as well are kept.
    htasks, rates = dict[str, tuple[HTask, ...]](), dict[str, TaskRate]()
    for name, executor in cluster.executors.items():
        running = snapshot.running.get(name, ())
        groups = executor.groups(cluster.weights, _tenants_of(running, executor))
        htasks[name] = tuple(htask for group in groups for htask in _choose_htasks(executor, group, running, config))
        rates |= executor.rates(groups, executor.residents)
    estimator.forget_all_but({task.name for task in snapshot.tasks})
    return Decision(cluster, placement, htasks, rates, refused)


def estimate_demand(
    task: TaskView, cluster: ClusterState, config: PlannerConfig, estimator: DemandEstimator
) -> TaskDemand | str:
    """Return the task's demand, or the reason why no executor can run it. The estimator keeps both."""
    executors = cluster.of_backbone(task.spec.backbone)
    if not executors:
        return f"no executor of backbone {task.spec.backbone} is ready"
    sizes = cluster.sizes(task.spec.backbone)
    if reason := estimator.find_refusal(task, sizes):
        return reason
    try:
        demand = estimator.estimate(task, executors[0].view.backbone)
        if not any(executor.fits_alone(demand) for executor in executors):
            refuse_if_never_fits(task.spec, [executor.view for executor in executors], config)
    except InvalidInputError as error:  # the task was admitted for an executor that has left, or for other operators
        estimator.keep_refusal(task, sizes, str(error))
        return str(error)
    return demand


def is_estimated(task: TaskView, cluster: ClusterState, estimator: DemandEstimator) -> bool:
    """Return whether `estimate_demand` finds its answer in the estimator, and so takes no time."""
    executors = cluster.of_backbone(task.spec.backbone)
    if not executors or estimator.find_refusal(task, cluster.sizes(task.spec.backbone)):
        return True
    demand = estimator.find(task, executors[0].view.backbone)
    return demand is not None and any(executor.fits_alone(demand) for executor in executors)


def _keep_running(demand: TaskDemand, cluster: ClusterState) -> bool:
    """Add a running task to its executor if it still fits there. Return whether it was added."""
    executor = cluster.executors.get(demand.task.executor)
    if executor is None or executor.view.backbone.name != demand.task.spec.backbone or not executor.fits(demand):
        return False
    executor.add(demand)
    return True


def _tenants_of(htasks: Sequence[HTask], executor: ExecutorState) -> list[frozenset[str]]:
    """Return the tenants of each group of the running hTasks: hTasks with a tenant in common are of one group."""
    groups = list[set[str]]()
    for htask in htasks:
        tenants = {executor.residents[name].task.tenant for name in htask.tasks if name in executor.residents}
        apart = [group for group in groups if group.isdisjoint(tenants)]
        joined = tenants.union(*(group for group in groups if not group.isdisjoint(tenants)))
        groups = [*apart, joined]
    return [frozenset(group) for group in groups if group]


def _choose_htasks(
    executor: ExecutorState, fair: FairGroup, running: Sequence[HTask], config: PlannerConfig
) -> tuple[HTask, ...]:
    """Return the group's best hTasks, or the running ones if they serve the same tasks nearly as well (hysteresis)."""
    costs = {name: fair.step_cost(executor.residents[name], executor.profile) for name in fair.tokens}
    own = tuple(htask for htask in running if not costs.keys().isdisjoint(htask.tasks))
    is_same = config.fuses and sorted(name for htask in own for name in htask.tasks) == sorted(costs)
    if is_same and len(own) == executor.view.num_stages == 1:  # nothing is better than one hTask on one stage
        return tuple(_with_round_tokens(htask, fair, executor) for htask in own)
    stage = executor.stage()
    best = fuse(list(costs.values()), stage) if config.fuses else fuse_as([[c] for c in costs.values()], stage)
    if is_same:
        current = fuse_as([[costs[name] for name in htask.tasks] for htask in own], stage)
        if current.period_seconds <= KEEP_WITHIN * best.period_seconds:
            return tuple(_with_round_tokens(htask, fair, executor) for htask in own)
    return _in_order(best, fair, executor, config)


def _with_round_tokens(htask: HTask, fair: FairGroup, executor: ExecutorState) -> HTask:
    tokens = tuple(fair.round_tokens(executor.residents[name]) for name in htask.tasks)
    return replace(htask, round_tokens=tokens if any(tokens) else ())


def _in_order(fusion: Fusion, fair: FairGroup, executor: ExecutorState, config: PlannerConfig) -> tuple[HTask, ...]:
    """Return hTasks in the order of the pipeline's template: their microbatches' sizes rise, then fall."""
    rising = sorted(fusion.groups, key=lambda group: (group.microbatch_seconds, group.tasks[0].name))
    in_order = rising[::2] + rising[1::2][::-1]
    return tuple(_with_round_tokens(_build_htask(g, fair, executor, config), fair, executor) for g in in_order)


def _build_htask(group: FusedGroup, fair: FairGroup, executor: ExecutorState, config: PlannerConfig) -> HTask:
    chunk = config.chunk_tokens or _chunk(group, fair, executor)
    return HTask(_by_age(group.tasks, executor), _token_budget(group, executor, chunk), chunk)


def _chunk(group: FusedGroup, fair: FairGroup, executor: ExecutorState) -> int:
    """Return the largest chunk that adds little padding to the hTask's round."""
    demands = [executor.residents[task.name] for task in group.tasks]
    sequences = [demand.sequences.part(fair.part_of_step(demand)) for demand in demands]
    num_tokens = sum(lengths.num_tokens for lengths in sequences)
    seconds = group.work_seconds * executor.view.num_stages
    allowed = allowed_padding_tokens(num_tokens, group.num_microbatches, seconds, executor.profile)
    return choose_chunk(sequences, group.num_microbatches, allowed)


def _by_age(tasks: tuple[StepCost, ...], executor: ExecutorState) -> tuple[str, ...]:
    return tuple(sorted((task.name for task in tasks), key=lambda name: (executor.residents[name].task.age, name)))


def _token_budget(group: FusedGroup, executor: ExecutorState, chunk: int) -> int:
    """Return the budget with which a round has about `num_microbatches`; on one stage, all tokens that fit."""
    largest = executor.stage().max_tokens
    if executor.view.num_stages == 1:
        return largest
    evenly = sum(task.num_tokens for task in group.tasks) / group.num_microbatches
    wanted = max(max(task.longest_tokens for task in group.tasks), evenly)
    return min(largest, -(-int(wanted) // chunk) * chunk)
