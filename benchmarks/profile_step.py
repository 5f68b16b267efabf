"""Profiles a training step by its parts, with torch's profiler, over rounds of side_by_side.py's work.

    PYTHONPATH=. python benchmarks/profile_step.py [--works 1] [--systems engine "peft, longest"]   (CPU)
    PYTHONPATH=. python benchmarks/profile_step.py --device cuda [--works 2]

Works are counted from 1 in CPU_WORK or CUDA_WORK of side_by_side.py. Each system runs alone, after two rounds that warm
it up, once as it is and then again with the profiler on; `op_groups.py` says to which part an operator belongs. Parts
sum to the profiled rounds' seconds: what no operator took (on a GPU: when no kernel ran) is "between operators", and
the profiler's own cost is in it.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import op_groups, report, side_by_side, workload
from benchmarks.instances import Setting, build, release
from benchmarks.models import Choice, smollm2
from benchmarks.op_groups import FROZEN, GROUPS, IDLE
from benchmarks.systems import BatchAndPad, Engine, OneAfterAnother, System
from engine.runtime.backbone import sharing_copy

_WARM_ROUNDS = 2
_SYSTEMS = ("engine", "peft, longest", "peft, flattened")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--works", type=int, nargs="+", help="default: those whose goals were missed last (1; 2)")
    parser.add_argument("--systems", nargs="+", default=_SYSTEMS, help="the engine's, peft's, batch and pad")
    parser.add_argument("--rounds", type=int, default=2, help="that are profiled")
    parser.add_argument("--backbone", type=Path, help="SmolLM2 as a Hugging Face folder or GGUF file")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    is_cpu = arguments.device == "cpu"
    listed = side_by_side.CPU_WORK if is_cpu else side_by_side.CUDA_WORK
    works = [listed[number - 1] for number in arguments.works or ((1,) if is_cpu else (2,))]
    origin, works = report.origin(f"profile_{arguments.device}"), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="muxtune-bench-") as scratch:
        folder = smollm2(arguments.backbone, Path(scratch))
        for i, (model, mix, num_tasks, size, _) in enumerate(works):
            choice, num_rounds = Choice(model, folder, arguments.device), _WARM_ROUNDS + 2 * arguments.rounds
            tasks = workload.make(mix, num_tasks, size, num_rounds, choice.vocabulary, choice.targets)
            budget = side_by_side.TOKEN_BUDGETS[arguments.device]
            setting = Setting(choice, tasks, num_rounds, Path(scratch) / str(i), budget, tasks.chunk_tokens(budget),
                              torch.get_num_threads())  # fmt: skip
            profiled = profiles(setting, arguments.systems, arguments.rounds)
            works.append({"model": model, "work": tasks.label, "systems": profiled,
                          "product_flops_per_second": choice.product_flops_per_second()})  # fmt: skip
    raw = origin | {"rounds": arguments.rounds, "works": works}
    print(section(raw))
    if not arguments.no_write:
        report.write(raw, section(raw))


def profiles(setting: Setting, names: list[str], num_rounds: int) -> dict[str, dict[str, Any]]:
    model = setting.choice.load()
    frozen = op_groups.frozen_shapes(model)
    engine = setting.engine(sharing_copy(model))
    engine.export(setting.adapters)
    del engine
    by_system = {}
    for name in names:
        release()
        figures = profiled(build(setting, name, model), num_rounds, frozen, setting.choice.device == "cuda")
        by_system[name] = figures | {"frozen_flops": setting.choice.linear_flops(figures["tokens"])}
        print(f"{name}: {by_system[name]['seconds']}", flush=True)
    return by_system


def profiled(system: System, num_rounds: int, frozen: set[op_groups.Shape], is_device: bool) -> dict[str, Any]:
    """Run warm-up rounds, `num_rounds` without the profiler, and as many with it. Return seconds and tokens."""
    for round_ in range(_WARM_ROUNDS):
        system.run(round_)
    plain_seconds = _seconds(system, range(_WARM_ROUNDS, _WARM_ROUNDS + num_rounds))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_device else [])]
    with op_groups.in_ranges(_models(system)), profile(activities=activities, record_shapes=True) as profiler:
        whole_seconds = _seconds(system, range(_WARM_ROUNDS + num_rounds, _WARM_ROUNDS + 2 * num_rounds))
    seconds = op_groups.seconds_by_group(profiler.events(), whole_seconds, frozen, is_device)
    tokens = [sum(system.num_tokens[_WARM_ROUNDS + i * num_rounds :][:num_rounds]) for i in range(2)]
    return {"seconds": seconds, "whole_seconds": whole_seconds, "plain_seconds": plain_seconds,
            "tokens": tokens[1], "plain_tokens": tokens[0]}  # fmt: skip


def _seconds(system: System, rounds: range) -> float:
    started = time.perf_counter()
    for round_ in rounds:
        system.run(round_)
    return time.perf_counter() - started


def _models(system: System) -> list[torch.nn.Module]:
    if isinstance(system, Engine):
        return [system.executor.backbone.model.base_model]
    if isinstance(system, OneAfterAnother):
        return [trainer.model for trainer in system.trainers]
    if isinstance(system, BatchAndPad):
        return [system.model]
    raise SystemExit(f"{type(system).__name__} cannot be profiled: its models are not within reach")


def section(raw: Mapping[str, Any]) -> str:
    device = raw["benchmark"].removeprefix("profile_")
    parts = [f"## Where a step's time goes, {device}", report.describe_origin(dict(raw)), _CONVENTIONS]
    for work in raw["works"]:
        parts += [f"### {work['model']}: {work['work']}", table(work["systems"], work["product_flops_per_second"])]
    return "\n\n".join([*parts, f"Raw figures: `results/{raw['benchmark']}.json`."])


def table(systems: Mapping[str, Mapping[str, Any]], product_flops_per_second: float) -> str:
    rows: list[list[object]] = [
        [group, *(f"{figures['seconds'][group]:.2f} s, {figures['seconds'][group] / figures['whole_seconds']:.1%}"
                  for figures in systems.values())]
        for group in GROUPS
    ]  # fmt: skip
    rows.append(["all of it", *(f"{figures['whole_seconds']:.2f} s" for figures in systems.values())])
    reached = [figures["frozen_flops"] / figures["seconds"][FROZEN] for figures in systems.values()]
    cells = (f"{flops / 1e12:.3g}, {flops / product_flops_per_second:.0%}" for flops in reached)
    rows.append([f"{FROZEN}: TFLOP/s, of a plain product", *cells])
    slower = [
        figures["whole_seconds"] / figures["tokens"] / (figures["plain_seconds"] / figures["plain_tokens"])
        for figures in systems.values()
    ]
    rows.append(["a token takes, of one without the profiler", *(f"{ratio:.2f}" for ratio in slower)])
    return report.table(["part of the step", *systems], rows)


_CONVENTIONS = f"""By torch's profiler, each system alone; `op_groups.py` tells which operator belongs to which part: by
the module that ran it, and in backward by the node's. Frozen GEMMs are the layers' and the head's, their FLOPs 4 for
each weight and token read, padding too; beside them stands a plain product of two square matrices of 2,048 (on a GPU
8,192), the fastest of ten in the same process, which packed weights can pass. Copies are those of all parts. The parts
sum to the whole: "{IDLE}" is the rest, on a CPU Python, the profiler and the pages of gradients, which come
before backward; on a GPU the time in which no kernel ran."""


if __name__ == "__main__":
    main()
