"""Improves a partition of tasks into hTasks by local search.

Each step lowers the sum of the groups' costs most: it moves one task to another group or to a new one, exchanges two
tasks of different groups, or merges two groups. A group's cost is the work of its round plus a penalty for latency past
the bound, so that the search may pass through partitions that exceed it.
Legend: N tasks, K groups, the last of them empty; X any shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.planning.cost.round_time import Floats, StageModel, StepCost, round_times

_PENALTY = 4.0  # seconds of work for each second past the bound
_IMPOSSIBLE = 1e18  # the cost of a group that no microbatch can hold
_LEAST_GAIN = 1e-9  # relative
_MAX_STEPS = 24
_Numbers = NDArray[np.intp]


@dataclass(frozen=True)
class _GroupTotals:
    """Totals of groups [X]: tokens, extra seconds, tokens that a microbatch holds, the longest sequence."""

    tokens_X: Floats
    extra_X: Floats
    held_X: Floats
    longest_X: Floats

    def __add__(self, other: "_GroupTotals") -> "_GroupTotals":
        return _GroupTotals(
            self.tokens_X + other.tokens_X,
            self.extra_X + other.extra_X,
            np.minimum(self.held_X, other.held_X),
            np.maximum(self.longest_X, other.longest_X),
        )

    def down(self) -> "_GroupTotals":
        """Return the totals as a column [X, 1]."""
        return _GroupTotals(
            self.tokens_X[:, None], self.extra_X[:, None], self.held_X[:, None], self.longest_X[:, None]
        )

    def across(self) -> "_GroupTotals":
        """Return the totals as a row [1, X]."""
        return _GroupTotals(self.tokens_X[None], self.extra_X[None], self.held_X[None], self.longest_X[None])


def improve_partition(partition: Sequence[Sequence[StepCost]], stage: StageModel, bound: float) -> list[list[StepCost]]:
    """Return a partition for rounds of at most `bound` seconds: one that no step improves, or the one after many."""
    tasks = [task for part in partition for task in part]
    group_N = np.array([number for number, part in enumerate(partition) for _ in part], np.intp)
    singles = _GroupTotals(
        np.array([task.num_tokens for task in tasks], float),
        np.array([task.extra_seconds for task in tasks], float),
        np.array([stage.held_tokens(task.token_bytes) for task in tasks], float),
        np.array([task.longest_tokens for task in tasks], float),
    )
    for _ in range(_MAX_STEPS):
        group_N = np.unique(group_N, return_inverse=True)[1]
        better_N = _best_step(singles, group_N, stage, bound)
        if better_N is None:
            break
        group_N = better_N
    return [[tasks[i] for i in np.flatnonzero(group_N == number)] for number in np.unique(group_N)]


def shuffle_keeping_groups(partition: Sequence[Sequence[StepCost]], random: np.random.Generator) -> list[StepCost]:
    """Return the tasks in a random order in which the tasks of each group stay together."""
    return [partition[k][i] for k in random.permutation(len(partition)) for i in random.permutation(len(partition[k]))]


def _best_step(singles: _GroupTotals, group_N: _Numbers, stage: StageModel, bound: float) -> _Numbers | None:
    """Return the groups after the step that saves most; None if no step saves enough."""
    groups, without = _totals(singles, group_N), _totals_without(singles, group_N)
    cost_K, left_N = _cost(groups, stage, bound), _cost(without, stage, bound)
    now_N, at_N = cost_K[group_N], np.arange(len(group_N))
    moved_NK = left_N[:, None] + _cost(singles.down() + groups.across(), stage, bound) - now_N[:, None] - cost_K
    moved_NK[at_N, group_N] = 0.0
    replaced_NN = _cost(without.down() + singles.across(), stage, bound)  # the first's group with the second instead
    swapped_NN = replaced_NN + replaced_NN.T - now_N[:, None] - now_N
    swapped_NN[group_N[:, None] == group_N] = 0.0
    merged_KK = _cost(groups.down() + groups.across(), stage, bound) - cost_K[:, None] - cost_K
    np.fill_diagonal(merged_KK, 0.0)
    savings = [moved_NK, swapped_NN, merged_KK]
    kind = min(range(3), key=lambda number: float(savings[number].min()))
    if savings[kind].min() > -_LEAST_GAIN * float(cost_K.sum()):
        return None
    first, second = np.unravel_index(int(savings[kind].argmin()), savings[kind].shape)
    better_N = group_N.copy()
    if kind == 0:
        better_N[first] = second
    elif kind == 1:
        better_N[first], better_N[second] = group_N[second], group_N[first]
    else:
        better_N[group_N == second] = first
    return better_N


def _totals(singles: _GroupTotals, group_N: _Numbers) -> _GroupTotals:
    """Return the totals of each group [K]."""
    count = int(group_N.max()) + 2
    held_K, longest_K = np.full(count, np.inf), np.zeros(count)
    np.minimum.at(held_K, group_N, singles.held_X)
    np.maximum.at(longest_K, group_N, singles.longest_X)
    tokens_K: Floats = np.bincount(group_N, singles.tokens_X, count).astype(float)
    extra_K: Floats = np.bincount(group_N, singles.extra_X, count).astype(float)
    return _GroupTotals(tokens_K, extra_K, held_K, longest_K)


def _totals_without(singles: _GroupTotals, group_N: _Numbers) -> _GroupTotals:
    """Return the totals of each task's group without that task [N]."""
    others_NN = group_N[:, None] == group_N
    np.fill_diagonal(others_NN, False)
    return _GroupTotals(
        others_NN @ singles.tokens_X,
        others_NN @ singles.extra_X,
        np.where(others_NN, singles.held_X, np.inf).min(axis=1),
        np.where(others_NN, singles.longest_X, 0.0).max(axis=1),
    )


def _cost(groups: _GroupTotals, stage: StageModel, bound: float) -> Floats:
    """Return the cost of each group [X]; 0 for an empty one."""
    held_X = np.minimum(groups.held_X, stage.max_tokens)
    rounds = round_times(groups.tokens_X, groups.extra_X, held_X, groups.longest_X, stage)
    penalized_XJ = rounds.work_XJ + _PENALTY * np.maximum(0.0, rounds.latency_XJ - bound)
    cost_X: Floats = np.minimum(penalized_XJ.min(axis=-1), _IMPOSSIBLE)
    return np.where(groups.tokens_X > 0, cost_X, 0.0)
