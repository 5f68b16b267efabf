"""Tests fusion against brute force over all partitions, its lower bound, and cases worked out by hand."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.planning.cost.round_time import StageModel, StepCost
from engine.planning.fusion import fusion
from engine.planning.fusion.fusion import Fusion, fuse, fuse_as, fuse_many, lower_bound_seconds
from engine.planning.fusion.task_groups import ContiguousRuns
from engine.planning.types import CostProfile
from tests.thoroughness import examples, seeds

FLAT = CostProfile(fixed_seconds=0.0, token_seconds=1.0)  # a second a token
TASKS = st.builds(
    StepCost,
    name=st.just(""),
    num_tokens=st.integers(16, 4000),
    extra_seconds=st.floats(0, 300),
    longest_tokens=st.sampled_from([16, 256, 512]),
    token_bytes=st.sampled_from([0.0, 1.0, 2.0]),
)
STAGES = st.builds(
    StageModel,
    profile=st.builds(
        CostProfile,
        fixed_seconds=st.sampled_from([0.0, 10.0, 200.0]),
        token_seconds=st.just(1.0),
        knee_tokens=st.sampled_from([0.0, 100.0, 700.0]),
    ),
    max_tokens=st.just(1024),
    max_bytes=st.sampled_from([math.inf, 1024.0]),
    num_stages=st.sampled_from([1, 2, 4, 8]),
    hop_seconds=st.sampled_from([0.0, 20.0]),
)


def named(tasks: Sequence[StepCost]) -> list[StepCost]:
    return [replace(task, name=str(i)) for i, task in enumerate(tasks)]


def partitions(tasks: Sequence[StepCost]) -> Iterator[list[list[StepCost]]]:
    """Yield every partition of the tasks into groups: Bell's number of them."""
    if not tasks:
        yield []
        return
    for rest in partitions(tasks[1:]):
        yield [[tasks[0]], *rest]
        for i, group in enumerate(rest):
            yield [*rest[:i], [tasks[0], *group], *rest[i + 1 :]]


def choices_of(group: Sequence[StepCost], stage: StageModel) -> list[tuple[float, float]]:
    """Return (work, latency) for every number of microbatches; nothing if a sequence is longer than any microbatch."""
    tokens = sum(task.num_tokens for task in group)
    heavy = [task.token_bytes for task in group if task.token_bytes and math.isfinite(stage.max_bytes)]
    held = min([stage.max_tokens, *(stage.max_bytes // token_bytes for token_bytes in heavy)])
    if max(task.longest_tokens for task in group) > held:
        return []
    fewest, choices = max(1, math.ceil(tokens / held)), []
    for number in range(fewest, fewest + 2 * stage.num_stages - 1):
        busy = max(tokens, number * stage.profile.knee_tokens) * stage.profile.token_seconds
        work = number * stage.profile.fixed_seconds + busy + sum(task.extra_seconds for task in group)
        work /= stage.num_stages
        choices.append((work, work + (stage.num_stages - 1) * (work / number + 2 * stage.hop_seconds)))
    return choices


def period_of(options: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Return the least period: over all latencies, the larger of one and of the least work under it."""
    bounds = sorted({latency for choices in options for _, latency in choices})
    return min(
        max(sum(min((w for w, x in choices if x <= bound), default=math.inf) for choices in options), bound)
        for bound in bounds
    )


def period(partition: Sequence[Sequence[StepCost]], stage: StageModel) -> float:
    """Compute the formula of the docstring in the plainest way."""
    return period_of([choices_of(group, stage) for group in partition])


def pick(tasks: Sequence[StepCost], mask: int) -> list[StepCost]:
    return [task for i, task in enumerate(tasks) if mask >> i & 1]


def least(tasks: Sequence[StepCost], stage: StageModel) -> float:
    return min(period(partition, stage) for partition in partitions(tasks))


@given(st.lists(TASKS, min_size=1, max_size=6), STAGES)
@settings(max_examples=examples(150), deadline=None)
def test_few_tasks_are_fused_as_brute_force_does(tasks: list[StepCost], stage: StageModel) -> None:
    result = fuse(named(tasks), stage)
    assert result.period_seconds == pytest.approx(least(named(tasks), stage), rel=0.01)
    check_partition(result, tasks, stage)


class Brute:
    """All partitions of so many tasks: rows of bit masks, one for each group, padded with the empty group."""

    def __init__(self, num_tasks: int) -> None:
        grown = [[]]
        for i in range(num_tasks):
            bit = 1 << i
            grown = [
                [*groups[:k], groups[k] | bit, *groups[k + 1 :]] if k < len(groups) else [*groups, bit]
                for groups in grown
                for k in range(len(groups) + 1)
            ]
        self.groups_PK = np.zeros((len(grown), num_tasks), np.int64)
        for row, groups in zip(self.groups_PK, grown, strict=True):
            row[: len(groups)] = groups

    def has_one_under(self, seconds: float, tasks: Sequence[StepCost], stage: StageModel) -> bool:
        """Whether any partition has a shorter period.

        Partitions whose least work or latency is not under it, for any number of microbatches, are skipped.
        """
        choices = [[(0.0, 0.0)], *(choices_of(pick(tasks, mask), stage) for mask in range(1, 1 << len(tasks)))]
        work_G = np.array([min((w for w, _ in options), default=math.inf) for options in choices])
        latency_G = np.array([min((x for _, x in options), default=math.inf) for options in choices])
        floor_P = np.maximum(work_G[self.groups_PK].sum(axis=1), latency_G[self.groups_PK].max(axis=1))
        rows = self.groups_PK[floor_P < seconds]
        return any(period_of([choices[mask] for mask in row]) < seconds for row in rows)


BRUTES = {count: functools.cache(functools.partial(Brute, count)) for count in (8, 9, 10)}


@pytest.mark.parametrize("count", BRUTES)
@given(data=st.data())
@settings(max_examples=examples(8), deadline=None)
def test_up_to_ten_tasks_are_fused_as_brute_force_does(count: int, data: st.DataObject) -> None:
    """Compares with all partitions: 115,975 of ten tasks."""
    brute = BRUTES[count]()
    assert len(brute.groups_PK) == {8: 4140, 9: 21147, 10: 115975}[count]
    tasks, stage = named(data.draw(st.lists(TASKS, min_size=count, max_size=count))), data.draw(STAGES)
    result, many = fuse(tasks, stage), fuse_many(tasks, stage)
    assert period([group.tasks for group in result.groups], stage) == pytest.approx(result.period_seconds, rel=2e-3)
    assert brute.has_one_under(1.01 * result.period_seconds, tasks, stage)
    assert not brute.has_one_under(0.99 * result.period_seconds, tasks, stage)
    assert many.period_seconds <= 1.03 * result.period_seconds  # as more tasks are fused


def tasks_of(random: np.random.Generator, shape: str, count: int) -> list[StepCost]:
    """Return tasks of even sizes, heavy-tailed sizes, or few sizes of which none fills a microbatch alone."""
    tokens = {
        "even": lambda: random.integers(16, 4000),
        "heavy": lambda: np.clip(np.exp(random.normal(6, 1.5)), 16, 20000),
        "lumpy": lambda: random.choice([500, 600, 1000, 1100, 2000]),
    }[shape]
    return [
        StepCost(str(i), float(tokens()), float(random.uniform(0, 300)), int(random.choice([16, 256, 512])),
            float(random.choice([0.0, 1.0, 2.0])))
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("shape", ["even", "heavy", "lumpy"])
@pytest.mark.parametrize("seed", seeds(6, 2))
def test_many_tasks_are_fused_as_well_as_long_random_search_does(shape: str, seed: int) -> None:
    """The reference is the best of 30 random partitions, each improved by moves of single tasks."""
    random = np.random.default_rng(seed)
    tasks = tasks_of(random, shape, 14)
    profile = CostProfile(float(random.choice([0, 10, 200])), 1.0, float(random.choice([0, 100, 700])))
    stage = StageModel(profile, 1024, random.choice([math.inf, 1024.0]), int(random.choice([1, 2, 4, 8])), 20.0)
    result = fuse(tasks, stage)
    check_partition(result, tasks, stage)
    assert result.period_seconds <= climbed(tasks, stage, random) * 1.01


def climbed(tasks: list[StepCost], stage: StageModel, random: np.random.Generator) -> float:
    best, lower = math.inf, lower_bound_seconds(tasks, stage)
    for _ in range(30):
        of = random.integers(0, int(random.integers(1, len(tasks))), len(tasks))
        seconds = of_numbers(tasks, of, stage)
        for i, k in itertools.product(random.permutation(len(tasks)), range(len(tasks))):
            moved = of.copy()
            moved[i] = k
            if (after := of_numbers(tasks, moved, stage)) < seconds:
                of, seconds = moved, after
        best = min(best, seconds)
        if best <= lower * 1.001:
            break
    return best


def of_numbers(tasks: list[StepCost], of: np.ndarray, stage: StageModel) -> float:
    return period([[task for task, number in zip(tasks, of, strict=True) if number == k] for k in np.unique(of)], stage)


@given(st.lists(TASKS, min_size=7, max_size=fusion.EXACT_TASKS), STAGES)
@settings(max_examples=examples(50), deadline=None)
def test_all_subsets_are_no_worse_than_runs(tasks: list[StepCost], stage: StageModel) -> None:
    assert fuse(named(tasks), stage).period_seconds <= fuse_many(named(tasks), stage).period_seconds * 1.001


def fuse_intervals(tasks: Sequence[StepCost], stage: StageModel) -> Fusion:
    """Return the best runs of the tasks sorted by tokens."""
    ordered = sorted(tasks, key=lambda task: task.num_tokens)
    return fusion._best_cover(ContiguousRuns(ordered, stage), stage)


@given(st.lists(TASKS, min_size=1, max_size=5), STAGES)
@settings(max_examples=examples(100), deadline=None)
def test_all_runs_of_an_order_are_tried(tasks: list[StepCost], stage: StageModel) -> None:
    """The algorithm for many tasks, used on few, finds the best partition into runs of the sorted tasks."""
    ordered = sorted(named(tasks), key=lambda task: task.num_tokens)
    cuts = itertools.chain.from_iterable(
        itertools.combinations(range(1, len(ordered)), count) for count in range(len(ordered))
    )
    runs = ([ordered[a:b] for a, b in itertools.pairwise([0, *cut, len(ordered)])] for cut in cuts)
    best = min(period(run, stage) for run in runs)
    assert fuse_intervals(ordered, stage).period_seconds == pytest.approx(best, rel=0.01)


def test_the_bound_allows_the_microbatches_of_an_htask_to_each_of_its_tasks() -> None:
    """Together these two may have four microbatches, the larger alone three: the bound was above their period."""
    tasks = named([StepCost("", 16, longest_tokens=16, token_bytes=2.0), StepCost("", 497, longest_tokens=16)])
    stage = StageModel(CostProfile(0.0, 1.0, 0.0), 1024, 1024.0, num_stages=2)
    assert fuse(tasks, stage).period_seconds == pytest.approx(320.625)
    assert lower_bound_seconds(tasks, stage) <= 320.625


@given(st.lists(TASKS, min_size=1, max_size=40), STAGES)
@settings(max_examples=examples(100), deadline=None)
def test_no_partition_is_under_the_bound(tasks: list[StepCost], stage: StageModel) -> None:
    result = fuse(named(tasks), stage)
    assert result.period_seconds >= lower_bound_seconds(named(tasks), stage) * (1 - 1e-9)
    check_partition(result, tasks, stage)


def check_partition(result: Fusion, tasks: Sequence[StepCost], stage: StageModel) -> None:
    """Check that each task appears once and no microbatch exceeds its limits."""
    assert sorted(task.name for group in result.groups for task in group.tasks) == sorted(map(str, range(len(tasks))))
    for group in result.groups:
        tokens = sum(task.num_tokens for task in group.tasks) / group.num_microbatches
        assert tokens <= stage.max_tokens * (1 + 1e-9)
        assert tokens * max(task.token_bytes for task in group.tasks) <= stage.max_bytes * (1 + 1e-9)


def test_on_one_stage_all_share_while_there_is_something_to_share() -> None:
    """Fixed costs and idle tokens under the knee are paid once; one stage has no bubbles to fill."""
    profile = CostProfile(fixed_seconds=10.0, token_seconds=1.0, knee_tokens=100.0)
    tasks = [StepCost(str(i), 30) for i in range(4)]
    result = fuse(tasks, StageModel(profile, 1000))
    assert len(result.groups) == 1
    assert result.period_seconds == 10 + 120
    assert fuse_as([[task] for task in tasks], StageModel(profile, 1000)).period_seconds == 4 * (10 + 100)


def test_on_four_stages_all_in_one_would_wait_for_itself() -> None:
    """Two tasks of 3 microbatches each fill 4 stages in turn: 600 s of work over 4 stages, and no bubble. As one hTask
    of 6 microbatches the round would take 150 * (1 + 3 / 6) = 225 s; a finer cut of it, 12, would take 187.5 s."""
    tasks = [StepCost("a", 300), StepCost("b", 300)]
    stage = StageModel(FLAT, 100, num_stages=4)
    assert fuse_as([tasks], stage).period_seconds == pytest.approx(150 * (1 + 3 / 12))
    result = fuse(tasks, stage)
    assert [len(group.tasks) for group in result.groups] == [1, 1]
    assert result.period_seconds == pytest.approx(150, rel=1e-3)


def test_without_interleaving_rounds_run_one_after_another() -> None:
    """Two tasks of 3 microbatches on 4 stages: each round takes 75 s of work, and 3 / 12 of it to fill and drain once
    it is cut into 9. Fused they fill and drain once."""
    tasks = [StepCost("a", 300), StepCost("b", 300)]
    stage = StageModel(FLAT, 100, num_stages=4, interleaves=False)
    apart = fuse_as([[task] for task in tasks], stage)
    assert apart.period_seconds == pytest.approx(2 * 75 * (1 + 3 / 9))
    assert fuse(tasks, stage).period_seconds == pytest.approx(150 * (1 + 3 / 12))


def test_a_saturated_device_gains_nothing_from_fusion() -> None:
    """Past the knee and without fixed costs the period is that of separate hTasks; of equals, the fewest are taken."""
    tasks = [StepCost(str(i), 500) for i in range(6)]
    stage = StageModel(replace(FLAT, knee_tokens=100.0), 500)
    assert fuse(tasks, stage).period_seconds == fuse_as([[task] for task in tasks], stage).period_seconds == 3000
    assert len(fuse(tasks, stage).groups) == 1


def test_a_task_that_keeps_much_does_not_make_small_microbatches_for_all() -> None:
    """One task keeps 10 bytes a token, so only 100 of its tokens fit; fused, all would run 100 tokens at a time."""
    tasks = [StepCost("heavy", 100, token_bytes=10.0), *(StepCost(str(i), 500, token_bytes=1.0) for i in range(4))]
    stage = StageModel(CostProfile(fixed_seconds=50.0, token_seconds=1.0), 1000, max_bytes=1000.0)
    result = fuse(tasks, stage)
    assert sorted(len(group.tasks) for group in result.groups) == [1, 4]
    assert result.period_seconds == (50 + 100) + (2 * 50 + 2000)


def test_a_sequence_that_no_microbatch_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than any microbatch"):
        fuse([StepCost("a", 500, longest_tokens=200, token_bytes=1.0)], StageModel(FLAT, 1000, max_bytes=100.0))
