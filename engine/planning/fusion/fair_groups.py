"""Decides whose tasks share rounds, and how many tokens each task adds to a round, so that tenants get fair time.

The executor divides its time among tenants by weight, turn by turn (`engine/planning/device_time.py`). A turn is a
microbatch of one group of tenants, and within a group tenants get time in proportion to the tokens that they add to a
round. So in a group each tenant adds tokens in proportion to its weight, and the tenant with the least to add, whose
tasks all take a whole step in each round, sets the size of the round:

    round(g)    = W(g) * min over t in g of N(t) / w(t)                      N(t) tokens of a step of all tasks of t
    rate(t, g)  = W(g) / W * round(g) / seconds(round(g)) * w(t) / W(g)      tokens a second

A larger group shares fixed costs and idle capacity under the knee, but makes rounds smaller for those with more to add.
So groups are as large as they can be while no tenant gets less than `LEAST_GAIN` of its rate in a group of its own:
sorted by N / w, groups are runs, and the best runs are found by dynamic programming in O(tenants^2). (Microbatches are
whole, so now and then other groups would have more tokens a second, by up to a quarter where capacity is idle.)
Legend: t tenants, G groups, I first tenants of a run.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.planning.cost.cost_model import base_seconds, extra_seconds
from engine.planning.cost.round_time import Floats, StepCost, all_base_seconds, fewest_microbatches
from engine.planning.cost.task_demand import TaskDemand
from engine.planning.types import CostProfile, TaskRate

LEAST_GAIN = 0.95  # of its rate in a group of its own that a tenant keeps in a shared group
KEEP_WITHIN = 1.05  # running groups, and running hTasks, are kept while the best are within this factor
_ROUNDING = 1e-6  # of numbers of steps and microbatches
MAX_ROUND_MICROBATCHES = 8  # a round has about so many at most; larger steps span rounds


@dataclass(frozen=True)
class TenantLoad:
    """A tenant's work in one round of its own: tokens, and the seconds that they cost whatever shares the round."""

    tenant: str
    weight: float
    num_tokens: float
    extra_seconds: float


@dataclass(frozen=True)
class FairGroup:
    """Tenants that share rounds. `tokens`: what each task adds to a round on average; `weight`: that of all tenants."""

    tenants: tuple[str, ...]
    weight: float
    tokens: Mapping[str, float]

    def part_of_step(self, demand: TaskDemand) -> float:
        """Return the part of a step that the task does in a round."""
        part = self.tokens[demand.task.name] / max(demand.step.num_tokens, 1e-12)
        return part if part < 1 - _ROUNDING else 1.0

    def step_cost(self, demand: TaskDemand, profile: CostProfile) -> StepCost:
        """Return what the task adds to a round, as fusion sees it."""
        cost, part = demand.step_cost(profile), self.part_of_step(demand)
        return replace(cost, num_tokens=cost.num_tokens * part, extra_seconds=cost.extra_seconds * part)

    def round_tokens(self, demand: TaskDemand) -> int:
        """Return the task's tokens in a round, for alignment. 0: a whole step, and the evaluation before it."""
        training, part = demand.task.spec.training, self.part_of_step(demand)
        if part < 1:
            return max(1, math.ceil(part * demand.sequences.num_tokens))
        if len(self.tenants) == 1 or training.heldout_fraction <= 0:
            return 0
        longest = max(demand.sequences.lengths, default=training.max_sequence_tokens)
        return training.global_batch_size * longest  # no step is longer, but an evaluation may be


def divide(
    demands: Iterable[TaskDemand],
    weights: Mapping[str, float],
    profile: CostProfile,
    microbatch_tokens: int,
    running: Collection[frozenset[str]] = (),
) -> tuple[FairGroup, ...]:
    """Return the groups of an executor's residents.

    `running`: the tenants of each group that runs now, as far as their hTasks show it: a group of which no two tenants
    share an hTask appears as several. Running groups are kept while the best have hardly more tokens a second.
    """
    by_tenant: dict[str, list[TaskDemand]] = defaultdict(list)
    for demand in demands:
        by_tenant[demand.task.tenant].append(demand)
    if not by_tenant:
        return ()
    most = float(MAX_ROUND_MICROBATCHES * microbatch_tokens)
    loads = [_load(name, weights.get(name, 1.0), own, profile, most) for name, own in by_tenant.items()]
    loads.sort(key=lambda load: (load.num_tokens / load.weight, load.tenant))
    rates = _RunRates(loads, profile, microbatch_tokens)
    starts, rate = rates.best_runs()
    kept = _runs_of(loads, running)
    if kept is not None and not set(starts) <= set(kept) and rates.total(kept) * KEEP_WITHIN >= rate:
        starts = kept
    runs = [loads[first:last] for first, last in zip(starts, [*starts[1:], len(loads)], strict=True)]
    return tuple(_group(run, by_tenant, most) for run in runs)


def task_rates(
    groups: Sequence[FairGroup],
    residents: Mapping[str, TaskDemand],
    profile: CostProfile,
    microbatch_tokens: int,
    num_stages: int = 1,
) -> dict[str, TaskRate]:
    """Return each task's share of the executor, and the seconds from one of its steps to the next."""
    whole, rates = sum(group.weight for group in groups), dict[str, TaskRate]()
    for group in groups:
        share, tokens = group.weight / whole, sum(group.tokens.values())
        parts = {name: group.part_of_step(residents[name]) for name in group.tokens}
        extra = sum(part * extra_seconds(profile, residents[name].step) for name, part in parts.items())
        seconds = base_seconds(profile, tokens, max(1, math.ceil(tokens / microbatch_tokens - _ROUNDING))) + extra
        between = {name: residents[name].seconds_between_steps(profile, microbatch_tokens) for name in parts}
        for name, part in parts.items():
            # Tenants that share rounds do not wait for each other's evaluations; tasks of one tenant do.
            own = group.tokens[name] / max(tokens, 1e-12)
            own_round = max(part, 1e-12) * between[name] / max(own, 1e-12)
            waited = own_round if len(group.tenants) > 1 else sum(parts[other] * between[other] for other in parts)
            step_seconds = (seconds + waited) / num_stages / share / max(part, 1e-12)
            rates[name] = TaskRate(share * own, step_seconds)
    return rates


def water_fill(amounts: Sequence[float], total: float) -> list[float]:
    """Divide `total` as equally as possible among takers that can use at most `amounts` each (max-min fairness)."""
    shares, left = [0.0] * len(amounts), total
    order = sorted(range(len(amounts)), key=lambda i: amounts[i])
    for position, i in enumerate(order):
        shares[i] = min(amounts[i], left / (len(order) - position))
        left -= shares[i]
    return shares


def _load(tenant: str, weight: float, demands: Sequence[TaskDemand], profile: CostProfile, most: float) -> TenantLoad:
    tokens = sum(demand.step.num_tokens for demand in demands)
    extra = sum(extra_seconds(profile, demand.step) for demand in demands)
    part = min(1.0, most / tokens) if tokens else 1.0
    return TenantLoad(tenant, weight, max(1.0, tokens * part), extra * part)


def _group(run: Sequence[TenantLoad], demands: Mapping[str, Sequence[TaskDemand]], most: float) -> FairGroup:
    weight = sum(load.weight for load in run)
    per_weight = min(run[0].num_tokens / run[0].weight, most / weight)
    tokens: dict[str, float] = {}
    for load in run:
        own = demands[load.tenant]
        shares = water_fill([demand.step.num_tokens for demand in own], per_weight * load.weight)
        tokens.update({demand.task.name: share for demand, share in zip(own, shares, strict=True)})
    return FairGroup(tuple(load.tenant for load in run), weight, tokens)


def _runs_of(loads: Sequence[TenantLoad], groups: Collection[frozenset[str]]) -> list[int] | None:
    """Return the first tenant of each run if the groups hold just these tenants and each is a run; else None."""
    starts, number = [], {tenant: index for index, group in enumerate(groups) for tenant in group}
    if number.keys() != {load.tenant for load in loads} or sum(map(len, groups)) != len(loads):
        return None
    for i, load in enumerate(loads):
        if i == 0 or number[load.tenant] != number[loads[i - 1].tenant]:
            starts.append(i)
    return starts if len(starts) == len(groups) else None


class _RunRates:
    """Tokens a second of runs of tenants, sorted by their tokens over weight. All rates are over the whole weight."""

    def __init__(self, loads: Sequence[TenantLoad], profile: CostProfile, microbatch_tokens: int) -> None:
        self._profile, self._microbatch_tokens = profile, np.array(float(microbatch_tokens))
        self._most_tokens = MAX_ROUND_MICROBATCHES * microbatch_tokens
        self._weight_t = np.array([load.weight for load in loads])
        self._tokens_t = np.array([load.num_tokens / load.weight for load in loads])  # over weight
        self._extra_t = np.array([load.extra_seconds / load.num_tokens for load in loads])  # of a token
        self._weights_before = np.concatenate([[0.0], np.cumsum(self._weight_t)])
        self._extra_before = np.concatenate([[0.0], np.cumsum(self._weight_t * self._extra_t)])
        self._alone_t = np.array([self.rates(i, i)[0] for i in range(len(loads))])  # over weight

    def rates(self, last: int, first: int = 0) -> Floats:
        """Return the rate of a tenant of weight 1 in the runs from I = `first`, ..., `last` to `last` [I]."""
        weight_I = self._weights_before[last + 1] - self._weights_before[first : last + 1]
        extra_I = self._extra_before[last + 1] - self._extra_before[first : last + 1]
        tokens_I = np.minimum(self._tokens_t[first : last + 1], self._most_tokens / weight_I)
        number_I = fewest_microbatches(tokens_I * weight_I, self._microbatch_tokens)
        seconds_I = all_base_seconds(self._profile, tokens_I * weight_I, number_I) + tokens_I * extra_I
        rate_I: Floats = weight_I * tokens_I / np.maximum(seconds_I, 1e-12)
        return rate_I

    def best_runs(self) -> tuple[list[int], float]:
        """Return the first tenant of each of the best runs, and the sum of all tenants' rates."""
        count = len(self._weight_t)
        best, start = [0.0] + [-math.inf] * count, [0] * (count + 1)
        for last in range(count):
            rate_I = self.rates(last)
            needed_I = np.maximum.accumulate(self._alone_t[: last + 1][::-1])[::-1]  # of the fastest in the run
            weight_I = self._weights_before[last + 1] - self._weights_before[: last + 1]
            is_fair_I = rate_I >= LEAST_GAIN * needed_I
            is_fair_I[last] = True
            total_I = np.where(is_fair_I, np.array(best[: last + 1]) + weight_I * rate_I, -math.inf)
            start[last + 1] = int((total_I >= total_I.max() * (1 - 1e-9)).argmax())  # the longest run among equals
            best[last + 1] = float(total_I[start[last + 1]])
        starts, end = list[int](), count
        while end:
            end = start[end]
            starts.append(end)
        return starts[::-1], best[count]

    def total(self, starts: Sequence[int]) -> float:
        """Return the sum of all tenants' rates in these runs; 0 if a tenant would lose by one of them."""
        total = 0.0
        for first, end in zip(starts, [*starts[1:], len(self._weight_t)], strict=True):
            rate = float(self.rates(end - 1, first)[0])
            if end - first > 1 and rate * KEEP_WITHIN < LEAST_GAIN * self._alone_t[first:end].max():
                return 0.0
            total += float(self._weights_before[end] - self._weights_before[first]) * rate
        return total
