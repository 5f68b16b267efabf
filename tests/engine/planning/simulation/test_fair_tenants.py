"""A hundred tenants of any appetite on one executor: none gets less than its share, whatever the others run."""

import random
import statistics
from collections import defaultdict

import pytest

from engine.methods import Lora
from engine.planning.placement.eta import seconds_alone
from engine.planning.simulation.baselines import PlannerPolicy
from engine.planning.simulation.simulator import Arrival, simulate
from engine.planning.types import CostProfile, ExecutorView, PlannerConfig, TaskView
from engine.task import TaskSpec, Training
from tests.engine.planning.simulation.test_simulator import BACKBONE
from tests.thoroughness import seeds

CONFIG = PlannerConfig(token_budget=512, chunk_tokens=16)
NUM_TENANTS = 100
SLACK = 1 / 0.95 * 1.05  # what a tenant may lose by sharing rounds, and by plans that are shared


def tasks_of(tenant: int, draw: random.Random) -> list[TaskView]:
    """Return one to five tasks with steps of 20 to 200,000 tokens; some evaluate up to nine times that at each step."""
    tasks = []
    for number in range(draw.choice([1, 1, 1, 2, 5])):
        batch, length = 2 ** draw.randint(0, 10), draw.randint(20, 200)
        heldout = draw.choice([0.0, 0.0, 0.0, 0.9])
        training = Training(
            1e-3, num_steps=draw.randint(3, 40), max_sequence_tokens=256, micro_batch_size=2, global_batch_size=batch,
            heldout_fraction=heldout, evaluate_every_steps=1,
        )  # fmt: skip
        spec = TaskSpec("a", Lora(4, 8.0, ("q_proj",)), "", training)
        steps = training.num_steps or 0
        tasks.append(
            TaskView(
                f"tenants/{tenant}/tasks/{number}", f"tenants/{tenant}", spec, 1000 * number + tenant, steps,
                num_train_tokens=batch * length * steps, num_heldout_rows=9 * batch if heldout else 0,
            )
        )  # fmt: skip
    return tasks


@pytest.mark.parametrize("seed", seeds(8, 2))
def test_every_tenant_is_done_as_soon_as_with_its_share_of_the_executor(seed: int) -> None:
    draw = random.Random(seed)
    cost = CostProfile(fixed_seconds=0.002, token_seconds=2e-5, knee_tokens=draw.choice([0.0, 300.0]))
    executor = ExecutorView("executors/0", BACKBONE, 1 << 40, cost=cost)
    tasks = [task for tenant in range(NUM_TENANTS) for task in tasks_of(tenant, draw)]
    alone = {task.name: seconds_alone(task, executor, CONFIG) for task in tasks}
    whole = sum(alone.values())
    run = simulate(
        [Arrival(0.0, task) for task in tasks], [executor], PlannerPolicy(CONFIG), replan_seconds=whole / 400
    )
    assert len(run.outcomes) == len(tasks)
    ends: dict[str, float] = defaultdict(float)
    work: dict[str, float] = defaultdict(float)
    for outcome in run.outcomes:
        ends[outcome.task.tenant] = max(ends[outcome.task.tenant], outcome.finished_seconds)
        work[outcome.task.tenant] += alone[outcome.task.name]
    late = {name: ends[name] / (NUM_TENANTS * work[name]) for name in work if ends[name] > whole / 50}
    assert max(late.values()) < SLACK, late
    assert statistics.median(late.values()) < 1
