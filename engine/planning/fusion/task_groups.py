"""Groups of jobs that could be hTasks, all of a kind at once, and the cheapest way to cover all jobs by disjoint ones.

Legend: G groups, N jobs, I and J places between jobs.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.planning.cost.round_time import Floats, StageModel, StepCost

Path = tuple[float, list[int]]  # work, and the groups taken
_Table = list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]


class Groups:
    """Over each group [G]: sums of tokens and extra seconds, the least a microbatch holds, and the longest sequence."""

    tokens_G: Floats
    extra_G: Floats
    held_G: Floats
    longest_G: Floats

    def cover(self, work_G: Floats) -> Path:
        """Disjoint groups that hold all jobs, of the least work in all."""
        raise NotImplementedError

    def jobs(self, group: int) -> tuple[StepCost, ...]:
        raise NotImplementedError


class Subsets(Groups):
    """All 2^N subsets of few jobs; group g holds the jobs of its bits."""

    def __init__(self, jobs: Sequence[StepCost], stage: StageModel) -> None:
        self._jobs = jobs
        self.tokens_G = _fold([job.num_tokens for job in jobs], np.add)
        self.extra_G = _fold([job.extra_seconds for job in jobs], np.add)
        self.held_G = _fold([stage.held_tokens(job.token_bytes) for job in jobs], np.minimum, np.inf)
        self.longest_G = _fold([job.longest_tokens for job in jobs], np.maximum)

    def cover(self, work_G: Floats) -> Path:
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

    def jobs(self, group: int) -> tuple[StepCost, ...]:
        return tuple(job for i, job in enumerate(self._jobs) if group >> i & 1)


def _fold(values: Sequence[float], combine: np.ufunc, empty: float = 0.0) -> Floats:
    folded = np.full(1, empty)
    for value in values:
        folded = np.concatenate([folded, combine(folded, value)])
    return folded


@lru_cache(maxsize=16)
def _subset_table(num_jobs: int) -> _Table:
    """By size of the set: the sets, and for each, from `starts` on, its subsets that hold its lowest job."""
    parts_of = [[part for part in range(1, s + 1) if part & s == part and part & s & -s] for s in range(1 << num_jobs)]
    table = []
    for size in range(1, num_jobs + 1):
        sets = [s for s in range(1 << num_jobs) if s.bit_count() == size]
        starts = np.cumsum([0, *(len(parts_of[s]) for s in sets[:-1])])
        parts = [part for s in sets for part in parts_of[s]]
        table.append((np.array(sets), starts, np.array(parts)))
    return table


class Intervals(Groups):
    """Contiguous runs of jobs in a given order; group i * (N + 1) + j holds jobs i to j - 1."""

    def __init__(self, jobs: Sequence[StepCost], stage: StageModel) -> None:
        self._jobs, self._side = jobs, len(jobs) + 1
        self.tokens_G = self._sums([job.num_tokens for job in jobs])
        self.extra_G = self._sums([job.extra_seconds for job in jobs])
        self.held_G = -self._maxima([-stage.held_tokens(job.token_bytes) for job in jobs])
        self.longest_G = self._maxima([job.longest_tokens for job in jobs])

    def cover(self, work_G: Floats) -> Path:
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

    def jobs(self, group: int) -> tuple[StepCost, ...]:
        first, last = divmod(group, self._side)
        return tuple(self._jobs[first:last])

    def _sums(self, values: Sequence[float]) -> Floats:
        sums = np.concatenate([[0.0], np.cumsum(values)])
        differences: Floats = np.maximum(sums[None, :] - sums[:, None], 0.0)
        return differences.ravel()

    def _maxima(self, values: Sequence[float]) -> Floats:
        maxima = np.zeros((self._side, self._side))
        for first in range(len(values)):
            maxima[first, first + 1 :] = np.maximum.accumulate(values[first:])
        return maxima.ravel()


class Given(Groups):
    """One group for each part of a partition: the only cover is all of them."""

    def __init__(self, partition: Sequence[Sequence[StepCost]], stage: StageModel) -> None:
        self._partition = partition
        self.tokens_G = np.array([sum(job.num_tokens for job in part) for part in partition], float)
        self.extra_G = np.array([sum(job.extra_seconds for job in part) for part in partition], float)
        self.held_G = np.array([min(stage.held_tokens(job.token_bytes) for job in part) for part in partition], float)
        self.longest_G = np.array([max(job.longest_tokens for job in part) for part in partition], float)

    def cover(self, work_G: Floats) -> Path:
        return float(work_G.sum()), list(range(len(work_G)))

    def jobs(self, group: int) -> tuple[StepCost, ...]:
        return tuple(self._partition[group])
