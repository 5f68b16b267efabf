"""Which tasks share microbatches: a partition of an executor's tasks into hTasks, by dynamic programming.

A period is the time in which every task takes one optimizer step. With the work and the latency of each hTask's round
(`round_time.py`)

    period = max(sum of work, largest latency)

Fusing saves fixed costs and idle tokens under the knee; splitting fills pipelines. For a bound on the latency the least
work is a shortest path over groups, so the period is found by bisection over that bound. Groups are all subsets for few
tasks (exact), and for many the intervals of several orders of the tasks, among them the paper's, sorted by tokens. No
order of the tasks has every best partition among its intervals (sums have to fill whole microbatches, which is a
problem of packing), so what was found is polished by local search until it is close to a bound below any partition.
Legend: G groups, J choices of a group's number of microbatches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.planning.cost.round_time import StageModel, StepCost, round_times
from engine.planning.fusion.local_search import arranged, regrouped
from engine.planning.fusion.task_groups import Given, Groups, Intervals, Subsets

EXACT_TASKS = 10
_TOLERANCE = 1e-3  # of the bisection, relative
_TIE = 1e-9  # of the largest work, for each group: of equals, the fewest hTasks
_CLOSE = 2e-3  # to the lower bound: good enough
_TRIES, _PAIRS = 12, 8_000  # of polishing: at most so many, and so many pairs of tasks looked at
_AIMS = (0.0, 0.75)  # from the lower bound to the best so far


@dataclass(frozen=True)
class Group:
    """Jobs fused into one hTask: `num_microbatches` a round, each stage busy for `work_seconds` a round."""

    jobs: tuple[StepCost, ...]
    num_microbatches: int
    work_seconds: float
    latency_seconds: float

    @property
    def microbatch_seconds(self) -> float:
        return self.work_seconds / self.num_microbatches


@dataclass(frozen=True)
class Fusion:
    """A partition, and the seconds in which each task takes one step."""

    groups: tuple[Group, ...]
    period_seconds: float

    @property
    def partition(self) -> list[tuple[StepCost, ...]]:
        return [group.jobs for group in self.groups]


def fuse(jobs: Sequence[StepCost], stage: StageModel) -> Fusion:
    """The partition of least period. Raises ValueError if a sequence is longer than a microbatch may be."""
    if not jobs:
        return Fusion((), 0.0)
    if len(jobs) <= EXACT_TASKS:
        return _best_of_groups(Subsets(jobs, stage), stage)
    return fuse_many(jobs, stage)


def fuse_many(jobs: Sequence[StepCost], stage: StageModel) -> Fusion:
    """The same where all subsets are too many: near the least, in polynomial time. Raises as `fuse`."""
    by_tokens = sorted(jobs, key=lambda job: (job.num_tokens, job.name))
    by_bytes = sorted(jobs, key=lambda job: (stage.held_tokens(job.token_bytes), job.num_tokens, job.name))
    orders = [by_tokens, by_bytes, _balanced(by_tokens)] if stage.num_stages > 1 else [by_bytes]
    return _polished([_best_of_groups(Intervals(order, stage), stage) for order in orders], jobs, stage)


def of_partition(partition: Sequence[Sequence[StepCost]], stage: StageModel) -> Fusion:
    """A given partition, with the numbers of microbatches that serve it best. Raises as `fuse`."""
    return _best_of_groups(Given(partition, stage), stage)


def lower_bound_seconds(jobs: Sequence[StepCost], stage: StageModel) -> float:
    """No partition has a shorter period: all tokens in the fewest microbatches there can be, on every stage; and no
    hTask's round is shorter than that of any one of its tasks alone."""
    if not jobs:
        return 0.0
    tokens = sum(job.num_tokens for job in jobs)
    fewest = max(1, math.ceil(tokens / max(stage.held_tokens(job.token_bytes) for job in jobs) - 1e-9))
    work = stage.profile.base_seconds(tokens, fewest) + sum(job.extra_seconds for job in jobs)
    alone = Given([[job] for job in jobs], stage)
    rounds = round_times(alone.tokens_G, alone.extra_G, alone.held_G, alone.longest_G, stage)
    return max(work / stage.num_stages, float(rounds.latency_XJ.min(axis=1).max()))


def _balanced(jobs: Sequence[StepCost]) -> list[StepCost]:
    """Large and small in turn, so that intervals of few jobs can hold like sums."""
    return [job for pair in zip(reversed(jobs), jobs, strict=True) for job in pair][: len(jobs)]


def _polished(starts: Sequence[Fusion], jobs: Sequence[StepCost], stage: StageModel) -> Fusion:
    """Local search from each start; then from the best intervals of the best partition's groups, rearranged."""
    best = min(starts, key=_period)
    lowest, random = lower_bound_seconds(jobs, stage), np.random.default_rng(0)
    for number in range(min(_TRIES, _PAIRS // len(jobs) ** 2)):
        if best.period_seconds <= lowest * (1 + _CLOSE):
            break
        start = starts[number] if number < len(starts) else _rearranged(best, stage, random)
        for share in _AIMS:
            aim = lowest + share * (best.period_seconds - lowest)
            best = min(best, start, of_partition(regrouped(start.partition, stage, aim), stage), key=_period)
    return best


def _rearranged(fusion: Fusion, stage: StageModel, random: np.random.Generator) -> Fusion:
    """No worse than it was: its groups are intervals of the new order."""
    return _best_of_groups(Intervals(arranged(fusion.partition, random), stage), stage)


def _period(fusion: Fusion) -> float:
    return fusion.period_seconds


def _best_of_groups(groups: Groups, stage: StageModel) -> Fusion:
    """Bisects the bound on latency where the least work under it meets the bound."""
    rounds = round_times(groups.tokens_G, groups.extra_G, groups.held_G, groups.longest_G, stage)
    number_GJ, work_GJ, latency_GJ = rounds.number_XJ, rounds.work_XJ, rounds.latency_XJ
    tie = _TIE * float(work_GJ[np.isfinite(work_GJ)].max(initial=0.0))

    def under(bound: float) -> tuple[Fusion, float]:
        allowed_GJ = np.where(latency_GJ <= bound, work_GJ, np.inf)
        choice_G = allowed_GJ.argmin(axis=1)
        at = np.arange(len(choice_G)), choice_G
        work, taken = groups.cover(allowed_GJ[at] + tie)
        if not math.isfinite(work):
            return Fusion((), math.inf), work
        made = tuple(
            Group(groups.jobs(g), int(number_GJ[g, choice_G[g]]), float(work_GJ[g, choice_G[g]]),
                  float(latency_GJ[g, choice_G[g]]))
            for g in taken
        )  # fmt: skip
        work = sum(group.work_seconds for group in made)
        return Fusion(made, max(work, *(group.latency_seconds for group in made))), work

    best, work = under(math.inf)
    if not math.isfinite(work):
        raise ValueError("a sequence is longer than any microbatch may be")
    low, high = work, best.period_seconds
    while high > low * (1 + _TOLERANCE):
        bound = (low + high) / 2
        found, work = under(bound)
        best = min(best, found, key=_period)
        if work <= bound:
            high = bound
        else:
            low = bound
    return best
