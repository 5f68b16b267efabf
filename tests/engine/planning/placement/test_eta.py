"""Predictions of when tasks end include their evaluations. The values are computed by hand."""

import dataclasses
import itertools

import pytest

from engine.methods import Lora, Prompt
from engine.methods.base import SiteKind
from engine.planning.cost.task_demand import DemandEstimator
from engine.planning.placement.eta import seconds_alone, seconds_left
from engine.planning.placement.executor_state import ExecutorState
from engine.planning.types import BackboneView, CostProfile, ExecutorView, PlannerConfig, Site, TaskView
from engine.task import TaskSpec, Training, evaluation_is_due, num_evaluations

CONFIG = PlannerConfig(token_budget=256, chunk_tokens=1)
SITES = (Site("q_proj", 512, 512), Site("embed_tokens", 1000, 512, SiteKind.EMBEDDING))
BACKBONE = BackboneView("b", 10**7, 4, 512, 1000, 512, 40 << 20, "float32", SITES)
EXECUTOR = ExecutorView("executors/0", BACKBONE, 4 << 30, cost=CostProfile(fixed_seconds=0.3, token_seconds=0.01))


def task(name: str = "a", num_steps: int = 10, num_heldout_rows: int = 0, **training: object) -> TaskView:
    """Return a task whose rows have 10 tokens each, and whose steps have 80."""
    defaults = {
        "learning_rate": 0.1,
        "num_steps": num_steps,
        "max_sequence_tokens": 64,
        "heldout_fraction": 0.5,
        **training,
    }
    spec = TaskSpec("b", Lora(8, 16.0, ("q_proj",)), "d", Training(**defaults))  # type: ignore[arg-type]
    return TaskView(name, f"tenants/{name}", spec, 0, num_steps, num_train_tokens=80 * num_steps,
                    length_quantiles=(5, 15), num_heldout_rows=num_heldout_rows)  # fmt: skip


STEP = 0.3 + 0.01 * 80  # seconds
EVALUATION = (4 * 0.3 + 0.01 * 1000) / 3  # of 100 rows in four microbatches, at a third of the cost of training


def test_evaluations_are_counted_as_they_come_due() -> None:
    for fraction, every, num_steps, step in itertools.product((0.0, 0.5), range(9), range(9), range(10)):
        training = Training(0.1, num_steps=1, heldout_fraction=fraction, evaluate_every_steps=every)
        due = sum(evaluation_is_due(training, after, num_steps) for after in range(step, num_steps + 1))
        assert num_evaluations(training, num_steps, step) == due, (fraction, every, num_steps, step)


@pytest.mark.parametrize(("every", "num_evaluations"), [(0, 2), (1, 11), (3, 5), (5, 3), (100, 2)])
def test_a_task_alone_takes_its_steps_and_its_evaluations(every: int, num_evaluations: int) -> None:
    alone = seconds_alone(task(num_heldout_rows=100, evaluate_every_steps=every), EXECUTOR, CONFIG)
    assert alone == pytest.approx(10 * STEP + num_evaluations * EVALUATION)
    assert seconds_alone(task(evaluate_every_steps=every), EXECUTOR, CONFIG) == pytest.approx(10 * STEP)


def test_a_task_that_evaluates_much_more_than_it_trains_is_predicted_to_take_hours() -> None:
    """A step of 8 rows takes 6 ms. 18,000 held-out rows after each of 1,000 steps are 750 times a step, not nothing."""
    executor = dataclasses.replace(EXECUTOR, cost=CostProfile(token_seconds=0.006 / 80))
    evaluated = task(num_steps=1000, num_heldout_rows=18_000, evaluate_every_steps=1)
    assert seconds_alone(task(num_steps=1000), executor, CONFIG) == pytest.approx(6.0)
    assert seconds_alone(evaluated, executor, CONFIG) == pytest.approx(6.0 + 1001 * 18_000 / 8 * 0.006 / 3)


def test_rows_are_as_long_as_the_training_split_however_large_the_batch_is() -> None:
    """A global batch of 65,536 has only the 8 rows of the training split."""
    large = task(num_heldout_rows=100, global_batch_size=65_536)
    executor = dataclasses.replace(EXECUTOR, cost=CostProfile(token_seconds=0.01))
    assert seconds_alone(large, executor, CONFIG) == pytest.approx(0.01 * (800 + 2 * 1000 / 3), rel=0.01)


def test_virtual_tokens_are_evaluated_too() -> None:
    plain = task(num_heldout_rows=100)
    prompt = dataclasses.replace(plain, spec=dataclasses.replace(plain.spec, method=Prompt(20)))
    executor = dataclasses.replace(EXECUTOR, cost=CostProfile(token_seconds=0.01))
    added = seconds_alone(prompt, executor, CONFIG) - seconds_alone(plain, executor, CONFIG)
    assert added == pytest.approx(0.01 * 20 * (10 * 8 + 2 * 100 / 3))


def test_verified_steps_run_twice() -> None:
    alone = seconds_alone(task(verify_every_steps=5), EXECUTOR, CONFIG)
    assert alone == pytest.approx((10 + 2) * STEP)


def test_a_neighbours_evaluations_delay_that_neighbour() -> None:
    """Whether the neighbour evaluates after each step or never, a task takes at most 2.2 times its own time."""
    left = {}
    for num_heldout_rows in (0, 100):
        executor, estimator = ExecutorState(EXECUTOR, CONFIG), DemandEstimator(CONFIG)
        neighbour = task("neighbour", 10, num_heldout_rows, evaluate_every_steps=1)
        for each in (task("honest", 5), neighbour):
            executor.add(estimator.estimate(each, BACKBONE))
        left[num_heldout_rows] = seconds_left(executor, {})
        assert left[num_heldout_rows]["honest"] <= 1.1 * 2 * 5 * STEP
        assert left[num_heldout_rows]["neighbour"] >= seconds_alone(neighbour, EXECUTOR, CONFIG) - 1e-6
    assert left[100]["neighbour"] >= left[0]["neighbour"] + 11 * EVALUATION


def test_evaluations_are_part_of_a_tenants_claim() -> None:
    executor, estimator = ExecutorState(EXECUTOR, CONFIG), DemandEstimator(CONFIG)
    for each in (task("honest"), task("greedy", num_heldout_rows=100, evaluate_every_steps=1)):
        executor.add(estimator.estimate(each, BACKBONE))
    greedy = 80 + 1.1 * 1000 / 3
    assert executor.share("tenants/greedy") == pytest.approx(greedy / (greedy + 80))
