"""Candidate groups of tasks that could be hTasks, and the cheapest way to cover all tasks by disjoint groups.

Legend: G groups, N tasks, I and J places between tasks.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.planning.cost.round_time import Floats, StageModel, StepCost

Cover = tuple[float, list[int]]  # work, and the groups chosen
_Table = list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]


class CandidateGroups:
    """Groups of tasks, with totals of each [G]: sums of tokens and of extra seconds, the longest sequence, and the
    tokens that a microbatch holds."""

    tokens_G: Floats
    extra_G: Floats
    held_G: Floats
    longest_G: Floats

    def cover(self, work_G: Floats) -> Cover:
        """Return disjoint groups that hold all tasks, with the least work in total."""
        raise NotImplementedError

    def members(self, group: int) -> tuple[StepCost, ...]:
        raise NotImplementedError


class AllSubsets(CandidateGroups):
    """All 2^N subsets of few tasks; group g holds the tasks of its bits."""

    def __init__(self, tasks: Sequence[StepCost], stage: StageModel) -> None:
        self._tasks = tasks
        self.tokens_G = _fold([task.num_tokens for task in tasks], np.add)
        self.extra_G = _fold([task.extra_seconds for task in tasks], np.add)
        self.held_G = _fold([stage.held_tokens(task.token_bytes) for task in tasks], np.minimum, np.inf)
        self.longest_G = _fold([task.longest_tokens for task in tasks], np.maximum)

    def cover(self, work_G: Floats) -> Cover:
        """Solve best[s] = min over subsets g of s that hold its lowest task: work[g] + best[s - g]."""
        best_G, chosen_G = np.zeros_like(work_G), np.zeros(len(work_G), int)
        for sets, starts, parts in _subset_table(len(self._tasks)):
            rest = np.repeat(sets, np.diff([*starts, len(parts)])) ^ parts
            sums = work_G[parts] + best_G[rest]
            best_G[sets] = np.minimum.reduceat(sums, starts)
            hits = np.flatnonzero(sums == np.repeat(best_G[sets], np.diff([*starts, len(parts)])))
            chosen_G[rest[hits] ^ parts[hits]] = parts[hits]
        groups, left = [], len(work_G) - 1
        while left:
            groups.append(int(chosen_G[left]))
            left ^= groups[-1]
        return float(best_G[-1]), groups

    def members(self, group: int) -> tuple[StepCost, ...]:
        return tuple(task for i, task in enumerate(self._tasks) if group >> i & 1)


def _fold(values: Sequence[float], combine: np.ufunc, empty: float = 0.0) -> Floats:
    folded = np.full(1, empty)
    for value in values:
        folded = np.concatenate([folded, combine(folded, value)])
    return folded


@lru_cache(maxsize=16)
def _subset_table(num_tasks: int) -> _Table:
    """Return for each size of set: the sets, and from `starts` on for each set, its subsets with its lowest task."""
    parts_of = [[part for part in range(1, s + 1) if part & s == part and part & s & -s] for s in range(1 << num_tasks)]
    table = []
    for size in range(1, num_tasks + 1):
        sets = [s for s in range(1 << num_tasks) if s.bit_count() == size]
        starts = np.cumsum([0, *(len(parts_of[s]) for s in sets[:-1])])
        parts = [part for s in sets for part in parts_of[s]]
        table.append((np.array(sets), starts, np.array(parts)))
    return table


class ContiguousRuns(CandidateGroups):
    """Contiguous runs of tasks in a given order; group i * (N + 1) + j holds tasks i to j - 1."""

    def __init__(self, tasks: Sequence[StepCost], stage: StageModel) -> None:
        self._tasks, self._side = tasks, len(tasks) + 1
        self.tokens_G = self._sums([task.num_tokens for task in tasks])
        self.extra_G = self._sums([task.extra_seconds for task in tasks])
        self.held_G = -self._maxima([-stage.held_tokens(task.token_bytes) for task in tasks])
        self.longest_G = self._maxima([task.longest_tokens for task in tasks])

    def cover(self, work_G: Floats) -> Cover:
        """Solve best[j] = min over i < j: best[i] + work[i, j]."""
        work_JI = np.ascontiguousarray(work_G.reshape(self._side, self._side).T)
        best_J, starts = np.zeros(self._side), [0] * self._side
        for j in range(1, self._side):
            sums_I = best_J[:j] + work_JI[j, :j]
            starts[j] = int(sums_I.argmin())
            best_J[j] = sums_I[starts[j]]
        groups, j = [], self._side - 1
        while j:
            groups.append(starts[j] * self._side + j)
            j = starts[j]
        return float(best_J[-1]), groups[::-1]

    def members(self, group: int) -> tuple[StepCost, ...]:
        first, last = divmod(group, self._side)
        return tuple(self._tasks[first:last])

    def _sums(self, values: Sequence[float]) -> Floats:
        sums = np.concatenate([[0.0], np.cumsum(values)])
        differences: Floats = np.maximum(sums[None, :] - sums[:, None], 0.0)
        return differences.ravel()

    def _maxima(self, values: Sequence[float]) -> Floats:
        maxima = np.zeros((self._side, self._side))
        for first in range(len(values)):
            maxima[first, first + 1 :] = np.maximum.accumulate(values[first:])
        return maxima.ravel()


class FixedPartition(CandidateGroups):
    """The groups of one partition: the only cover is all of them."""

    def __init__(self, partition: Sequence[Sequence[StepCost]], stage: StageModel) -> None:
        self._partition = partition
        self.tokens_G = np.array([sum(task.num_tokens for task in part) for part in partition], float)
        self.extra_G = np.array([sum(task.extra_seconds for task in part) for part in partition], float)
        self.held_G = np.array([min(stage.held_tokens(task.token_bytes) for task in part) for part in partition], float)
        self.longest_G = np.array([max(task.longest_tokens for task in part) for part in partition], float)

    def cover(self, work_G: Floats) -> Cover:
        return float(work_G.sum()), list(range(len(work_G)))

    def members(self, group: int) -> tuple[StepCost, ...]:
        return tuple(self._partition[group])
