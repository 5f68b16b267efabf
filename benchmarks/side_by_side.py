"""muxtune beside what a user would pick instead, on the same work in the same run.

    PYTHONPATH=. python benchmarks/side_by_side.py                  (CPU: SmolLM2-135M, and a small shape in many mixes)
    PYTHONPATH=. python benchmarks/side_by_side.py --device cuda    (one GPU, bf16: Llama and GPT shapes)

A round is one optimizer step (forward, backward, clip, AdamW) of every task; `workload.py` says of what, `systems.py`
and `instances.py` who trains it and with which settings. Systems take each round in turn, in rotating order, so that a
ratio compares neighbours in time; the first round warms up and is not counted; a round's losses must be equal across
all systems. Peak memory is measured in processes of their own, over two rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import plots, report, workload
from benchmarks.goals import GOALS
from benchmarks.instances import SHARING, SeparateInstances, Setting, build, peak_bytes
from benchmarks.models import NAMES, Choice, smollm2
from benchmarks.systems import Engine, Losses, System
from engine.runtime.backbone import sharing_copy

PEERS = ("peft, longest", "peft, cap", "peft, flattened", "separate instances", "batch and pad")
IN_ONE_PROCESS = tuple(name for name in PEERS if name in SHARING)  # where N models do not fit: 24 GB here
ABLATIONS = ("engine, fusion off", "engine, chunk 256")
CHECKPOINTED = "engine, activation checkpointing"
GRAPHED = "engine, CUDA graphs"  # of few tokens; its first three rounds are not yet replayed: `--rounds 15`
LOSS_TOLERANCE = {"cpu": 1e-4, "cuda": 5e-2}  # relative; bf16 rounds at 4e-3 each operator
# On a CPU 512 tokens train 4 % faster than 256, and take 31 % more bytes (8 mixed tasks of SmolLM2's widths).
TOKEN_BUDGETS = {"cpu": 256, "cuda": 8192}
# model, mix, tasks, sequences of a micro batch, systems beside the engine
CPU_WORK = (
    ("smollm2", "mixed", 8, 4, (*IN_ONE_PROCESS, CHECKPOINTED)),
    ("small", "sst2", 8, 4, (*PEERS, *ABLATIONS)),
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
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=NAMES, help="only the work on this one")
    parser.add_argument("--mix", choices=workload.MIXES, help="only the work of this mix")
    parser.add_argument("--tasks", type=int, help="only the work of so many tasks")
    parser.add_argument("--backbone", type=Path, help="SmolLM2 as a Hugging Face folder or GGUF file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--token-budget", type=int, default=0, help="tokens of a microbatch (256; on a GPU 8192)")
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; without one: --device cpu")
    asked = (arguments.model, arguments.mix, arguments.tasks)
    work = [
        w
        for w in (CPU_WORK if arguments.device == "cpu" else CUDA_WORK)
        if all(one in (None, own) for one, own in zip(asked, w, strict=False))
    ]
    if not work:
        raise SystemExit("no such work: see CPU_WORK and CUDA_WORK in this file")
    origin, measured = report.origin(f"side_by_side_{arguments.device}"), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="muxtune-bench-") as scratch:
        folder = smollm2(arguments.backbone, Path(scratch))
        for i, own in enumerate(work):
            measured.append(one_work(arguments, folder, Path(scratch) / str(i), *own))
            raw = origin | {"load_average": os.getloadavg(), "work": measured}
            if not arguments.no_write:  # after each: what was measured stays, whatever becomes of the rest
                report.write(raw, section(raw))
                plots.draw(raw["benchmark"])
    if arguments.no_write:
        print(section(raw))


def one_work(
    arguments: argparse.Namespace, folder: Path, scratch: Path, model: str, mix: str, num_tasks: int, size: int,
    beside: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Speed of all systems in turn, then each one's peak bytes, and those of the engine with one task: the mean of the
    first (of the least rank) and the last (of the largest), each alone."""
    choice = Choice(model, folder, arguments.device)
    num_rounds = arguments.rounds + 1
    tasks = workload.make(mix, num_tasks, size, num_rounds, choice.vocabulary, choice.targets)
    budget = arguments.token_budget or TOKEN_BUDGETS[arguments.device]
    setting = Setting(choice, tasks, num_rounds, scratch, budget, arguments.chunk, torch.get_num_threads())
    print(f"{model}: {tasks.told}", flush=True)
    seconds, read = speeds(setting, beside)
    ends = [replace(setting, workload=replace(tasks, tasks=(task,))) for task in (tasks.tasks[0], tasks.tasks[-1])]

    def of_one(system: str) -> float:
        return statistics.mean(peak_bytes(alone, system, (0, 1)) for alone in ends)

    measured = [name for name in ("engine", *beside) if name not in ABLATIONS]
    peaks: dict[str, float] = {name: peak_bytes(setting, name, (0, 1)) for name in measured}
    is_of_one = "separate instances" not in peaks
    if is_of_one:  # so many do not fit
        peaks["separate instances"] = num_tasks * of_one("separate instances")
    return {
        "model": model, "work": tasks.told, "mix": mix, "num_tasks": num_tasks, "micro_batch_size": size,
        "token_budget": budget, "chunk_tokens": arguments.chunk, "seconds_by_round": seconds, "tokens_read": read,
        "effective_tokens": [tasks.num_tokens(r) for r in range(1, num_rounds)],
        "flops": [choice.flops(tasks.lengths(r)) for r in range(1, num_rounds)], "instances_are_of_one": is_of_one,
        "peak_bytes": peaks, "peak_bytes_of_one_task": of_one("engine"),
    }  # fmt: skip


def speeds(setting: Setting, beside: Sequence[str]) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """(seconds, tokens read) by system and counted round."""
    model = setting.choice.load()
    engine = setting.engine(sharing_copy(model))
    assert isinstance(engine, Engine)
    engine.export(setting.adapters)
    systems: dict[str, System] = {"engine": engine}
    systems |= {name: build(setting, name, model) for name in beside if name in SHARING}
    if "separate instances" in beside:
        systems["separate instances"] = instances = SeparateInstances(setting)
    seconds = measure(systems, setting.num_rounds, LOSS_TOLERANCE[setting.choice.device])
    if "separate instances" in beside:
        instances.close()
    return seconds, {name: system.num_tokens[1:] for name, system in systems.items()}


def measure(systems: Mapping[str, System], num_rounds: int, tolerance: float) -> dict[str, list[float]]:
    """Seconds by system and round, the first round left out. Exits if a round's losses differ."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    names = list(systems)
    for round_ in range(num_rounds):
        losses = {}
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            started = time.perf_counter()
            losses[name] = systems[name].run(round_)  # tells losses as numbers: it has ended
            seconds[name].append(time.perf_counter() - started)
        check_equal(losses, round_, tolerance)
        print(f"round {round_}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items()), flush=True)
    return {name: values[1:] for name, values in seconds.items()}


def check_equal(losses: Mapping[str, Losses], round_: int, tolerance: float) -> None:
    own = losses["engine"]
    for system, other in losses.items():
        worst = max(abs(other[task] / loss - 1) for task, loss in own.items())
        if not worst <= tolerance:
            raise SystemExit(f"round {round_}: losses of {system!r} differ by {worst:.2g}: {other}, engine {own}")


def summary(work: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By system: effective tokens per second (median and quartiles), how much faster the engine is (median of ratios
    within a round, least, most), tokens read for an effective one, TFLOP/s by `Choice.flops`, peak bytes."""
    rows = []
    own, tokens = work["seconds_by_round"]["engine"], work["effective_tokens"]
    for name, seconds in work["seconds_by_round"].items():
        rates = [t / s for t, s in zip(tokens, seconds, strict=True)]
        low, middle, high = statistics.quantiles(rates, n=4, method="inclusive")
        ratios = [theirs / ours for ours, theirs in zip(own, seconds, strict=True)]
        rows.append({
            "system": name, "rate": middle, "low": low, "high": high, "ratio": statistics.median(ratios),
            "least": min(ratios), "most": max(ratios), "read": sum(work["tokens_read"][name]) / sum(tokens),
            "teraflops": statistics.median(f / s / 1e12 for f, s in zip(work["flops"], seconds, strict=True)),
            "bytes": work["peak_bytes"].get(name),
        })  # fmt: skip
    return rows


def section(raw: Mapping[str, Any]) -> str:
    device = raw["benchmark"].removeprefix("side_by_side_")
    parts = [f"## Side by side, {device}", report.told(dict(raw)), _CONVENTIONS]
    parts += [f"![{what} of each system at each work](plots/{what}_{device}.png)" for what in ("speed", "bytes")]
    parts += [part for work in raw["work"] for part in section_of(work)]
    parts.append(f"Raw figures: `results/{raw['benchmark']}.json`.")
    return "\n\n".join(parts)


def section_of(work: Mapping[str, Any]) -> list[str]:
    """Heading, table, what else was found, goals."""
    header = ["system", "tokens read per effective", "effective tokens/s", "engine is faster by", "TFLOP/s", "peak MB"]
    summaries = summary(work)
    rows: list[list[object]] = [
        [
            row["system"], f"{row['read']:.2f}", f"{row['rate']:.0f} ({row['low']:.0f} to {row['high']:.0f})",
            "" if row["system"] == "engine" else f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})",
            f"{row['teraflops']:.3g}", "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.0f}",
        ]
        for row in summaries
    ]  # fmt: skip
    more = work["peak_bytes"]["engine"] / work["peak_bytes_of_one_task"]
    fewer = work["peak_bytes"]["separate instances"] / work["peak_bytes"]["engine"]
    measured = " (two were measured, so many would not fit)" if work["instances_are_of_one"] else ""
    parts = [
        f"### {work['model']}: {work['work']}", report.table(header, rows),
        f"Microbatches of at most {work['token_budget']} tokens, chunk {work['chunk_tokens']}. The engine with all"
        f" {work['num_tasks']} tasks holds {more:.2f} times the bytes of one alone (mean of the first and the last);"
        f" separate instances hold {fewer:.1f} times the engine's{measured}.",
    ]  # fmt: skip
    goals = GOALS.get((work["model"], work["mix"], work["num_tasks"], work["micro_batch_size"]), ())
    if goals:
        by_system = {row["system"]: row for row in summaries}
        parts.append(f"Goals: {'; '.join(goal.told(work, by_system) for goal in goals)}.")
    return parts


_CONVENTIONS = """Rates are medians over rounds, with quartiles; ratios are within a round, with least and most. The
first round warms up. TFLOP/s: 4 for each weight of a linear layer and effective token, plus causal attention; adapters,
padding and recomputation count as none."""


if __name__ == "__main__":
    main()
