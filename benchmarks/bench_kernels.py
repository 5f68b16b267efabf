"""All kernels checked and timed on a GPU, in one command:

    PYTHONPATH=. python benchmarks/bench_kernels.py [--out FOLDER] [--rounds 30] [--minutes 8]

Writes kernels.json (raw figures, with hardware, versions, commit, date, command and the card's own ceilings) into
FOLDER (default benchmarks/results) after every point, so that a run that is cut off leaves what it has, and prints a
table: what adapters add to the frozen operator's time, and the time over the byte floor.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_multi_adamw, bench_multi_lora, bench_segment_cross_entropy
from benchmarks.kernel_timing import ceilings, environment
from engine.kernels.launch import Launcher


def run(
    launcher: Launcher, device: torch.device, out: Path, rounds: int, minutes: float, is_small: bool = False
) -> dict[str, Any]:
    """Everything, until the minutes are over; the record says what was left out."""
    torch.manual_seed(0)
    ends = time.monotonic() + 60 * minutes
    sets = 1 if is_small else 3
    jobs = [
        *(("multi_lora", lambda p=p: bench_multi_lora.measured(p, launcher, device, rounds, sets))
          for p in bench_multi_lora.points(is_small)),
        *(("multi_adamw", lambda s=s: bench_multi_adamw.measured(s, launcher, device, rounds))
          for s in bench_multi_adamw.sizes(is_small)),
        *(("segment_cross_entropy", lambda s=s: bench_segment_cross_entropy.measured(*s, launcher, device, rounds))
          for s in bench_segment_cross_entropy.shapes(is_small)),
    ]  # fmt: skip
    record: dict[str, Any] = {"ceilings": ceilings(device), "points": [], "left_out": 0}
    out.mkdir(parents=True, exist_ok=True)
    for kernel, measure in jobs:
        if time.monotonic() > ends:
            record["left_out"] += 1
            continue
        point = {"kernel": kernel, **measure()}
        record["points"].append(point)
        record["environment"] = environment(device)
        (out / "kernels.json").write_text(json.dumps(record, indent=1) + "\n")
        print(line(point, record["ceilings"]), flush=True)
    print(f"{record['left_out']} points left out: no time", flush=True)
    return record


def line(point: dict[str, Any], limits: dict[str, float]) -> str:
    """One row of the table."""
    times = {name: value["ms"] for name, value in point["times"].items()}
    shown = " ".join(f"{name} {ms:.3f}" for name, ms in times.items())
    what = f"{point['kernel']} {point['point']} {point.get('tokens', '')} tokens {point.get('tasks', '')} tasks"
    if "frozen" in times:
        added = {name: times[name] - times["frozen"] for name in ("ours", "cublas", "peft")}
        floor = 1e3 * point["extra_bytes"] / limits["bytes_per_second"]
        shares = " ".join(f"{name} {100 * ms / times['frozen']:+.1f}%" for name, ms in added.items())
        choice = f"rides: {', '.join(sorted(set(point['chosen'])))}, faster: {point['faster']}"
        return f"{what}: {shown} ms; {shares}; ours over the byte floor {added['ours'] / floor:.2f}; {choice}"
    floor = 1e3 * point["bytes"] / limits["bytes_per_second"]
    return f"{what}: {shown} ms; ours over the byte floor {times['ours'] / floor:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=8.0)
    arguments = parser.parse_args()
    from engine.kernels.device import launcher_of

    device = torch.device("cuda", torch.cuda.current_device())
    run(launcher_of(device), device, arguments.out, arguments.rounds, arguments.minutes)


if __name__ == "__main__":
    main()
