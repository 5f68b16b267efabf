"""Tests the pipeline simulator against its rules, 1F1B worked out by hand, and the period that fusion predicts."""

import itertools
import xml.etree.ElementTree as ElementTree
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.planning.cost.round_time import StageModel, StepCost
from engine.planning.fusion.fusion import fuse_as
from engine.planning.simulation.pipeline_simulator import (
    HTaskRound,
    Pipeline,
    StageOperation,
    Timeline,
    interleaved,
    one_by_one,
    simulate,
)
from engine.planning.simulation.timeline import svg
from engine.planning.types import CostProfile
from tests.thoroughness import examples

ROUNDS = st.lists(
    st.tuples(st.integers(1, 5), st.floats(0.1, 3), st.floats(0.1, 3)), min_size=1, max_size=5
).map(lambda rows: [HTaskRound(f"h{i}", *row) for i, row in enumerate(rows)])  # fmt: skip
PIPELINES = st.builds(
    Pipeline, num_stages=st.integers(1, 5), hop_seconds=st.sampled_from([0.0, 0.3]), num_extra=st.integers(0, 2)
)


@given(ROUNDS, PIPELINES, st.integers(1, 3), st.sampled_from([interleaved, one_by_one]))
@settings(max_examples=examples(100), deadline=None)
def test_a_timeline_keeps_every_rule(htasks: list[HTaskRound], pipeline: Pipeline, num_rounds: int, template) -> None:  # type: ignore[no-untyped-def]
    order = template(htasks, num_rounds)
    timeline = simulate(order, pipeline)
    done = {(o.scheduled, o.stage, o.is_backward): o for o in timeline.operations}
    assert len(done) == len(timeline.operations) == 2 * len(order) * pipeline.num_stages
    last, hop = pipeline.num_stages - 1, pipeline.hop_seconds
    for (microbatch, stage, is_backward), o in done.items():
        length = microbatch.htask.backward_seconds if is_backward else microbatch.htask.forward_seconds
        assert o.end_seconds - o.start_seconds == pytest.approx(length)
        before = []
        if is_backward:
            before.append(done[microbatch, last, False] if stage == last else done[microbatch, stage + 1, True])
        elif stage:
            before.append(done[microbatch, stage - 1, False])
        for needed in before:
            assert o.start_seconds >= needed.end_seconds + (hop if needed.stage != stage else 0) - 1e-9
    for stage in range(pipeline.num_stages):
        check_stage([o for o in timeline.operations if o.stage == stage], pipeline, stage)
    check_boundaries(timeline)
    assert 0 <= timeline.bubble_fraction < 1


def check_stage(operations: list[StageOperation], pipeline: Pipeline, stage: int) -> None:
    """Check that a stage runs one operation at a time, and holds at most as many microbatches as it may."""
    operations.sort(key=lambda o: o.start_seconds)
    in_flight = 0
    for one, following in itertools.pairwise(operations):
        assert following.start_seconds >= one.end_seconds - 1e-9
    for o in operations:
        in_flight += -1 if o.is_backward else 1
        assert 0 <= in_flight <= pipeline.num_stages - stage + pipeline.num_extra


def check_boundaries(timeline: Timeline) -> None:
    """Check that on every stage a round begins after the hTask's last round has ended there, backward included."""
    ends: dict[tuple[str, int, int], float] = defaultdict(float)
    for o in timeline.operations:
        key = (o.scheduled.htask.name, o.scheduled.round, o.stage)
        ends[key] = max(ends[key], o.end_seconds)
    for o in timeline.operations:
        if o.scheduled.round:
            assert o.start_seconds >= ends[o.scheduled.htask.name, o.scheduled.round - 1, o.stage] - 1e-9


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (2, 4), (4, 4), (4, 8), (8, 3)])
def test_one_round_of_1f1b_by_hand(stages: int, microbatches: int) -> None:
    """(n + S - 1) (f + b) seconds, of which each stage idles (S - 1) (f + b): Narayanan et al. 2019, figure 8."""
    timeline = simulate(interleaved([HTaskRound("a", microbatches, 1.0, 2.0)], 1), Pipeline(stages))
    assert timeline.seconds == pytest.approx((microbatches + stages - 1) * 3.0)
    assert timeline.bubble_fraction == pytest.approx((stages - 1) / (microbatches + stages - 1))


def test_other_tasks_fill_the_bubbles_of_one() -> None:
    """Eight tasks on four stages lose over a quarter of the time one by one, and under a twentieth interleaved."""
    htasks = [HTaskRound(f"task-{i}", 8, 1.0, 1.0) for i in range(8)]
    assert simulate(one_by_one(htasks, 10), Pipeline(4)).bubble_fraction > 0.25
    assert simulate(interleaved(htasks, 10), Pipeline(4)).bubble_fraction < 0.01
    uneven = [HTaskRound(f"task-{i}", 4, 0.5 + i / 5, 0.5 + i / 5) for i in range(8)]
    assert simulate(one_by_one(uneven, 10), Pipeline(4, 0.05, 2)).bubble_fraction > 0.4
    assert simulate(interleaved(uneven, 10), Pipeline(4, 0.05, 2)).bubble_fraction < 0.05


def test_no_order_leaves_more_between_an_htasks_rounds() -> None:
    """Tries all orders of a cycle of 2 + 2 + 1 microbatches, in order within each hTask."""
    counts = {"a": 2, "b": 2, "c": 1}
    rounds = [HTaskRound(name, count, 1.0, 1.0) for name, count in counts.items()]
    template = [microbatch.htask.name for microbatch in interleaved(rounds, 2)]
    for cycle in set(itertools.permutations("aabbc")):
        for name, count in counts.items():
            assert gap(list(cycle) * 2, name, count) <= gap(template, name, count) == 5 - count


def gap(order: list[str], name: str, count: int) -> int:
    """Return the number of other hTasks' microbatches between the first round and the second."""
    places = [i for i, other in enumerate(order) if other == name]
    return places[count] - places[count - 1] - 1


@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
@pytest.mark.parametrize("sizes", [(400,), (400, 400), (300, 400, 500), (100,) * 9, (1000, 100, 100)])
def test_the_period_fusion_predicts_is_what_a_pipeline_takes(num_stages: int, sizes: tuple[int, ...]) -> None:
    """Over many rounds, with each task an hTask, the prediction is a bound that is met within a tenth. If one hTask's
    round is longer than all others' work, theirs delays it by up to a third."""
    stage = StageModel(CostProfile(fixed_seconds=5.0, token_seconds=1.0), 100, num_stages=num_stages)
    fusion = fuse_as([[StepCost(str(i), size)] for i, size in enumerate(sizes)], stage)
    htasks = [
        HTaskRound(str(i), g.num_microbatches, g.microbatch_seconds / 2, g.microbatch_seconds / 2)
        for i, g in enumerate(fusion.groups)
    ]
    rounds = 40
    simulated = simulate(interleaved(htasks, rounds), Pipeline(num_stages, num_extra=1)).seconds
    assert simulated >= (rounds - 1) * fusion.period_seconds * (1 - 1e-9)
    is_own_round = fusion.period_seconds > 1.05 * sum(group.work_seconds for group in fusion.groups)
    assert simulated / rounds == pytest.approx(fusion.period_seconds, rel=0.33 if is_own_round else 0.1)


def test_the_picture_is_xml_and_shows_every_operation() -> None:
    timeline = simulate(interleaved([HTaskRound("a<b>&", 2, 1.0, 1.0)], 1), Pipeline(2))
    drawn = ElementTree.fromstring(svg([("one & two", timeline), ("again", timeline)]))
    titles = [element.text for element in drawn.iter() if element.tag.endswith("title")]
    assert len(titles) == 2 * len(timeline.operations)
    assert titles[0] == "a<b>&, round 0, microbatch 0, forward"
    assert ElementTree.fromstring(svg([])) is not None
