"""A partition of jobs into hTasks made better step by step: one job moved to another group or to one of its own, two
jobs of different groups exchanged, or two groups merged; of all these the one that lowers the sum of costs most.

A group's cost is the work of its round, and a fine for latency past the bound that is aimed at, so that the search may
pass through partitions that miss it. Legend: N jobs, K groups, the last of them empty; X any shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.planning.cost.round_time import Floats, StageModel, StepCost, round_times

_FINE = 4.0  # seconds of work for a second past the bound
_NEVER = 1e18  # the cost of a group that no microbatch can hold
_LEAST_GAIN = 1e-9  # relative
_MAX_MOVES = 24
_Numbers = NDArray[np.intp]


@dataclass(frozen=True)
class _Sums:
    """Groups [X]: tokens, extra seconds, tokens a microbatch holds, the longest sequence. They add up."""

    tokens_X: Floats
    extra_X: Floats
    held_X: Floats
    longest_X: Floats

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(
            self.tokens_X + other.tokens_X,
            self.extra_X + other.extra_X,
            np.minimum(self.held_X, other.held_X),
            np.maximum(self.longest_X, other.longest_X),
        )

    def down(self) -> "_Sums":
        """[X, 1]"""
        return _Sums(self.tokens_X[:, None], self.extra_X[:, None], self.held_X[:, None], self.longest_X[:, None])

    def across(self) -> "_Sums":
        """[1, X]"""
        return _Sums(self.tokens_X[None], self.extra_X[None], self.held_X[None], self.longest_X[None])


def regrouped(partition: Sequence[Sequence[StepCost]], stage: StageModel, bound: float) -> list[list[StepCost]]:
    """A partition that no single step makes better, for rounds of at most `bound` seconds; or after many steps."""
    jobs = [job for part in partition for job in part]
    group_N = np.array([number for number, part in enumerate(partition) for _ in part], np.intp)
    singles = _Sums(
        np.array([job.num_tokens for job in jobs], float),
        np.array([job.extra_seconds for job in jobs], float),
        np.array([stage.held_tokens(job.token_bytes) for job in jobs], float),
        np.array([job.longest_tokens for job in jobs], float),
    )
    for _ in range(_MAX_MOVES):
        group_N = np.unique(group_N, return_inverse=True)[1]
        better_N = _best_step(singles, group_N, stage, bound)
        if better_N is None:
            break
        group_N = better_N
    return [[jobs[i] for i in np.flatnonzero(group_N == number)] for number in np.unique(group_N)]


def arranged(partition: Sequence[Sequence[StepCost]], random: np.random.Generator) -> list[StepCost]:
    """An order of the jobs in which each group stands together: groups shuffled, and the jobs of each."""
    return [partition[k][i] for k in random.permutation(len(partition)) for i in random.permutation(len(partition[k]))]


def _best_step(singles: _Sums, group_N: _Numbers, stage: StageModel, bound: float) -> _Numbers | None:
    """The groups after the step that gains most; None if none gains."""
    groups, without = _sums_of(singles, group_N), _sums_without(singles, group_N)
    cost_K, left_N = _cost(groups, stage, bound), _cost(without, stage, bound)
    now_N, at_N = cost_K[group_N], np.arange(len(group_N))
    moved_NK = left_N[:, None] + _cost(singles.down() + groups.across(), stage, bound) - now_N[:, None] - cost_K
    moved_NK[at_N, group_N] = 0.0
    taken_NN = _cost(without.down() + singles.across(), stage, bound)  # of the first's group, the second in its place
    swapped_NN = taken_NN + taken_NN.T - now_N[:, None] - now_N
    swapped_NN[group_N[:, None] == group_N] = 0.0
    merged_KK = _cost(groups.down() + groups.across(), stage, bound) - cost_K[:, None] - cost_K
    np.fill_diagonal(merged_KK, 0.0)
    kinds = [moved_NK, swapped_NN, merged_KK]
    kind = min(range(3), key=lambda number: float(kinds[number].min()))
    if kinds[kind].min() > -_LEAST_GAIN * float(cost_K.sum()):
        return None
    first, second = np.unravel_index(int(kinds[kind].argmin()), kinds[kind].shape)
    better_N = group_N.copy()
    if kind == 0:
        better_N[first] = second
    elif kind == 1:
        better_N[first], better_N[second] = group_N[second], group_N[first]
    else:
        better_N[group_N == second] = first
    return better_N


def _sums_of(singles: _Sums, group_N: _Numbers) -> _Sums:
    """[K]"""
    count = int(group_N.max()) + 2
    held_K, longest_K = np.full(count, np.inf), np.zeros(count)
    np.minimum.at(held_K, group_N, singles.held_X)
    np.maximum.at(longest_K, group_N, singles.longest_X)
    tokens_K: Floats = np.bincount(group_N, singles.tokens_X, count).astype(float)
    extra_K: Floats = np.bincount(group_N, singles.extra_X, count).astype(float)
    return _Sums(tokens_K, extra_K, held_K, longest_K)


def _sums_without(singles: _Sums, group_N: _Numbers) -> _Sums:
    """[N]: each job's group without it."""
    others_NN = group_N[:, None] == group_N
    np.fill_diagonal(others_NN, False)
    return _Sums(
        others_NN @ singles.tokens_X,
        others_NN @ singles.extra_X,
        np.where(others_NN, singles.held_X, np.inf).min(axis=1),
        np.where(others_NN, singles.longest_X, 0.0).max(axis=1),
    )


def _cost(groups: _Sums, stage: StageModel, bound: float) -> Floats:
    """[X]; that of an empty group is 0."""
    held_X = np.minimum(groups.held_X, stage.max_tokens)
    rounds = round_times(groups.tokens_X, groups.extra_X, held_X, groups.longest_X, stage)
    fined_XJ = rounds.work_XJ + _FINE * np.maximum(0.0, rounds.latency_XJ - bound)
    cost_X: Floats = np.minimum(fined_XJ.min(axis=-1), _NEVER)
    return np.where(groups.tokens_X > 0, cost_X, 0.0)
