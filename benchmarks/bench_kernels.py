"""Checks and times all kernels on a GPU, in one command: `make bench-kernels`, or

    PYTHONPATH=. python benchmarks/bench_kernels.py [--only NAME ...] [--lorafusion FOLDER] [--out FOLDER]

Writes kernels.json (raw figures, with hardware, versions, commit, date, command and the card's measured limits) and
kernels.md (one table) into FOLDER (default benchmarks/results) after every point, so that an interrupted run keeps its
results; at the end it copies the table into RESULTS.md. Each time is shown with its two lower bounds on this card, by
bytes and by FLOPs. If the frozen operator is timed too, the bounds are those of the adapters' additional work.
`--lorafusion`: a clone of LoRAFusion's repository, which is then timed too.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    bench_grouped_gemm,
    bench_layer,
    bench_multi_adamw,
    bench_multi_affine,
    bench_multi_grad_norm,
    bench_multi_lora,
    bench_segment_cross_entropy,
    report,
)
from benchmarks.kernel_timing import ceilings, environment
from benchmarks.lorafusion import LoraFusion, NotDoneError
from engine.kernels.launch import Launcher

HEADER = (
    "kernel", "point", "tokens", "tasks", "ours ms", "in a graph", "launch us", "in a graph", "floors ms: bytes, FLOPs",
    "over floor", "beside it", "error: ours, others", "left out",
)  # fmt: skip
Jobs = dict[str, list[Callable[[], dict[str, Any]]]]


def jobs(
    launcher: Launcher, device: torch.device, rounds: int, is_small: bool, peers: Mapping[str, Any] | None = None
) -> Jobs:
    """Return by kernel one call for each point."""
    sets, at = (1 if is_small else 3), (launcher, device, rounds)
    cross_entropy = bench_segment_cross_entropy
    return {
        "multi_lora": [
            lambda p=p: bench_multi_lora.measured(p, *at, sets, peers) for p in bench_multi_lora.points(is_small)
        ],
        "layer": [lambda p=p: bench_layer.measured(p, device, rounds) for p in bench_layer.points(is_small)],
        "grouped_gemm": [
            lambda p=p: bench_grouped_gemm.measured(p, *at, sets) for p in bench_grouped_gemm.points(is_small)
        ],
        "multi_affine": [
            lambda p=p: bench_multi_affine.measured(p, *at, sets) for p in bench_multi_affine.points(is_small)
        ],
        "multi_grad_norm": [
            lambda s=s: bench_multi_grad_norm.measured(s, *at) for s in bench_multi_grad_norm.sizes(is_small)
        ],
        "multi_adamw": [lambda s=s: bench_multi_adamw.measured(s, *at) for s in bench_multi_adamw.sizes(is_small)],
        "segment_cross_entropy": [lambda s=s: cross_entropy.measured(*s, *at) for s in cross_entropy.shapes(is_small)],
    }


def run(chosen: Jobs, device: torch.device, out: Path, minutes: float) -> dict[str, Any]:
    """Run all points until the minutes are over.

    The record has the number of points that were left out, and the errors of points that failed.
    """
    torch.manual_seed(0)
    ends = time.monotonic() + 60 * minutes
    record: dict[str, Any] = {"ceilings": ceilings(device), "points": [], "left_out": 0, "failed": []}
    out.mkdir(parents=True, exist_ok=True)
    for kernel, measure in [(name, measure) for name, measures in chosen.items() for measure in measures]:
        if time.monotonic() > ends:
            record["left_out"] += 1
            continue
        try:
            point = {"kernel": kernel, **measure()}
        except Exception as error:  # the other points are measured all the same
            record["failed"].append(f"{kernel}: {type(error).__name__}: {error}")
            print(record["failed"][-1], flush=True)
            continue
        record["points"].append(point)
        record["environment"] = environment(device)
        (out / "kernels.json").write_text(json.dumps(record, indent=1) + "\n")
        (out / "kernels.md").write_text(page(record))
        print(" | ".join(row(point, record["ceilings"])), flush=True)
    print(f"{record['left_out']} points left out: no time", flush=True)
    return record


def page(record: Mapping[str, Any]) -> str:
    """Return the table with its origin."""
    where, limits = record["environment"], record["ceilings"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    lines = [HEADER, ["---"] * len(HEADER), *(row(point, limits) for point in record["points"])]
    return (
        f"`{where['command']}` at commit {where['commit']}, {where['date']}, on {where['device']} (driver "
        f"{where['driver']}; {versions}).\nIts own ceilings: {limits['bytes_per_second'] / 1e12:.2f} TB/s of a copy, "
        f"{limits['flop_per_second'] / 1e12:.0f} TFLOP/s of a bf16 product. {record['left_out']} points left out, "
        f"{len(record['failed'])} failed{''.join(f'; {why}' for why in record['failed'])}.\n\n"
        + "\n".join("| " + " | ".join(line) + " |" for line in lines)
        + "\n"
    )


def row(point: Mapping[str, Any], limits: Mapping[str, float]) -> list[str]:
    """Return one line of the table, under HEADER."""
    times, ours = point["times"], point["times"]["ours"]
    spent, prefix = ours["ms"], ""
    if "frozen" in times:
        spent, prefix = ours["ms"] - times["frozen"]["ms"], "extra_"
    floors = [
        1e3 * point[f"{prefix}bytes"] / limits["bytes_per_second"],
        1e3 * point[f"{prefix}flop"] / limits["flop_per_second"],
    ]
    beside = [_beside(name, times[name]["ms"], times) for name in times if name != "ours"]
    added = f" ({_share(ours['ms'], times)})" if "frozen" in times else ""
    return [
        point["kernel"], point["point"], str(point.get("tokens", "")), str(point.get("tasks", "")),
        f"{ours['ms']:.3f}{added}", _or_dash(ours, "graph_ms", 3), f"{ours['launch_us']:.0f}",
        _or_dash(ours, "graph_launch_us", 1), f"{floors[0]:.3f}, {floors[1]:.3f}", f"{spent / max(floors):.2f}",
        "; ".join([*beside, *_choice(point)]), "; ".join(worst_errors(point["errors"])),
        "; ".join(f"{name}: {why}" for name, why in point.get("left_out", {}).items()),
    ]  # fmt: skip


def _choice(point: Mapping[str, Any]) -> list[str]:
    """Compare the variant that the shape chooses with the faster of the two."""
    return [f"chosen: {', '.join(point['chosen'])}, faster: {point['faster']}"] if "chosen" in point else []


def _beside(name: str, milliseconds: float, times: Mapping[str, Any]) -> str:
    share = f" ({_share(milliseconds, times)})" if "frozen" in times and name != "frozen" else ""
    return f"{name} {milliseconds:.3f}{share}"


def _share(milliseconds: float, times: Mapping[str, Any]) -> str:
    """Return the time added to the frozen operator."""
    return f"{100 * (milliseconds / times['frozen']['ms'] - 1):+.1f}%"


def _or_dash(times: Mapping[str, float], name: str, digits: int) -> str:
    return f"{times[name]:.{digits}f}" if name in times else "-"


def worst_errors(errors: Mapping[str, Any]) -> list[str]:
    """Return the worst error of each variant."""
    worst = {name: max(value.values()) if isinstance(value, dict) else value for name, value in errors.items()}
    return [f"{name} {value:.1e}" for name, value in worst.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="kernels, or `layer`; default: all")
    parser.add_argument("--lorafusion", type=Path, metavar="FOLDER", help="a clone of its repository")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=20.0)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit(
            "bench-kernels needs a CUDA device, and torch sees none. The kernels' tests run without: make test-kernels"
        )
    from engine.kernels.cupy_launcher import launcher_of

    device = torch.device("cuda", torch.cuda.current_device())
    try:
        peers = {"lorafusion": bench_multi_lora.beside(LoraFusion(options.lorafusion))} if options.lorafusion else None
    except NotDoneError as error:
        sys.exit(f"--lorafusion: {error}")
    all_jobs = jobs(launcher_of(device), device, options.rounds, False, peers)
    if unknown := set(options.only or ()) - set(all_jobs):
        parser.error(f"--only {', '.join(sorted(unknown))}: there are {', '.join(all_jobs)}")
    chosen = {name: measures for name, measures in all_jobs.items() if name in (options.only or all_jobs)}
    record = run(chosen, device, options.out, options.minutes)
    if options.out == report.RESULTS and record["points"]:
        report.put_on_page("kernels", f"## Kernels\n\n{page(record)}")
    if record["failed"]:
        sys.exit(f"{len(record['failed'])} points failed: {'; '.join(record['failed'])}")


if __name__ == "__main__":
    main()
