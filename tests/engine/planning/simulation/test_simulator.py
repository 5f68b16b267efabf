"""Tests the simulator against timelines worked out by hand and laws of any schedule; its baselines by definition."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.methods import Lora
from engine.methods.base import Site
from engine.planning.planner import plan
from engine.planning.simulation.arrival_trace import TraceParameters, arrivals
from engine.planning.simulation.baselines import PaddedBatching, PlannerPolicy, SeparateInstances
from engine.planning.simulation.simulator import Arrival, SimulatedAssignment, SimulationResult, simulate
from engine.planning.simulation.whatif import forecast, picture
from engine.planning.types import BackboneView, CostProfile, ExecutorView, PlannerConfig, Snapshot, TaskView
from engine.task import TaskSpec, Training
from tests.thoroughness import examples

SITES = tuple(Site(f"layers.{i}.{n}", 512, 512) for i in range(4) for n in ("q_proj", "v_proj"))
BACKBONE = BackboneView("a", 10**7, 4, 512, 1000, 512, 40 << 20, "float32", SITES)
COST = CostProfile(fixed_seconds=0.5, token_seconds=0.01)
LIMITS = PlannerConfig(256, 16)


def task(number: int, steps: int, tokens: int = 100, tenant: str = "t", batch: int = 8) -> TaskView:
    training = Training(1e-3, num_steps=steps, max_sequence_tokens=64, micro_batch_size=2, global_batch_size=batch)
    spec = TaskSpec("a", Lora(8, 8.0, ("q_proj",)), "", training)
    return TaskView(f"tenants/{tenant}/tasks/{number}", f"tenants/{tenant}", spec, number, steps,
                    num_train_tokens=tokens * steps)  # fmt: skip


def executors(count: int, memory_mib: int = 4096) -> list[ExecutorView]:
    return [ExecutorView(f"executors/{i}", BACKBONE, memory_mib << 20, cost=COST) for i in range(count)]


class Sharing:
    """A policy for calculation by hand: all tasks on one executor, a round takes one second for each."""

    def assign(self, tasks: Sequence[TaskView], executors: Sequence[ExecutorView]) -> Mapping[str, SimulatedAssignment]:
        names = tuple(sorted(task.name for task in tasks))
        return {executors[0].name: SimulatedAssignment(names, float(len(names)))}


def ends(run: SimulationResult) -> dict[str, float]:
    return {outcome.task.name.rpartition("/")[2]: outcome.finished_seconds for outcome in run.outcomes}


def test_processor_sharing_by_hand() -> None:
    """10 steps from second 0, 10 from second 4. Alone the first does 4; then both do one each 2 s: the first's 6 end at
    16, when the second has 4 left, which it does alone by 20."""
    run = simulate([Arrival(0, task(0, 10)), Arrival(4, task(1, 10))], executors(1), Sharing())
    assert ends(run) == pytest.approx({"0": 16, "1": 20})
    assert [o.device_seconds for o in run.outcomes] == pytest.approx([4 + 6, 6 + 4])


def test_switching_costs_and_plans_are_shared() -> None:
    """The first loses 3 s, three rounds: 12 are left when the second arrives and loses one and a half. Its 11.5 rounds
    of 2 s end at 24; the first then has half a round left, alone."""
    run = simulate([Arrival(0, task(0, 10)), Arrival(1, task(1, 10))], executors(1), Sharing(), switch_seconds=3.0)
    assert run.num_plans == 4  # two arrivals, two ends
    late = simulate([Arrival(0, task(0, 10)), Arrival(1, task(1, 10))], executors(1), Sharing(), replan_seconds=5.0)
    assert late.num_plans < 4
    assert ends(late)["0"] == pytest.approx(5 + 20)  # nobody runs before the first plan; from then on both do
    assert ends(run) == pytest.approx({"0": 24.5, "1": 24.0})


POLICIES = [PlannerPolicy, SeparateInstances, PaddedBatching]


@pytest.mark.parametrize("policy", POLICIES)
@given(
    rows=st.lists(
        st.tuples(st.floats(0, 300), st.integers(1, 60), st.integers(8, 400), st.sampled_from("tuv")),
        min_size=1, max_size=12,
    ),
    count=st.integers(1, 3),
    memory_mib=st.sampled_from([60, 130, 4096]),
    replan=st.sampled_from([0.0, 7.0]),
)  # fmt: skip
@settings(max_examples=examples(40), deadline=None)
def test_every_task_runs_once_and_no_faster_than_alone(  # type: ignore[no-untyped-def]
    policy, rows, count: int, memory_mib: int, replan: float
) -> None:
    arriving = [Arrival(at, task(i, steps, tokens, tenant)) for i, (at, steps, tokens, tenant) in enumerate(rows)]
    run = simulate(arriving, executors(count, memory_mib), policy(LIMITS), replan_seconds=replan)
    assert sorted([o.task.name for o in run.outcomes] + list(run.never_placed)) == sorted(a.task.name for a in arriving)
    assert run.never_placed == ()
    for outcome in run.outcomes:
        alone = outcome.task.num_steps * (COST.fixed_seconds + COST.token_seconds * outcome.task.tokens_per_step)
        assert outcome.finished_seconds >= outcome.started_seconds + alone * (1 - 1e-6)
        assert outcome.started_seconds >= outcome.arrived_seconds
    if run.outcomes:
        first, last = min(a.seconds for a in arriving), max(o.finished_seconds for o in run.outcomes)
        assert sum(o.device_seconds for o in run.outcomes) <= count * (last - first) * (1 + 1e-6)


def test_the_planner_beats_both_baselines_on_small_ragged_tasks() -> None:
    arriving = arrivals(TraceParameters(60, rate=0.05, backbone="a", burst=3, median_steps=30, seed=3))
    cost = CostProfile(fixed_seconds=0.5, token_seconds=1e-3, knee_tokens=500)
    view = [ExecutorView(e.name, BACKBONE, 600 << 20, cost=cost) for e in executors(2)]
    done = {
        policy.__name__: simulate(arriving, view, policy(PlannerConfig(2048, 16)), replan_seconds=5.0)  # type: ignore[abstract]
        for policy in POLICIES
    }
    mean = {name: np.mean([o.completion_seconds for o in run.outcomes]) for name, run in done.items()}
    assert all(len(run.outcomes) == 60 for run in done.values())
    assert mean["PlannerPolicy"] < 0.8 * min(mean["SeparateInstances"], mean["PaddedBatching"])


def test_an_instance_each_runs_its_own_slices_and_a_batch_pads_to_the_longest() -> None:
    """8 sequences in slices of 2 are four microbatches; batched and padded to 64 tokens they are two of 256."""
    one = task(0, 1)
    padded = 100 + 7.5
    (separate,) = SeparateInstances(LIMITS).assign([one], executors(1)).values()
    assert separate.round_seconds == pytest.approx(4 * 0.5 + 0.01 * padded)
    (batched,) = PaddedBatching(LIMITS).assign([one], executors(1)).values()
    assert batched.round_seconds == pytest.approx(2 * 0.5 + 0.01 * 8 * 64)
    (ours,) = PlannerPolicy(LIMITS).assign([one], executors(1)).values()
    assert ours.round_seconds == pytest.approx(0.5 + 0.01 * padded)


def test_a_trace_is_the_same_again_and_has_the_shape_it_says() -> None:
    trace = TraceParameters(4000, rate=2.0, backbone="a", burst=5.0, seed=1)
    arriving = arrivals(trace)
    assert arriving == arrivals(trace) != arrivals(TraceParameters(4000, rate=2.0, backbone="a", burst=5.0, seed=2))
    times = [arrival.seconds for arrival in arriving]
    assert times == sorted(times)
    assert 4000 / times[-1] == pytest.approx(2.0, rel=0.2)
    assert sum(a == b for a, b in itertools.pairwise(times)) / 4000 == pytest.approx(4 / 5, rel=0.1)
    steps = sorted((arrival.task.num_steps for arrival in arriving), reverse=True)
    assert sum(steps[:400]) > 0.4 * sum(steps)  # a tenth of the tasks has nearly half of the work
    poisson = np.diff([arrival.seconds for arrival in arrivals(TraceParameters(4000, rate=2.0, backbone="a"))])
    assert np.std(poisson) / np.mean(poisson) == pytest.approx(1.0, rel=0.1)


def test_a_forecast_is_simulated_and_more_tasks_never_end_sooner() -> None:
    """Two tasks on one executor end as worked out by hand; a third task delays both."""
    tasks = (task(0, 10), task(1, 20))
    snapshot = Snapshot(tasks, tuple(executors(1)))
    together, alone = 0.5 + 0.01 * 215, 0.5 + 0.01 * 107.5
    before = forecast(snapshot, LIMITS)
    assert before[tasks[0].name] == pytest.approx(10 * together, rel=0.1)
    assert before[tasks[1].name] == pytest.approx(10 * together + 10 * alone, rel=0.1)
    more = forecast(Snapshot((*tasks, task(2, 30)), snapshot.executors), LIMITS)
    assert all(more[name] > seconds for name, seconds in before.items())
    assert forecast(Snapshot(tasks, (ExecutorView("e", BACKBONE, 1 << 32),)), LIMITS) == {}
    assert forecast(Snapshot(tasks, ()), LIMITS) == {}


def test_a_picture_shows_all_stages() -> None:
    view = ExecutorView("e", BACKBONE, 1 << 32, cost=COST, num_stages=3, hop_seconds=0.01)
    snapshot = Snapshot(tuple(task(i, 5, 300) for i in range(5)), (view,))
    result = plan(snapshot, LIMITS)
    drawn = picture(snapshot, result.htasks["e"], "e", LIMITS)
    assert all(f"stage {stage}" in drawn for stage in range(3))
    assert ("one hTask after another" in drawn) is (len(result.htasks["e"]) > 1)


def test_a_picture_of_very_many_microbatches_is_cut_and_says_so() -> None:
    view = ExecutorView("e", BACKBONE, 1 << 40, cost=COST, num_stages=4)
    snapshot = Snapshot((task(0, 5, tokens=1_000_000), task(1, 5)), (view,))
    drawn = picture(snapshot, plan(snapshot, LIMITS).htasks["e"], "e", LIMITS)
    assert len(drawn) < 2_500_000 and ", the first 500 of " in drawn
