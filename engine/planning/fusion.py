"""Which tasks share microbatches: a partition of an executor's tasks into hTasks, by dynamic programming.

A period is the time in which every task takes one optimizer step. Over S stages, an hTask whose round has n
microbatches keeps each stage busy for `work` seconds, and its own round takes at least

    latency = work * (1 + (S - 1) / n) + 2 (S - 1) hop                        (fill and drain of its own round)

because a task's next step needs its last one on every stage, while other hTasks' microbatches fill the wait. So

    period = max(sum of work, largest latency)

Fusing saves fixed costs and idle tokens under the knee; splitting fills pipelines. For a bound on the latency the least
work is a shortest path over groups, so the period is found by bisection over that bound. Groups are all subsets for few
tasks (exact), and intervals of several orders of the tasks for many (MuxTune section 3.3: sorted by tokens).
Legend: G groups, J choices of a group's number of microbatches, N tasks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.planning.cost import CostProfile

EXACT_TASKS = 10
_TOLERANCE = 1e-3  # of the bisection, relative
_TIE = 1e-9  # of the largest work, for each group: of equals, the fewest hTasks
_Floats = NDArray[np.float64]
_Path = tuple[float, list[int]]  # work, and the groups taken


@dataclass(frozen=True)
class Job:
    """One optimizer step of a task: its tokens, the seconds it costs whoever it is fused with, and what its
    microbatches must hold: its longest sequence, and bytes kept for backward by a token."""

    name: str
    num_tokens: float
    extra_seconds: float = 0.0
    longest_tokens: int = 1
    token_bytes: float = 0.0


@dataclass(frozen=True)
class Stage:
    """Where hTasks run: the model's profile split evenly over `num_stages`, `hop_seconds` between two of them, and what
    one microbatch may hold: tokens, and bytes kept for backward."""

    profile: CostProfile
    max_tokens: int
    max_bytes: float = math.inf
    num_stages: int = 1
    hop_seconds: float = 0.0


@dataclass(frozen=True)
class Group:
    """Jobs fused into one hTask: `num_microbatches` a round, each stage busy for `work_seconds` a round."""

    jobs: tuple[Job, ...]
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


def fuse(jobs: Sequence[Job], stage: Stage) -> Fusion:
    """The partition of least period. Raises ValueError if a sequence is longer than a microbatch may be."""
    if not jobs:
        return Fusion((), 0.0)
    if len(jobs) <= EXACT_TASKS:
        return _best_of_groups(_Subsets(jobs), stage)
    by_tokens = sorted(jobs, key=lambda job: (job.num_tokens, job.name))
    by_bytes = sorted(jobs, key=lambda job: (_largest_tokens(job, stage), job.num_tokens, job.name))
    orders = [by_tokens, by_bytes, _balanced(by_tokens)] if stage.num_stages > 1 else [by_bytes]
    return min((_best_of_groups(_Intervals(order), stage) for order in orders), key=lambda found: found.period_seconds)


def of_partition(partition: Sequence[Sequence[Job]], stage: Stage) -> Fusion:
    """A given partition, with the numbers of microbatches that serve it best. Raises as `fuse`."""
    return _best_of_groups(_Given(partition), stage)


def lower_bound_seconds(jobs: Sequence[Job], stage: Stage) -> float:
    """No partition has a shorter period: all tokens in the fewest microbatches there can be, on every stage; and no
    hTask's round is shorter than that of any one of its tasks alone."""
    if not jobs:
        return 0.0
    tokens = sum(job.num_tokens for job in jobs)
    fewest = max(1, math.ceil(tokens / max(_largest_tokens(job, stage) for job in jobs) - 1e-9))
    work = stage.profile.base_seconds(tokens, fewest) + sum(job.extra_seconds for job in jobs)
    return max(work / stage.num_stages, *(of_partition([[job]], stage).period_seconds for job in jobs))


def _largest_tokens(job: Job, stage: Stage) -> int:
    """Of a microbatch that holds the job's tokens."""
    held = stage.max_bytes / job.token_bytes if job.token_bytes else math.inf
    return int(min(stage.max_tokens, held))


def _balanced(jobs: Sequence[Job]) -> list[Job]:
    """Large and small in turn, so that intervals of few jobs can hold like sums."""
    return [job for pair in zip(reversed(jobs), jobs, strict=True) for job in pair][: len(jobs)]


class _Groups:
    """Sums and maxima over each group [G], and the cheapest way to cover all jobs by disjoint groups."""

    tokens_G: _Floats
    extra_G: _Floats
    longest_G: _Floats
    bytes_G: _Floats

    def cover(self, work_G: _Floats) -> _Path:
        raise NotImplementedError

    def jobs(self, group: int) -> tuple[Job, ...]:
        raise NotImplementedError


class _Subsets(_Groups):
    """All 2^N subsets of few jobs; group g holds the jobs of its bits."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self.tokens_G = self._fold([job.num_tokens for job in jobs], np.add)
        self.extra_G = self._fold([job.extra_seconds for job in jobs], np.add)
        self.longest_G = self._fold([job.longest_tokens for job in jobs], np.maximum)
        self.bytes_G = self._fold([job.token_bytes for job in jobs], np.maximum)

    def cover(self, work_G: _Floats) -> _Path:
        """best[s] = min over subsets g of s that hold its lowest job: work[g] + best[s - g]."""
        best_G, taken_G = np.zeros_like(work_G), np.zeros(len(work_G), int)
        for sets, starts, parts in _subset_table(len(self._jobs)):
            rest = np.repeat(sets, np.diff([*starts, len(parts)])) ^ parts
            sums = work_G[parts] + best_G[rest]
            best_G[sets] = np.minimum.reduceat(sums, starts)
            hits = np.flatnonzero(sums == np.repeat(best_G[sets], np.diff([*starts, len(parts)])))
            taken_G[rest[hits] ^ parts[hits]] = parts[hits]
        groups, left = [], len(work_G) - 1
        while left:
            groups.append(int(taken_G[left]))
            left ^= groups[-1]
        return float(best_G[-1]), groups

    def jobs(self, group: int) -> tuple[Job, ...]:
        return tuple(job for i, job in enumerate(self._jobs) if group >> i & 1)

    def _fold(self, values: Sequence[float], combine: np.ufunc) -> _Floats:
        folded = np.zeros(1)
        for value in values:
            folded = np.concatenate([folded, combine(folded, value)])
        return folded


@lru_cache(maxsize=EXACT_TASKS)
def _subset_table(num_jobs: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """By size of the set: the sets, and for each, from `starts` on, its subsets that hold its lowest job."""
    parts_of = [[part for part in range(1, s + 1) if part & s == part and part & s & -s] for s in range(1 << num_jobs)]
    table = []
    for size in range(1, num_jobs + 1):
        sets = [s for s in range(1 << num_jobs) if s.bit_count() == size]
        starts = np.cumsum([0, *(len(parts_of[s]) for s in sets[:-1])])
        parts = [part for s in sets for part in parts_of[s]]
        table.append((np.array(sets), starts, np.array(parts)))
    return table


class _Intervals(_Groups):
    """Contiguous runs of jobs in a given order; group i * (N + 1) + j holds jobs i to j - 1."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs, self._side = jobs, len(jobs) + 1
        self.tokens_G = self._sums([job.num_tokens for job in jobs])
        self.extra_G = self._sums([job.extra_seconds for job in jobs])
        self.longest_G = self._maxima([job.longest_tokens for job in jobs])
        self.bytes_G = self._maxima([job.token_bytes for job in jobs])

    def cover(self, work_G: _Floats) -> _Path:
        """best[j] = min over i < j: best[i] + work[i, j]."""
        work_JI = np.ascontiguousarray(work_G.reshape(self._side, self._side).T)
        best_J, taken = np.zeros(self._side), [0] * self._side
        for j in range(1, self._side):
            sums_I = best_J[:j] + work_JI[j, :j]
            taken[j] = int(sums_I.argmin())
            best_J[j] = sums_I[taken[j]]
        groups, j = [], self._side - 1
        while j:
            groups.append(taken[j] * self._side + j)
            j = taken[j]
        return float(best_J[-1]), groups[::-1]

    def jobs(self, group: int) -> tuple[Job, ...]:
        first, last = divmod(group, self._side)
        return tuple(self._jobs[first:last])

    def _sums(self, values: Sequence[float]) -> _Floats:
        sums = np.concatenate([[0.0], np.cumsum(values)])
        differences: _Floats = np.maximum(sums[None, :] - sums[:, None], 0.0)
        return differences.ravel()

    def _maxima(self, values: Sequence[float]) -> _Floats:
        maxima = np.zeros((self._side, self._side))
        for first in range(len(values)):
            maxima[first, first + 1 :] = np.maximum.accumulate(values[first:])
        return maxima.ravel()


class _Given(_Groups):
    """One group for each part of a partition: the only cover is all of them."""

    def __init__(self, partition: Sequence[Sequence[Job]]) -> None:
        self._partition = partition
        self.tokens_G = np.array([sum(job.num_tokens for job in part) for part in partition], float)
        self.extra_G = np.array([sum(job.extra_seconds for job in part) for part in partition], float)
        self.longest_G = np.array([max(job.longest_tokens for job in part) for part in partition], float)
        self.bytes_G = np.array([max(job.token_bytes for job in part) for part in partition], float)

    def cover(self, work_G: _Floats) -> _Path:
        return float(work_G.sum()), list(range(len(work_G)))

    def jobs(self, group: int) -> tuple[Job, ...]:
        return tuple(self._partition[group])


def _best_of_groups(groups: _Groups, stage: Stage) -> Fusion:
    """Bisects the bound on latency where the least work under it meets the bound."""
    number_GJ, work_GJ, latency_GJ = _choices(groups, stage)
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
        best = min(best, found, key=lambda fusion: fusion.period_seconds)
        if work <= bound:
            high = bound
        else:
            low = bound
    return best


def _choices(groups: _Groups, stage: Stage) -> tuple[_Floats, _Floats, _Floats]:
    """[G, J]: microbatches a round from the fewest there may be on, work and latency with that many."""
    with np.errstate(divide="ignore"):
        held_G = np.minimum(stage.max_tokens, np.floor(stage.max_bytes / groups.bytes_G))
    fewest_G = np.maximum(1, np.ceil(groups.tokens_G / np.maximum(held_G, 1) - 1e-9))
    number_GJ: _Floats = fewest_G[:, None] + np.arange(2.0 * stage.num_stages - 1)
    profile = stage.profile
    busy_GJ = np.maximum(groups.tokens_G[:, None], number_GJ * profile.knee_tokens)
    base_GJ = profile.fixed_seconds * number_GJ + profile.token_seconds * busy_GJ
    work_GJ = (base_GJ + groups.extra_G[:, None]) / stage.num_stages
    others = stage.num_stages - 1
    latency_GJ = work_GJ * (1 + others / number_GJ) + 2 * others * stage.hop_seconds
    work_GJ[held_G < groups.longest_G] = np.inf
    return number_GJ, work_GJ, latency_GJ
