"""Groups of tenants on an executor: each tenant gets its share, and shares rounds only where it loses nothing."""

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Iterator

import pytest

from engine.methods import Lora
from engine.planning.cost.cost_model import base_seconds, extra_seconds
from engine.planning.cost.task_demand import DemandEstimator, TaskDemand
from engine.planning.fusion.fair_groups import (
    LEAST_GAIN,
    MAX_ROUND_MICROBATCHES,
    FairGroup,
    divide,
    task_rates,
    water_fill,
)
from engine.planning.types import BackboneView, CostProfile, PlannerConfig, Site, TaskView
from engine.task import TaskSpec, Training
from tests.thoroughness import seeds

BUDGET = 256
SITES = tuple(Site(f"layers.{i}.q_proj", 64, 64) for i in range(2))
BACKBONE = BackboneView("b", 10**6, 2, 64, 100, 512, 4 << 20, "float32", SITES)


def demand(tenant: str, index: int, tokens: float, heldout: float = 0.0) -> TaskDemand:
    training = Training(1e-3, num_steps=10, global_batch_size=8, max_sequence_tokens=512, heldout_fraction=heldout)
    spec = TaskSpec("b", Lora(4, 4.0, ("q_proj",)), "d", training)
    task = TaskView(f"{tenant}/tasks/{index}", tenant, spec, index, 10, num_train_tokens=round(10 * tokens))
    return DemandEstimator(PlannerConfig(token_budget=BUDGET, chunk_tokens=1)).estimate(task, BACKBONE)


def profile(fixed: float, knee: float) -> CostProfile:
    return CostProfile(fixed_seconds=fixed, token_seconds=1e-4, knee_tokens=knee, multiplication_seconds=1e-9)


def drawn(seed: int, max_tenants: int) -> tuple[list[TaskDemand], dict[str, float], CostProfile]:
    draw = random.Random(seed)
    names = [f"tenants/{i}" for i in range(draw.randint(1, max_tenants))]
    demands = [demand(name, i, 10 ** draw.uniform(1, 4)) for name in names for i in range(draw.choice([1, 1, 2, 20]))]
    weights = {name: draw.choice([1.0, 1.0, 2.0, 0.5]) for name in names}
    return demands, weights, profile(draw.choice([0.0, 0.003, 0.1]), draw.choice([0.0, 100.0, 250.0]))


def tokens_per_second(demands: list[TaskDemand], groups: tuple[FairGroup, ...], cost: CostProfile) -> dict[str, float]:
    """Return each tenant's tokens a second by definition: its tokens of a round over the group's seconds and share."""
    by_name, whole = {d.task.name: d for d in demands}, sum(group.weight for group in groups)
    rates: dict[str, float] = defaultdict(float)
    for group in groups:
        tokens = sum(group.tokens.values())
        extra = sum(
            extra_seconds(cost, by_name[name].step) * own / by_name[name].step.num_tokens
            for name, own in group.tokens.items()
        )
        seconds = base_seconds(cost, tokens, max(1, math.ceil(tokens / BUDGET - 1e-6))) + extra
        for name, own in group.tokens.items():
            rates[by_name[name].task.tenant] += group.weight / whole * own / seconds
    return rates


@pytest.mark.parametrize("seed", seeds(200, 60))
def test_every_tenant_has_its_share_and_loses_nothing_by_sharing(seed: int) -> None:
    demands, weights, cost = drawn(seed, 12)
    groups = divide(demands, weights, cost, BUDGET)
    assert sorted(name for group in groups for name in group.tokens) == sorted(d.task.name for d in demands)
    by_name = {d.task.name: d for d in demands}
    shares: dict[str, float] = defaultdict(float)
    for name, rate in task_rates(groups, by_name, cost, BUDGET).items():
        shares[by_name[name].task.tenant] += rate.device_share
    whole = sum(weights.values())
    assert shares == pytest.approx({name: weight / whole for name, weight in weights.items()}, rel=1e-6)
    apart = tuple(
        group
        for name in weights
        for group in divide([d for d in demands if d.task.tenant == name], weights, cost, BUDGET)
    )
    alone, together = tokens_per_second(demands, apart, cost), tokens_per_second(demands, groups, cost)
    assert all(together[name] >= LEAST_GAIN * alone[name] * (1 - 1e-6) for name in weights)
    for group in groups:
        assert sum(group.tokens.values()) <= MAX_ROUND_MICROBATCHES * BUDGET * (1 + 1e-6) + len(group.tenants)


@pytest.mark.parametrize("seed", seeds(60, 25))
def test_no_other_runs_of_tenants_have_more_tokens_a_second(seed: int) -> None:
    demands, weights, cost = drawn(seed, 6)
    best = sum(tokens_per_second(demands, divide(demands, weights, cost, BUDGET), cost).values())
    singles = divide_as(demands, weights, cost, [{name} for name in weights])
    alone = tokens_per_second(demands, singles, cost)
    tokens = {
        name: min(sum(d.step.num_tokens for d in demands if d.task.tenant == name), MAX_ROUND_MICROBATCHES * BUDGET)
        for name in weights
    }
    order = sorted(weights, key=lambda name: (tokens[name] / weights[name], name))
    for partition in partitions(sorted(weights)):
        rates = tokens_per_second(demands, divide_as(demands, weights, cost, partition), cost)
        if all(rates[name] >= LEAST_GAIN * alone[name] for name in weights):
            is_runs = all(sorted(group, key=order.index) == order_between(order, group) for group in partition)
            # In no order are all best groups runs: microbatches are whole, so sums of tokens matter.
            assert sum(rates.values()) <= best * ((1 + 1e-6) if is_runs else 1.25), partition


def order_between(order: list[str], group: set[str]) -> list[str]:
    places = [order.index(name) for name in group]
    return order[min(places) : max(places) + 1]


def divide_as(
    demands: list[TaskDemand], weights: dict[str, float], cost: CostProfile, partition: list[set[str]]
) -> tuple[FairGroup, ...]:
    """Return these groups: divide each on its own with a profile in which sharing always pays."""
    free = profile(1e6, 0.0)
    result: list[FairGroup] = []
    for group in partition:
        own = [d for d in demands if d.task.tenant in group]
        result += divide(own, weights, free, BUDGET, [frozenset(group)])
    return tuple(result)


def partitions(names: list[str]) -> Iterator[list[set[str]]]:
    """Yield every partition of a set."""
    if not names:
        yield []
        return
    first, rest = names[0], names[1:]
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            for partition in partitions([name for name in rest if name not in others]):
                yield [{first, *others}, *partition]


def test_a_small_task_beside_sixty_gets_half_of_the_time() -> None:
    demands = [demand("tenants/good", 0, 240), *(demand("tenants/bad", i, 240) for i in range(60))]
    groups = divide(demands, {}, profile(0.001, 0), BUDGET)
    rates = task_rates(groups, {d.task.name: d for d in demands}, profile(0.001, 0), BUDGET)
    alone = task_rates(divide(demands[:1], {}, profile(0.001, 0), BUDGET), {demands[0].task.name: demands[0]},
                       profile(0.001, 0), BUDGET)  # fmt: skip
    assert rates[demands[0].task.name].device_share == pytest.approx(0.5)
    assert rates[demands[0].task.name].seconds_per_step == pytest.approx(
        2 * alone[demands[0].task.name].seconds_per_step, rel=0.1
    )


def test_small_tasks_of_many_tenants_share_one_round() -> None:
    demands = [demand(f"tenants/{i}", i, 10 + i / 10) for i in range(20)]
    (group,) = divide(demands, {}, profile(0.001, 250), BUDGET)
    assert len(group.tenants) == 20


def test_an_evaluation_does_not_make_a_shared_round_long() -> None:
    demands = [demand("tenants/a", 0, 100, heldout=0.9), demand("tenants/b", 1, 100)]
    (group,) = divide(demands, {}, profile(0.001, 1000), BUDGET)
    assert group.round_tokens(demands[0]) == 8 * 512 and group.round_tokens(demands[1]) == 0


def test_running_groups_are_kept_until_others_are_clearly_better() -> None:
    demands = [demand("tenants/a", 0, 100), demand("tenants/b", 1, 200), demand("tenants/c", 2, 500)]
    running = [frozenset({"tenants/a"}), frozenset({"tenants/b", "tenants/c"})]

    def groups(fixed: float, knee: float, running: list[frozenset[str]]) -> list[frozenset[str]]:
        return [frozenset(group.tenants) for group in divide(demands, {}, profile(fixed, knee), BUDGET, running)]

    assert groups(0.003, 0, []) == [frozenset({"tenants/a", "tenants/b"}), frozenset({"tenants/c"})]
    assert groups(0.003, 0, running) == running
    assert len(groups(0.0, 0, running)) == 1


def test_a_group_of_which_no_two_tenants_share_an_htask_stays_a_group() -> None:
    """Found by test_a_plan_carried_out_is_planned_again: its hTasks look like groups of their own."""
    demands = [demand("tenants/a", 0, 100), demand("tenants/b", 1, 100)]
    apart = [frozenset({"tenants/a"}), frozenset({"tenants/b"})]
    assert len(divide(demands, {}, profile(0.0, 0), BUDGET, apart)) == 1


@pytest.mark.parametrize("seed", seeds(100, 100))
def test_water_is_filled_to_one_level(seed: int) -> None:
    draw = random.Random(seed)
    amounts = [draw.uniform(0, 10) for _ in range(draw.randint(1, 9))]
    total = draw.uniform(0, sum(amounts))
    shares = water_fill(amounts, total)
    assert sum(shares) == pytest.approx(total)
    level = max(shares)
    assert all(share == pytest.approx(min(amount, level)) for share, amount in zip(shares, amounts, strict=True))
