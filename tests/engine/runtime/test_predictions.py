"""Compares the cost model and the simulator with an executor on a device that counts its operators' time.

`benchmarks/planner.py` compares predictions with the real seconds of a machine, where a busy neighbour shows.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import transformers as hf

from engine.alignment.dataset import TokenizedDataset
from engine.alignment.packing import PackedTask, one_round
from engine.methods import Lora
from engine.planning.cost.cost_fit import CostSample, fit, refit
from engine.planning.cost.cost_model import microbatch_seconds
from engine.planning.planner import plan
from engine.planning.simulation.baselines import PlannerPolicy
from engine.planning.simulation.simulator import Arrival, simulate
from engine.planning.types import BackboneView, CostProfile, ExecutorView, PlannerConfig, Snapshot, TaskView
from engine.runtime.backbone import Backbone
from engine.runtime.calibration import Bench, Probe, calibrate, parts_of
from engine.runtime.executor import Executor
from engine.runtime.task_state import TaskAssignment
from engine.task import LrSchedule, TaskSpec, Training
from tests.engine.runtime.counted import CountedDevice
from tests.engine.runtime.tiny import model_of

LIMITS = PlannerConfig(token_budget=512)
NUM_CORRECTING = 3  # rounds


@pytest.fixture(scope="module")
def executor() -> Executor:
    config = hf.LlamaConfig(
        vocab_size=2000, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    return Executor(Backbone(model_of(config), packs_weights=False))  # PyTorch counts the products of plain weights


@pytest.fixture
def device() -> Iterator[CountedDevice]:
    with CountedDevice() as device:
        yield device


@pytest.fixture(scope="module")
def start(executor: Executor) -> list[CostSample]:
    with CountedDevice() as device:
        return calibrate(executor, 3.0, 1024, device.clock)


def drawn(random: np.random.Generator) -> Probe:
    tokens, sequences, ranges = random.integers([16, 1, 1], [100, 6, 5]).tolist()
    rank, stride, targets = (int(random.choice(c)) for c in ((4, 16, 32), (1, 2, 4), (1, 2, 8)))
    return Probe(tokens, sequences, ranges, rank, stride, targets, has_step=bool(random.integers(2)))


def test_shapes_outside_the_fit_are_predicted(
    executor: Executor, device: CountedDevice, start: list[CostSample]
) -> None:
    """Half of the predictions are within 3 %, nineteen of twenty within a tenth.

    The model is calibrated and corrected by the first microbatches, as in an executor, before it predicts others.
    """
    random, ran = np.random.default_rng(1), list[CostSample]()
    with Bench(executor, device.clock) as bench:
        for _ in range(14 + 40):
            probe = drawn(random)
            ran.append(CostSample(bench.parts(probe), bench.seconds(probe)))
    cost = refit(start, ran[:14])
    errors = [abs(microbatch_seconds(cost, sample.parts) / sample.seconds - 1) for sample in ran[14:]]
    assert np.median(errors) < 0.03
    assert np.quantile(errors, 0.95) < 0.10


def tenants_tasks(random: np.random.Generator) -> list[tuple[TaskView, TokenizedDataset]]:
    """Returns four tasks of different lengths, ranks, targets, batches and numbers of steps."""
    tasks = []
    for i, (most, batch, steps) in enumerate(((64, 8, 8), (128, 4, 10), (256, 4, 12), (64, 16, 14))):
        lengths = random.integers(8, most + 1, 64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids = random.integers(0, 2000, offsets[-1]).astype(np.int32)
        data = TokenizedDataset(ids, np.ones(len(ids), np.bool_), offsets, np.arange(64), lengths, (), 0)
        method = Lora((4, 8, 16, 32)[i], 8.0, ("all-linear",) if i % 2 else ("q_proj", "v_proj"))
        training = Training(1e-4, num_steps=steps, lr_schedule=LrSchedule.CONSTANT, micro_batch_size=4,
                            global_batch_size=batch, max_sequence_tokens=most, seed=i)  # fmt: skip
        tokens = int(steps * batch * lengths.mean())
        view = TaskView(f"t/tasks/{i}", "t", TaskSpec("b", method, "", training), i, steps,
                        num_train_tokens=tokens, length_quantiles=tuple(sorted(lengths.tolist())))  # fmt: skip
        tasks.append((view, data))
    return tasks


def view_of(executor: Executor, cost: CostProfile) -> ExecutorView:
    config = executor.backbone.config
    backbone = BackboneView("b", 0, config.num_hidden_layers, config.hidden_size, config.vocab_size, 1024,
                            executor.backbone.weight_bytes(), "float32", tuple(executor.backbone.sites))  # fmt: skip
    return ExecutorView("e", backbone, 1 << 40, cost=cost)


@dataclasses.dataclass
class Ran:
    """Seconds of each round, and the microbatches of the first rounds."""

    rounds: list[float]
    samples: list[CostSample]


def run_as_the_trainer_does(
    executor: Executor, device: CountedDevice, view: ExecutorView, tasks: Sequence[tuple[TaskView, TokenizedDataset]]
) -> Ran:
    """Runs the tasks, with a new plan whenever a task ends."""
    for task, _ in tasks:
        executor.attach(TaskAssignment(task.name, task.spec, task.num_steps))
    data, ran = {task.name: data for task, data in tasks}, Ran([], [])
    left = [task for task, _ in tasks]
    while left:
        (htask,) = plan(Snapshot(tuple(left), (view,)), LIMITS).htasks["e"]
        while len(ran.rounds) < min(task.num_steps for task in left):
            step = len(ran.rounds)
            members = [(PackedTask(t.name, data[t.name], t.spec.training, t.num_steps, 0), step) for t in left]
            samples = []
            for microbatch in one_round(step, members, htask.token_budget, htask.chunk_tokens):
                parts, started = parts_of(microbatch, executor), device.seconds
                executor.run(microbatch)
                samples.append(CostSample(parts, device.seconds - started))
            ran.rounds.append(sum(sample.seconds for sample in samples))
            ran.samples += samples if step < NUM_CORRECTING else []
        for task in [task for task in left if task.num_steps == len(ran.rounds)]:
            executor.detach(task.name)
            left.remove(task)
    return ran


def test_the_simulator_predicts_a_real_run(executor: Executor, device: CountedDevice, start: list[CostSample]) -> None:
    """Compares round times and the end of each of four tasks while rounds get shorter, with costs that the first rounds
    corrected, as in an executor."""
    tasks = tenants_tasks(np.random.default_rng(2))
    ran = run_as_the_trainer_does(executor, device, view_of(executor, fit(start)), tasks)
    view = view_of(executor, refit(start, ran.samples))
    come = [Arrival(0.0, task) for task, _ in tasks]
    simulated = {o.task.name: o.finished_seconds for o in simulate(come, [view], PlannerPolicy(LIMITS)).outcomes}
    predicted = PlannerPolicy(LIMITS).assign([task for task, _ in tasks], [view])["e"].round_seconds
    assert predicted == pytest.approx(statistics.median(ran.rounds[:8]), rel=0.05)
    assert simulated == pytest.approx({task.name: sum(ran.rounds[: task.num_steps]) for task, _ in tasks}, rel=0.05)
