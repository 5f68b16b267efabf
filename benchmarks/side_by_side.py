"""Compares muxtune with the systems that a user would choose instead, on the same workload in the same run.

    PYTHONPATH=. python benchmarks/side_by_side.py                  (CPU: SmolLM2-135M, and a small shape in many mixes)
    PYTHONPATH=. python benchmarks/side_by_side.py --device cuda    (one GPU, bf16: Llama and GPT shapes)

A round is one optimizer step (forward, backward, clip, AdamW) of every task. `workload.py` defines the tasks,
`systems.py` and `instances.py` the systems with their settings. Systems run each round in turn, in rotating order, so
that a ratio compares runs close in time; the first round warms up and is not counted; a round's losses must be equal
across all systems. Peak memory is measured over two rounds of each system alone: on a CPU in a separate process each,
on a GPU in one process, by torch's counters. A peer that runs out of memory, fails or is not installed is left out and
listed with the reason; so are workloads for which `--seconds` leaves no time.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import report, trl_trainer, workload
from benchmarks.goals import GOALS
from benchmarks.instances import SHARING, Peaks, SeparateInstances, Setting, build, make_room
from benchmarks.models import NAMES, Choice, smollm2
from benchmarks.systems import Losses, System
from engine.runtime.backbone import sharing_copy

PEERS = ("peft, longest", "peft, cap", "peft, flattened", trl_trainer.NAME, "separate instances", "batch and pad")
IN_ONE_PROCESS = tuple(name for name in PEERS if name in SHARING)  # where N models do not fit: 24 GB here
# TRL's 8 loops, or one batch of all tasks' sequences and its logits (20 GB), are over 24 GB beside all the others.
SMALLEST = ("peft, longest", "peft, cap", "peft, flattened")
ABLATIONS = ("engine, fusion off", "engine, alignment off (chunk 1)", "engine, chunk 256")
CHECKPOINTED = "engine, activation checkpointing"
PLAIN = "engine, plain weights"  # on a CPU: docs/adr/0016
GRAPHED = "engine, CUDA graphs"  # of few tokens; its first three rounds are not yet replayed: `--rounds 15`
LOSS_TOLERANCE = {"cpu": 1e-4, "cuda": 5e-2}  # relative; bf16 rounds at 4e-3 each operator
# On a CPU 512 tokens train SmolLM2 1.06 to 1.14 times as fast as 256 in 1.15 times the bytes; 1,024 no faster.
TOKEN_BUDGETS = {"cpu": 512, "cuda": 8192}
# model, mix, tasks, sequences of a micro batch, systems beside the engine
CPU_WORK = (
    ("smollm2", "mixed", 8, 4, (*SMALLEST, PLAIN)),
    ("small", "sst2", 8, 4, (*PEERS, PLAIN, CHECKPOINTED, *ABLATIONS)),
    ("small", "openbookqa", 8, 4, PEERS),
    ("small", "rte", 8, 4, PEERS),
    ("small", "mixed", 2, 4, PEERS),
    ("small", "mixed", 32, 4, (*IN_ONE_PROCESS, *ABLATIONS)),
    ("small", "sst2", 8, 1, (*PEERS, *ABLATIONS)),
    ("small", "rte", 8, 8, (*PEERS, *ABLATIONS)),
)
CUDA_WORK = (
    ("llama-2-7b", "mixed", 8, 8, (*IN_ONE_PROCESS, CHECKPOINTED)),
    ("llama-2-7b", "mixed", 32, 8, (*IN_ONE_PROCESS, CHECKPOINTED)),
    ("llama-3.2-1b", "mixed", 8, 8, (*PEERS, *ABLATIONS, CHECKPOINTED)),
    ("llama-3.2-1b", "sst2", 8, 1, (*PEERS, *ABLATIONS, GRAPHED)),
    ("gpt-2.7b", "mixed", 8, 4, (*IN_ONE_PROCESS, CHECKPOINTED)),
    ("llama-3.2-1b", "rte", 8, 8, (*PEERS, *ABLATIONS)),
)
# The paper's ablations are under a light and a heavy load: one short sequence of a task, and eight long ones.
LOADS = {("sst2", 1): "light load", ("rte", 8): "heavy load"}  # by mix and sequences of a micro batch
# Counted rounds, where they are not _ROUNDS: all of CPU_WORK in about 35 minutes, the first three of CUDA_WORK in 10.
ROUNDS = {
    ("smollm2", "mixed", 8, 4): 3,
    ("small", "mixed", 32, 4): 3,
    ("small", "rte", 8, 8): 3,
    ("llama-2-7b", "mixed", 32, 8): 3,
}
_ROUNDS = 5
_MOST_ALONE = 8  # tasks that the engine trains alone for their peak bytes, evenly spread from the first to the last
_PEAK_ROUNDS = 2  # in the second round the optimizer's state exists from the start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=NAMES, help="only workloads on this model")
    parser.add_argument("--mix", choices=workload.MIXES, help="only workloads of this mix")
    parser.add_argument("--tasks", type=int, help="only workloads of this number of tasks")
    parser.add_argument(
        "--works", type=int, nargs="+", help="only these workloads, counted from 1 in CPU_WORK or CUDA_WORK"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no workload that would likely end later")
    parser.add_argument("--backbone", type=Path, help="SmolLM2 as a Hugging Face folder or GGUF file")
    parser.add_argument("--rounds", type=int, help="counted rounds of each workload (default: ROUNDS in this file)")
    parser.add_argument("--token-budget", type=int, default=0, help="tokens of a microbatch (512; on a GPU 8192)")
    parser.add_argument("--chunk", type=int, default=0, help="tokens; default: what the planner would choose")
    parser.add_argument(
        "--keep", action="store_true", help="keep the workloads on the page that this run does not measure"
    )
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; without one: --device cpu")
    if not (work := selected_work(arguments)):
        raise SystemExit("no workload matches the options: see CPU_WORK and CUDA_WORK in this file")
    origin, measured = report.origin(f"side_by_side_{arguments.device}"), list[dict[str, Any]]()
    clock, skipped, earlier = Clock(arguments.seconds), list[str](), on_page(origin) if arguments.keep else []
    with tempfile.TemporaryDirectory(prefix="muxtune-bench-") as scratch:
        needs_weights = any(row[0] == "smollm2" for row in work)
        folder = smollm2(arguments.backbone, Path(scratch)) if needs_weights else Path(scratch)
        for i, row in enumerate(work):
            if clock.has_time:
                measured.append(one_work(arguments, folder, Path(scratch) / str(i), *row))
                clock.tick()
            else:
                skipped.append(f"{row[0]}: {workload.label(*row[1:4])}")
            works = in_order([*measured, *earlier])
            raw = origin | {"load_average": os.getloadavg(), "work": works, "skipped": skipped}
            if not arguments.no_write:  # after each workload: a later failure loses no result
                from benchmarks import plots  # needs matplotlib

                report.write(raw, section(raw))
                plots.draw(raw["benchmark"])
    if arguments.no_write:
        print(section(raw))


def selected_work(arguments: argparse.Namespace) -> list[tuple[str, str, int, int, tuple[str, ...]]]:
    wanted = (arguments.model, arguments.mix, arguments.tasks)
    return [
        row
        for number, row in enumerate(CPU_WORK if arguments.device == "cpu" else CUDA_WORK, 1)
        if number in (arguments.works or (number,))
        and all(one in (None, theirs) for one, theirs in zip(wanted, row, strict=False))
    ]


def on_page(origin: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the workloads on the page, each with the origin of its figures."""
    if not (path := report.RESULTS / f"{origin['benchmark']}.json").exists():
        return []
    raw = json.loads(path.read_text())
    return [{"origin": {name: raw[name] for name in origin}} | work for work in raw["work"]]


def in_order(works: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort works as in this file; of duplicates keep the first."""
    order = [row[:4] for row in (*CPU_WORK, *CUDA_WORK)]
    by_name: dict[Any, dict[str, Any]] = {}
    for work in works:
        by_name.setdefault((work["model"], work["mix"], work["num_tasks"], work["micro_batch_size"]), work)
    return [by_name[name] for name in sorted(by_name, key=lambda name: order.index(name) if name in order else -1)]


class Clock:
    """Estimates whether another workload would end within `seconds`, if it takes as long as the longest so far."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.perf_counter) -> None:
        self._seconds, self._now = seconds, now
        self._started = self._ticked = now()
        self._longest = 0.0

    def tick(self) -> None:
        """Record that a workload has ended."""
        self._longest = max(self._longest, self._now() - self._ticked)
        self._ticked = self._now()

    @property
    def has_time(self) -> bool:
        return self._now() - self._started + self._longest <= self._seconds


def one_work(
    arguments: argparse.Namespace, folder: Path, scratch: Path, model: str, mix: str, num_tasks: int, size: int,
    beside: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Measure the speed of all systems in turn, the peak bytes of each, and of the engine with each task alone."""
    choice = Choice(model, folder, arguments.device)
    num_rounds = (arguments.rounds or ROUNDS.get((model, mix, num_tasks, size), _ROUNDS)) + 1
    tasks = workload.make(mix, num_tasks, size, num_rounds, choice.vocabulary, choice.targets)
    budget = arguments.token_budget or TOKEN_BUDGETS[arguments.device]
    chunk = arguments.chunk or tasks.chunk_tokens(budget)
    setting = Setting(choice, tasks, num_rounds, scratch, budget, chunk, torch.get_num_threads())
    print(f"{model}: {tasks.label}", flush=True)
    loaded = choice.load()
    seconds, read, left_out = speeds(setting, beside, loaded)
    peaks, alone, is_of_one = peak_bytes(setting, [n for n in seconds if n not in ABLATIONS], loaded)
    return {
        "model": model, "work": tasks.label, "mix": mix, "num_tasks": num_tasks, "micro_batch_size": size,
        "token_budget": budget, "chunk_tokens": chunk, "seconds_by_round": seconds, "tokens_read": read,
        "effective_tokens": [tasks.num_tokens(r) for r in range(1, num_rounds)],
        "flops": [choice.flops(tasks.lengths(r)) for r in range(1, num_rounds)], "instances_are_of_one": is_of_one,
        "peak_bytes": peaks, "peak_bytes_alone": alone, "left_out": left_out,
    }  # fmt: skip


def peak_bytes(setting: Setting, systems: Sequence[str], model: Any) -> tuple[dict[str, float], list[float], bool]:
    """Return the peak bytes of each system, and of the engine with each task alone.

    The third result says whether "separate instances" is N times the mean of the first and the last task instead.
    """
    tasks = setting.workload.tasks

    def alone(system: str, most: int) -> list[float]:
        numbers = sorted({round(i * (len(tasks) - 1) / (most - 1)) for i in range(most)})
        settings = [replace(setting, workload=replace(setting.workload, tasks=(tasks[number],))) for number in numbers]
        return [float(Peaks(one, _PEAK_ROUNDS, model).bytes_of(system)) for one in settings]

    whole = Peaks(setting, _PEAK_ROUNDS, model)
    peaks: dict[str, float] = {name: whole.bytes_of(name) for name in systems}
    if is_of_one := "separate instances" not in peaks:  # N instances do not fit
        peaks["separate instances"] = len(tasks) * statistics.mean(alone("peft, longest", 2))
    return peaks, alone("engine", _MOST_ALONE), is_of_one


def speeds(
    setting: Setting, beside: Sequence[str], model: Any
) -> tuple[dict[str, list[float]], dict[str, list[int]], dict[str, str]]:
    """Return seconds and tokens read, by system and counted round, and the reasons why peers were left out."""
    engine = setting.engine(sharing_copy(model))
    engine.export(setting.adapters)
    systems: dict[str, System] = {"engine": engine}
    left_out: dict[str, str] = {}
    for name in beside:
        with leaving_out(name, left_out):
            systems[name] = build(setting, name, model)
    read = {name: system.num_tokens[1:] for name, system in systems.items()}
    instances = systems.get("separate instances")
    seconds = measure(systems, setting.num_rounds, LOSS_TOLERANCE[setting.choice.device], left_out)
    if isinstance(instances, SeparateInstances):
        instances.close()
    return seconds, {name: read[name] for name in seconds}, left_out


def measure(
    systems: dict[str, System], num_rounds: int, tolerance: float, left_out: dict[str, str]
) -> dict[str, list[float]]:
    """Return seconds by system and round, without the first round. Exits if a round's losses differ.

    A peer that fails moves from `systems` to `left_out`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for round_ in range(num_rounds):
        losses, names = {}, list(systems)
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            started = time.perf_counter()
            with leaving_out(name, left_out):
                losses[name] = systems[name].run(round_)  # returns losses as numbers, so the device has finished
                seconds[name].append(time.perf_counter() - started)
            if name in left_out:
                del systems[name], seconds[name]
            make_room()
        check_equal(losses, round_, tolerance)
        print(f"round {round_}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items()), flush=True)
    return {name: values[1:] for name, values in seconds.items()}


@contextmanager
def leaving_out(name: str, left_out: dict[str, str]) -> Iterator[None]:
    """Leave out a peer that fails or has no library, with the reason; the engine may not fail."""
    try:
        yield
    except Exception as error:
        if name.startswith("engine"):
            raise
        why = "ran out of memory" if isinstance(error, torch.OutOfMemoryError) else f"failed: {type(error).__name__}"
        left_out[name] = "its library is not installed" if isinstance(error, ModuleNotFoundError) else f"it {why}"
        print(f"{name} is left out, {left_out[name]}: {error}", flush=True)


def check_equal(losses: Mapping[str, Losses], round_: int, tolerance: float) -> None:
    expected = losses["engine"]
    for system, other in losses.items():
        worst = max(abs(other[task] / loss - 1) for task, loss in expected.items())
        if not worst <= tolerance:
            raise SystemExit(f"round {round_}: losses of {system!r} differ by {worst:.2g}: {other}, engine {expected}")


def summary(work: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for each system:

    effective tokens per second (median and quartiles), the engine's speed-up (median of the ratios within a round,
    least, most), tokens read per effective token, TFLOP/s by `Choice.flops`, peak bytes, seconds of all counted rounds.
    """
    rows = []
    engine_seconds, tokens = work["seconds_by_round"]["engine"], work["effective_tokens"]
    for name, seconds in work["seconds_by_round"].items():
        rates = [t / s for t, s in zip(tokens, seconds, strict=True)]
        low, middle, high = statistics.quantiles(rates, n=4, method="inclusive")
        ratios = [theirs / ours for ours, theirs in zip(engine_seconds, seconds, strict=True)]
        rows.append({
            "system": name, "rate": middle, "low": low, "high": high, "ratio": statistics.median(ratios),
            "least": min(ratios), "most": max(ratios), "read": sum(work["tokens_read"][name]) / sum(tokens),
            "teraflops": statistics.median(f / s / 1e12 for f, s in zip(work["flops"], seconds, strict=True)),
            "bytes": work["peak_bytes"].get(name), "seconds": sum(seconds),
        })  # fmt: skip
    return rows


def section(raw: Mapping[str, Any]) -> str:
    device = raw["benchmark"].removeprefix("side_by_side_")
    parts = [f"## Side by side, {device}", report.describe_origin(dict(raw)), _CONVENTIONS]
    parts += [f"![{what} of each system at each work](plots/{what}_{device}.png)" for what in ("speed", "bytes")]
    parts += [part for work in raw["work"] for part in section_of(work)]
    if raw["skipped"]:
        parts.append(f"Not measured, the time (`--seconds`) was up: {'; '.join(raw['skipped'])}.")
    parts.append(f"Raw figures: `results/{raw['benchmark']}.json`.")
    return "\n\n".join(parts)


def section_of(work: Mapping[str, Any]) -> list[str]:
    """Return the heading, the table, remarks and the goals of a workload."""
    header = ["system", "tokens read per effective", "effective tokens/s", "engine is faster by", "seconds to the end",
              "TFLOP/s", "peak MB"]  # fmt: skip
    summaries = summary(work)
    rows: list[list[object]] = [
        [
            row["system"], f"{row['read']:.2f}", f"{row['rate']:.0f} ({row['low']:.0f} to {row['high']:.0f})",
            "" if row["system"] == "engine" else f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})",
            f"{row['seconds']:.1f}", f"{row['teraflops']:.3g}",
            "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.0f}",
        ]
        for row in summaries
    ]  # fmt: skip
    fused, alone = work["peak_bytes"]["engine"], work["peak_bytes_alone"]
    ends = statistics.mean((alone[0], alone[-1]))
    fewer = work["peak_bytes"]["separate instances"] / work["peak_bytes"]["engine"]
    measured = " (two were measured, so many would not fit)" if work["instances_are_of_one"] else ""
    load = LOADS.get((work["mix"], work["micro_batch_size"]))
    parts = [
        f"### {work['model']}: {work['work']}" + (f" ({load})" if load else ""), report.table(header, rows),
        f"Microbatches of at most {work['token_budget']} tokens, chunk {work['chunk_tokens']}. The engine with all"
        f" {work['num_tasks']} tasks holds {fused / statistics.mean(alone):.2f} times the bytes of one alone (mean of"
        f" {len(alone)}, of {min(alone) / 1e6:.0f} to {max(alone) / 1e6:.0f} MB) and {fused / ends:.2f} times the mean"
        " of the first and the last;"
        f" separate instances hold {fewer:.1f} times the engine's{measured}.",
    ]  # fmt: skip
    if "origin" in work:
        parts.append(f"Measured before: {report.describe_origin(work['origin'])}")
    if work["left_out"]:
        parts.append(f"Left out: {'; '.join(f'{name}: {why}' for name, why in work['left_out'].items())}.")
    goals = GOALS.get((work["model"], work["mix"], work["num_tasks"], work["micro_batch_size"]), ())
    if goals:
        by_system = {row["system"]: row for row in summaries}
        parts.append(f"Goals: {'; '.join(goal.verdict(work, by_system) for goal in goals)}.")
    return parts


_CONVENTIONS = """Rates are medians over rounds, with quartiles; ratios are within a round, with least and most. The
first round warms up; seconds to the end are those of all others together. TFLOP/s: 4 for each weight of a linear layer
and effective token, plus causal attention; adapters, padding and recomputation count as none. The engine's ablations:
fusion off gives every task microbatches of its own; a chunk of 1 is alignment off, one of 256 too much of it. On one
device without pipeline stages there is nothing to interleave in time but the hTasks' order: what interleaving gives is
simulated (the planner's switches). Peak bytes of ablations are not measured. Plain weights: the engine
where a CPU's are not packed (docs/adr/0016). Where a step's time goes is profiled by `profile_step.py`, in a section
of its own."""


if __name__ == "__main__":
    main()
