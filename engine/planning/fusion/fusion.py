"""Decides which tasks share microbatches: partitions an executor's tasks into hTasks by dynamic programming.

A period is the time in which every task takes one optimizer step. With the work and the latency of each hTask's round
(`round_time.py`)

    period = max(sum of work, largest latency)

Fusing saves fixed costs and idle tokens under the knee; splitting fills pipelines. For a bound on the latency the least
work is a shortest path over groups, so the period is found by bisection over that bound. Groups are all subsets for few
tasks (exact), and for many the contiguous runs of several orders of the tasks, among them the paper's, sorted by
tokens. No order has every best partition among its runs (sums have to fill whole microbatches, which is a packing
problem), so local search polishes the result until it is close to a lower bound of every partition.
Legend: G groups, J choices of a group's number of microbatches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.planning.cost.cost_model import base_seconds
from engine.planning.cost.round_time import StageModel, StepCost, fewest_microbatches, least_latency, round_times
from engine.planning.fusion.local_search import improve_partition, shuffle_keeping_groups
from engine.planning.fusion.task_groups import AllSubsets, CandidateGroups, ContiguousRuns, FixedPartition

EXACT_TASKS = 10
_TOLERANCE = 1e-3  # of the bisection, relative
_TIE = 1e-9  # of the largest work, for each group: among equals, prefer the fewest hTasks
_CLOSE = 2e-3  # relative distance from the lower bound at which polishing stops
_MAX_STARTS, _MAX_PAIRS = 12, 8_000  # starts of polishing, and pairs of tasks examined in them
_BOUND_SHARES = (0.0, 0.75)  # latency bounds that polishing tries: shares of the way from the lower bound to the best


@dataclass(frozen=True)
class FusedGroup:
    """Tasks fused into one hTask: `num_microbatches` a round, each stage busy for `work_seconds` a round."""

    tasks: tuple[StepCost, ...]
    num_microbatches: int
    work_seconds: float
    latency_seconds: float

    @property
    def microbatch_seconds(self) -> float:
        return self.work_seconds / self.num_microbatches


@dataclass(frozen=True)
class Fusion:
    """A partition into hTasks, and the seconds in which each task takes one step."""

    groups: tuple[FusedGroup, ...]
    period_seconds: float

    @property
    def partition(self) -> list[tuple[StepCost, ...]]:
        return [group.tasks for group in self.groups]


def fuse(tasks: Sequence[StepCost], stage: StageModel) -> Fusion:
    """Return the partition with the least period. Raises ValueError if a sequence is longer than any microbatch."""
    if not tasks:
        return Fusion((), 0.0)
    if len(tasks) <= EXACT_TASKS:
        return _best_cover(AllSubsets(tasks, stage), stage)
    return fuse_many(tasks, stage)


def fuse_many(tasks: Sequence[StepCost], stage: StageModel) -> Fusion:
    """Return a partition with nearly the least period, in polynomial time. Raises as `fuse`."""
    by_tokens = sorted(tasks, key=lambda task: (task.num_tokens, task.name))
    by_bytes = sorted(tasks, key=lambda task: (stage.held_tokens(task.token_bytes), task.num_tokens, task.name))
    orders = [by_tokens, by_bytes, _alternate(by_tokens)] if stage.num_stages > 1 else [by_bytes]
    return _polish([_best_cover(ContiguousRuns(order, stage), stage) for order in orders], tasks, stage)


def fuse_as(partition: Sequence[Sequence[StepCost]], stage: StageModel) -> Fusion:
    """Return the given partition, with the numbers of microbatches that suit it best. Raises as `fuse`."""
    return _best_cover(FixedPartition(partition, stage), stage)


def lower_bound_seconds(tasks: Sequence[StepCost], stage: StageModel) -> float:
    """Return a lower bound of every partition's period.

    All tokens pass every stage in at least the fewest microbatches possible. An hTask's round takes at least as long as
    that of any one of its tasks alone, with any number of microbatches that the hTask may have.
    """
    if not tasks:
        return 0.0
    tokens = sum(task.num_tokens for task in tasks)
    fewest = max(1, math.ceil(tokens / max(stage.held_tokens(task.token_bytes) for task in tasks) - 1e-9))
    work = base_seconds(stage.profile, tokens, fewest) + sum(task.extra_seconds for task in tasks)
    alone = FixedPartition([[task] for task in tasks], stage)
    fewest_G = fewest_microbatches(alone.tokens_G, alone.held_G)
    most = float(fewest_microbatches(np.array(tokens), alone.held_G.min())) + 2 * (stage.num_stages - 1)
    latency_G = least_latency(alone.tokens_G, alone.extra_G, fewest_G, most, stage)
    return max(work / stage.num_stages, float(latency_G.max()))


def _alternate(tasks: Sequence[StepCost]) -> list[StepCost]:
    """Alternate large and small tasks, so that runs of few tasks can have similar sums."""
    return [task for pair in zip(reversed(tasks), tasks, strict=True) for task in pair][: len(tasks)]


def _polish(starts: Sequence[Fusion], tasks: Sequence[StepCost], stage: StageModel) -> Fusion:
    """Run local search from each start, then from the best runs of the best partition's groups, reordered."""
    best = min(starts, key=_period)
    lowest, random = lower_bound_seconds(tasks, stage), np.random.default_rng(0)
    for number in range(min(_MAX_STARTS, _MAX_PAIRS // len(tasks) ** 2)):
        if best.period_seconds <= lowest * (1 + _CLOSE):
            break
        start = starts[number] if number < len(starts) else _reorder(best, stage, random)
        for share in _BOUND_SHARES:
            bound = lowest + share * (best.period_seconds - lowest)
            best = min(best, start, fuse_as(improve_partition(start.partition, stage, bound), stage), key=_period)
    return best


def _reorder(fusion: Fusion, stage: StageModel, random: np.random.Generator) -> Fusion:
    """Return the best runs of a new order. They are not worse than before: the old groups are runs of it too."""
    return _best_cover(ContiguousRuns(shuffle_keeping_groups(fusion.partition, random), stage), stage)


def _period(fusion: Fusion) -> float:
    return fusion.period_seconds


def _best_cover(groups: CandidateGroups, stage: StageModel) -> Fusion:
    """Bisect the bound on latency until the least work under it meets the bound."""
    rounds = round_times(groups.tokens_G, groups.extra_G, groups.held_G, groups.longest_G, stage)
    number_GJ, work_GJ, latency_GJ = rounds.number_XJ, rounds.work_XJ, rounds.latency_XJ
    tie = _TIE * float(work_GJ[np.isfinite(work_GJ)].max(initial=0.0))

    def cover_under(bound: float) -> tuple[Fusion, float]:
        allowed_GJ = np.where(latency_GJ <= bound, work_GJ, np.inf)
        choice_G = allowed_GJ.argmin(axis=1)
        at = np.arange(len(choice_G)), choice_G
        work, cover = groups.cover(allowed_GJ[at] + tie)
        if not math.isfinite(work):
            return Fusion((), math.inf), work
        fused = tuple(
            FusedGroup(groups.members(g), int(number_GJ[g, choice_G[g]]), float(work_GJ[g, choice_G[g]]),
                       float(latency_GJ[g, choice_G[g]]))
            for g in cover
        )  # fmt: skip
        work = sum(group.work_seconds for group in fused)
        return Fusion(fused, max(work, *(group.latency_seconds for group in fused))), work

    best, work = cover_under(math.inf)
    if not math.isfinite(work):
        raise ValueError("a sequence is longer than any microbatch may be")
    low, high = work, best.period_seconds
    while high > low * (1 + _TOLERANCE):
        bound = (low + high) / 2
        fusion, work = cover_under(bound)
        best = min(best, fusion, key=_period)
        if work <= bound:
            high = bound
        else:
            low = bound
    return best
