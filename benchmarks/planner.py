"""Measures the planner: predictions on this CPU, fusion, pipelines, traces, padding, and each switch.

    PYTHONPATH=. python benchmarks/planner.py [--quick] [--no-write]

- Predictions: a small Llama on one thread, timed by CPU seconds; calibrated, refitted with 24 microbatches of random
  shapes as on an executor, and compared on 60 others.
- Fusion: random tasks against the best of all partitions (up to 10 tasks), and against a lower bound of every partition
  (64 tasks on 4 stages).
- Pipelines: 8 tasks on 4 stages, 20 rounds.
- Traces: 1,000 tasks on 16 devices under three policies, 10,000 on 128 under ours, in bursts of 8.
- Padding: tasks with lengths like the paper's datasets (`workload.CORPORA`), packed by alignment.
- Switches: 16 such tasks on 4 stages, under a light and a heavy load.
- Saturation: two tasks fused on one device, and eight on four stages, over their tokens.

All seconds are CPU seconds of this process. All but the predictions use the costs of `DEVICE`, a hypothetical device
that small microbatches leave idle.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import plots, report
from benchmarks.workload import CORPORA
from engine.alignment.dataset import TokenizedDataset
from engine.alignment.packing import PackedTask, rounds
from engine.methods import Lora
from engine.methods.base import Site
from engine.planning.cost.cost_fit import CostSample, refit
from engine.planning.cost.cost_model import microbatch_seconds
from engine.planning.cost.round_time import StageModel, StepCost
from engine.planning.cost.task_demand import DemandEstimator
from engine.planning.fusion.fusion import fuse, fuse_as, fuse_many, lower_bound_seconds
from engine.planning.placement.eta import seconds_alone
from engine.planning.planner import plan
from engine.planning.simulation.arrival_trace import TraceParameters, arrivals
from engine.planning.simulation.baselines import PaddedBatching, PlannerPolicy, SeparateInstances
from engine.planning.simulation.pipeline_simulator import HTaskRound, Pipeline, interleaved, one_by_one
from engine.planning.simulation.pipeline_simulator import simulate as run_pipeline
from engine.planning.simulation.simulator import SchedulingPolicy, simulate
from engine.planning.simulation.summary import summarise
from engine.planning.types import BackboneView, CostProfile, ExecutorView, PlannerConfig, Snapshot, TaskView
from engine.runtime.backbone import Backbone
from engine.runtime.calibration import Bench, Probe, calibrate
from engine.runtime.executor import Executor
from engine.task import TaskSpec, Training

MIXES = {name: (name,) * 4 for name in CORPORA} | {"all three": tuple(CORPORA) * 2, "fifteen": tuple(CORPORA) * 5}
GOALS = {"median_error": 0.10, "p95_error": 0.25}
LOADS = {"light": 4, "heavy": 32}  # sequences of a step
SITES = tuple(Site(f"layers.{i}.{n}_proj", 576, 576) for i in range(30) for n in "qv")
BACKBONE = BackboneView("b", 135_000_000, 30, 576, 49152, 8192, 540 << 20, "float32", SITES)
DEVICE = CostProfile(fixed_seconds=0.05, token_seconds=1e-4, knee_tokens=512, square_seconds=1e-9, target_seconds=1e-6,
                     module_seconds=2e-5, multiplication_seconds=1e-14)  # fmt: skip


def accuracy(quick: bool) -> dict[str, Any]:
    """Return relative errors on shapes that the fit has not seen."""
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=2000, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    executor = Executor(Backbone(transformers.LlamaForCausalLM(config).eval()))
    start = calibrate(executor, 6.0, 1024, time.process_time)
    random, timed = np.random.default_rng(1), list[CostSample]()
    number_recent, number = (8, 12) if quick else (24, 60)
    with Bench(executor, time.process_time) as bench:
        for _ in range(number_recent + number):
            tokens, sequences, ranges = random.integers([16, 1, 1], [120, 6, 5]).tolist()
            rank, stride, targets = (int(random.choice(c)) for c in ((4, 16, 32), (1, 2, 4), (1, 2, 8)))
            probe = Probe(tokens, sequences, ranges, rank, stride, targets, has_step=bool(random.integers(2)))
            bench.seconds(probe)
            timed.append(CostSample(bench.parts(probe), min(bench.seconds(probe) for _ in range(2))))
    cost = refit(start, timed[:number_recent])
    errors = [abs(microbatch_seconds(cost, s.parts) / s.seconds - 1) for s in timed[number_recent:]]
    return {
        "shapes": number,
        "median_error": float(np.median(errors)),
        "p95_error": float(np.quantile(errors, 0.95)),
        "cost": vars(cost),
    }


def random_tasks(random: np.random.Generator, count: int) -> list[StepCost]:
    return [
        StepCost(str(i), float(np.clip(np.exp(random.normal(6.5, 1.2)), 16, 20000)), float(random.uniform(0, 300)), 256)
        for i in range(count)
    ]


def fusion_quality(quick: bool) -> dict[str, Any]:
    """Compare fusion of many tasks with the exact result and the bound; time 512 tasks on 8 executors."""
    random, over_exact, over_bound = np.random.default_rng(0), list[float](), list[float]()
    for _ in range(60 if quick else 400):
        stage = StageModel(
            CostProfile(float(random.choice([0, 10, 200])), 1.0, float(random.choice([0, 100, 700]))),
            1024,
            num_stages=int(random.choice([1, 2, 4, 8])),
            hop_seconds=20.0,
        )
        jobs = random_tasks(random, int(random.integers(5, 11)))
        over_exact.append(fuse_many(jobs, stage).period_seconds / fuse(jobs, stage).period_seconds - 1)
    executors = tuple(
        ExecutorView(f"e{i}", BACKBONE, 80 << 30, cost=DEVICE, num_stages=4, hop_seconds=1e-3) for i in range(8)
    )
    for _ in range(4 if quick else 16):
        jobs, stage = random_tasks(random, 64), StageModel(DEVICE, 2048, num_stages=4, hop_seconds=1e-3)
        over_bound.append(fuse(jobs, stage).period_seconds / lower_bound_seconds(jobs, stage) - 1)
    tasks, limits = tuple(a.task for a in arrivals(TraceParameters(512, 1.0, "b", seed=1))), PlannerConfig()
    seconds = [least_seconds(lambda n=n: plan(Snapshot(tasks, executors[:n]), limits)) for n in (8,)]
    fuse_seconds = least_seconds(lambda: [fuse(random_tasks(np.random.default_rng(i), 64), stage) for i in range(8)])
    return {
        "instances": len(over_exact),
        "many_over_exact_worst": max(over_exact),
        "many_over_exact_over_1_percent": sum(x > 0.01 for x in over_exact),
        "over_bound_median": statistics.median(over_bound),
        "over_bound_worst": max(over_bound),
        "fuse_512_on_8_seconds": fuse_seconds,
        "plan_512_on_8_seconds": seconds[0],
    }


def least_seconds(run: Callable[[], object]) -> float:
    """Return the least CPU seconds of five runs."""
    timed = []
    for _ in range(5):
        started = time.process_time()
        run()
        timed.append(time.process_time() - started)
    return min(timed)


def bubbles() -> dict[str, float]:
    """Simulate eight tasks on four stages: equal ones, and ones of 0.7 to 2.1 s a microbatch."""
    equal = [HTaskRound(f"task-{i}", 8, 1.0, 1.0) for i in range(8)]
    uneven = [HTaskRound(f"task-{i}", 4, 0.35 + i / 10, 0.35 + i / 10) for i in range(8)]
    fractions = {}
    for name, loads, pipeline in (("equal", equal, Pipeline(4)), ("uneven", uneven, Pipeline(4, 0.02, 2))):
        fractions[f"{name}, interleaved"] = run_pipeline(interleaved(loads, 20), pipeline).bubble_fraction
        fractions[f"{name}, 1F1B task by task"] = run_pipeline(one_by_one(loads, 20), pipeline).bubble_fraction
    return fractions


def traces(quick: bool) -> dict[str, Any]:
    """Simulate three policies on one trace, and ours on a large one."""
    small, large = ((300, 6), (2000, 32)) if quick else ((1000, 16), (10_000, 128))
    limits = PlannerConfig()
    policies: dict[str, SchedulingPolicy] = {
        "muxtune": PlannerPolicy(limits),
        "one instance a task": SeparateInstances(limits),
        "batch everything": PaddedBatching(limits),
    }
    results = {name: simulated(*small, policy) for name, policy in policies.items()}
    return results | {"muxtune, large": simulated(*large, PlannerPolicy(limits))}


def simulated(num_tasks: int, num_devices: int, policy: SchedulingPolicy) -> dict[str, Any]:
    """Simulate arrivals that keep our devices busy nine tenths of the time."""
    executors = [ExecutorView(f"e{i:03}", BACKBONE, 24 << 30, cost=DEVICE) for i in range(num_devices)]
    come = arrivals(TraceParameters(num_tasks, num_devices / 260, "b", burst=8.0, seed=2))
    limits, estimator, started = PlannerConfig(), DemandEstimator(PlannerConfig()), time.process_time()
    run = simulate(come, executors, policy, replan_seconds=come[-1].seconds / 600)
    cpu_seconds = time.process_time() - started
    summary = summarise(run, lambda task: seconds_alone(task, executors[0], limits, estimator))
    return vars(summary) | {"devices": num_devices, "cpu_seconds": cpu_seconds}


def tasks_of(mix: tuple[str, ...], batch: int, steps: int = 12) -> list[tuple[TaskView, TokenizedDataset]]:
    random, tasks = np.random.default_rng(len(mix)), []
    for i, shape in enumerate(mix):
        lengths = CORPORA[shape].lengths(random, 400)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids = np.zeros(offsets[-1], np.int32)
        data = TokenizedDataset(ids, np.ones(len(ids), np.bool_), offsets, np.arange(400), lengths, (), 0)
        training = Training(1e-3, num_steps=steps, micro_batch_size=8, global_batch_size=batch,
                            max_sequence_tokens=CORPORA[shape].cap, seed=i)  # fmt: skip
        quantiles = np.quantile(lengths, (np.arange(64) + 0.5) / 64, method="inverted_cdf").astype(int)
        spec = TaskSpec("b", Lora(8, 8.0, ("q_proj", "v_proj")), "", training)
        view = TaskView(f"t/tasks/{i:02}", "t", spec, i, steps, num_train_tokens=int(steps * batch * lengths.mean()),
                        length_quantiles=tuple(quantiles.tolist()))  # fmt: skip
        tasks.append((view, data))
    return tasks


def padding(mix: tuple[str, ...], batch: int, chunk: int) -> dict[str, Any]:
    """Return alignment's padding with this chunk (0: the planner's), and the padding to the longest sequence."""
    tasks, whole, effective = tasks_of(mix, batch), 0, 0
    views, data = tuple(view for view, _ in tasks), {view.name: data for view, data in tasks}
    executor = ExecutorView("e", BACKBONE, 80 << 30, cost=DEVICE)
    (htask,) = plan(Snapshot(views, (executor,)), PlannerConfig(chunk_tokens=chunk)).htasks["e"]
    members = [PackedTask(v.name, data[v.name], v.spec.training, v.num_steps, 0) for v in views]
    for microbatch in rounds(members, htask.token_budget, htask.chunk_tokens):
        whole += sum(range_.num_tokens for range_ in microbatch.ranges)
        effective += sum(range_.num_effective_tokens for range_ in microbatch.ranges)
    cap = max(CORPORA[shape].cap for shape in mix)
    return {"chunk": htask.chunk_tokens, "padding": 1 - effective / whole,
            "padding_to_longest": 1 - effective / (12 * batch * cap * len(mix))}  # fmt: skip


def switches(batch: int) -> dict[str, float]:
    """Return the seconds in which each of 16 tasks of mixed lengths takes a step of `batch` sequences, on 4 stages."""
    views = tuple(view for view, _ in tasks_of(tuple(CORPORA) * 5 + ("rte",), batch))
    executor = ExecutorView("e", BACKBONE, 80 << 30, cost=DEVICE, num_stages=4, hop_seconds=2e-3)
    variants = {
        "all on": PlannerConfig(),
        "fusion off": PlannerConfig(fuses=False),
        "interleaving off": PlannerConfig(interleaves=False),
        "fusion and interleaving off": PlannerConfig(fuses=False, interleaves=False),
        "chunks of 64 for all": PlannerConfig(chunk_tokens=64),
        "alignment off (chunk 1)": PlannerConfig(chunk_tokens=1),
    }
    seconds = {n: PlannerPolicy(limits).assign(views, [executor])["e"].round_seconds for n, limits in variants.items()}
    whole = PaddedBatching(PlannerConfig()).assign(views, [executor])["e"].round_seconds
    return seconds | {"one batch, padded to the longest": whole}


def saturation() -> dict[str, Any]:
    """Return by tokens the effective tokens per second of a microbatch, and the time that fusing two halves saves."""
    rows = []
    for tokens in (32, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096, 8192):
        halves = [StepCost("a", tokens / 2, 1e-6 * tokens / 2), StepCost("b", tokens / 2, 1e-6 * tokens / 2)]
        stage = StageModel(DEVICE, 8192)
        fused = fuse_as([halves], stage).period_seconds
        apart = fuse_as([[half] for half in halves], stage).period_seconds
        pipeline, eight = replace(stage, max_tokens=2048, num_stages=4), [StepCost(str(i), tokens) for i in range(8)]
        best, *others = (
            fuse(eight, pipeline),
            fuse_as([eight], pipeline),
            fuse_as([[j] for j in eight], pipeline),
        )
        periods = [fusion.period_seconds for fusion in (best, *others)]
        rows.append({"tokens": tokens, "tokens_per_second": tokens / fused, "saved": 1 - fused / apart,
                     "num_htasks": len(best.groups), "periods": periods})  # fmt: skip
    return {"rows": rows, "knee_tokens": DEVICE.knee_tokens}


def padding_rows(results: dict[str, Any]) -> list[list[object]]:
    rows: list[list[object]] = []
    for mix, batch in itertools.product(MIXES, (8, 32)):
        chosen, whole = results[f"{mix}, {batch}, chosen"], results[f"{mix}, {batch}, 64"]
        rows.append([mix, batch, chosen["chunk"], f"{chosen['padding']:.2%}", f"{whole['padding']:.2%}",
                     f"{chosen['padding_to_longest']:.1%}"])  # fmt: skip
    return rows


def trace_rows(results: dict[str, Any]) -> list[list[object]]:
    return [
        [name, row["num_tasks"], row["devices"], f"{row['effective_tokens_per_second']:.0f}",
         f"{row['mean_completion_seconds']:.0f}", f"{row['p95_completion_seconds']:.0f}",
         f"{row['mean_slowdown']:.2f}", f"{row['fairness']:.2f}", f"{row['cpu_seconds']:.1f}"]
        for name, row in results.items()
    ]  # fmt: skip


def switch_table(results: dict[str, dict[str, float]]) -> str:
    header = ["planner", *(f"{what}, {load}" for load in results for what in ("period, s", "of all on"))]
    rows: list[list[object]] = []
    for name in results["light"]:
        periods = [(seconds[name], seconds["all on"]) for seconds in results.values()]
        rows.append([name, *(cell for s, base in periods for cell in (f"{s:.3f}", f"{s / base:.2f}"))])
    return report.table(header, rows)


def section(raw: dict[str, Any]) -> str:
    a, f, rows = raw["accuracy"], raw["fusion"], raw["saturation"]["rows"]
    idle = report.table(["tasks", "idle"], [[name, f"{value:.1%}"] for name, value in raw["bubbles"].items()])
    header = ["policy", "tasks", "devices", "effective tokens/s", "mean completion, s", "95 %, s", "slowdown",
              "fairness", "simulated in, s of CPU"]  # fmt: skip
    padded = ["mix", "global batch", "chunk", "padding", "with 64", "to the longest"]

    def verdict(what: str) -> str:
        return f"{a[what]:.1%} (at most {GOALS[what]:.0%}: {'held' if a[what] <= GOALS[what] else 'FAILED'})"

    split = [
        [row["tokens"], f"{row['saved']:.0%}", row["num_htasks"], *(f"{s:.3f}" for s in row["periods"])] for row in rows
    ]
    return f"""
## The planner

{report.describe_origin(raw)}
The costs of all but the predictions are those of a made-up device (`DEVICE` in the script).

**Predictions** on {a["shapes"]} shapes never fitted: median error {verdict("median_error")}, 95th percentile
{verdict("p95_error")}.

**Fusion.** The way of many tasks on {f["instances"]} instances of 5 to 10 tasks, against the best of all partitions:
worst {f["many_over_exact_worst"]:.1%} over, {f["many_over_exact_over_1_percent"]} of them over 1 %. 64 tasks on 4
stages, against a bound below any partition: median {f["over_bound_median"]:.2%} over, worst
{f["over_bound_worst"]:.2%}. 512 tasks on 8 executors of 4 stages: fusion takes
{1000 * f["fuse_512_on_8_seconds"]:.0f} ms of CPU,
{1000 * f["plan_512_on_8_seconds"]:.0f} ms for the whole plan from nothing, explained.

**Bubbles**, of all stages' time, 8 tasks on 4 stages, 20 rounds, filling and draining included:

{idle}

**Traces** (slowdown: over the time alone; fairness: Jain's index of tenants' slowdowns):

{report.table(header, trace_rows(raw["traces"]))}

**Padding** by the planner's chunk, by chunks of 64, and if every sequence were padded to the longest:

{report.table(padded, padding_rows(raw["padding"]))}

**Switches**, 16 ragged tasks on 4 stages, simulated: seconds in which each takes a step of {LOADS["light"]} sequences
(light load) and of {LOADS["heavy"]} (heavy):

{switch_table(raw["switches"])}

**Saturation.** Up to the knee of {DEVICE.knee_tokens:.0f} tokens a microbatch's throughput grows with its tokens.
What fusing two tasks of half the tokens each saves of their time on one device; and eight tasks of so many tokens on
four stages: the planner's hTasks, and the periods of those, of one hTask of all, and of one hTask each. Where a
task alone fills whole microbatches (here of 2048 tokens) fusing gains nothing more: one each is as good.

![throughput, and what fusion saves, over tokens](plots/saturation.svg)

{report.table(["tokens", "saved", "hTasks", "period, s", "all fused, s", "one each, s"], split)}

Raw figures: `results/planner.json`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer of everything, nothing written")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    quick, figures = arguments.quick, dict[str, Any]()
    parts: dict[str, Callable[[], Any]] = {
        "accuracy": lambda: accuracy(quick),
        "fusion": lambda: fusion_quality(quick),
        "bubbles": bubbles,
        "traces": lambda: traces(quick),
        "padding": lambda: {
            f"{mix}, {batch}, {chunk or 'chosen'}": padding(MIXES[mix], batch, chunk)
            for mix, batch, chunk in itertools.product(MIXES, (8, 32), (0, 64))
        },
        "switches": lambda: {load: switches(batch) for load, batch in LOADS.items()},
        "saturation": saturation,
    }
    for name, measure in parts.items():
        started = time.perf_counter()
        figures[name] = measure()
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
    raw = report.origin("planner") | figures
    print(section(raw))
    if not (quick or arguments.no_write):
        report.write(raw, section(raw))
        plots.draw("planner")


if __name__ == "__main__":
    main()
