"""Times kernels: medians by events over rotating inputs, replays of a graph, launch cost, the card's rates.

A variant is a list of calls, one for each of several sets of inputs, so that a run does not find its inputs in the
cache. Variants of one point are timed in turn, in rounds, so that a ratio compares neighbours in time. Times are
milliseconds.
"""

import datetime
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
Calls = Sequence[Callable[[], object]]


def timed(variants: Mapping[str, Calls], rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Return for each variant median and quartiles, and host microseconds of a call.

    If a graph can be captured: also milliseconds and host microseconds of a call in its replay.
    """
    for calls in variants.values():
        for call in (*calls, *calls):  # compiles, loads, fills the allocator
            call()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name, calls in variants.items():
            samples[name].append(_one(calls[turn % len(calls)], device))
    results = {}
    for name, values in samples.items():
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        results[name] = {"ms": statistics.median(values), "low_ms": low, "high_ms": high}
        results[name]["launch_us"] = launch_cost(variants[name], device)
        if device.type == "cuda":
            results[name] |= replayed(variants[name], rounds)
    return results


def _one(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(200_000)  # the queue is not empty: the host's own cost stays outside
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def median_ms(calls: Calls, rounds: int, device: torch.device) -> float:
    """Return the median milliseconds of a call, after each has run twice."""
    for call in (*calls, *calls):
        call()
    return statistics.median(_one(calls[turn % len(calls)], device) for turn in range(rounds))


def launch_cost(calls: Calls, device: torch.device) -> float:
    """Return the microseconds of host time for one call, without waiting for the device."""
    values = []
    for call in [*calls, *calls]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        values.append(1e6 * (time.perf_counter() - started))
    return statistics.median(values)


def replayed(calls: Calls, rounds: int) -> dict[str, float]:
    """Return `graph_ms` and `graph_launch_us` of a call in a captured graph; {} if capture fails (see stderr)."""
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):  # whose tables the calls have just cached
            for call in calls:
                call()
    except RuntimeError as error:
        print(f"no graph: {error}", file=sys.stderr)
        return {}
    device = torch.device("cuda", torch.cuda.current_device())
    graph.replay()
    milliseconds = statistics.median(_one(graph.replay, device) for _ in range(rounds)) / len(calls)
    return {"graph_ms": milliseconds, "graph_launch_us": launch_cost([graph.replay], device) / len(calls)}


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Return ||result - reference|| / ||reference||, in float64."""
    return float((result.double() - reference.double()).norm() / reference.double().norm())


def ceilings(device: torch.device) -> dict[str, float]:
    """Measure the limits of this card: bytes/s of a large copy (read and written), bf16 FLOP/s of a large product."""
    if device.type != "cuda":
        return {"bytes_per_second": float("nan"), "flop_per_second": float("nan")}
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy_ms = statistics.median(_one(lambda: target.copy_(source), device) for _ in range(20))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    product_ms = statistics.median(_one(lambda: a @ b, device) for _ in range(20))
    return {"bytes_per_second": 2 * source.numel() / copy_ms * 1e3, "flop_per_second": 2 * 8192**3 / product_ms * 1e3}


def environment(device: torch.device) -> dict[str, Any]:
    """Return hardware, versions, commit, date and command of a run."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for module in ("cupy", "peft"):
        versions[module] = getattr(sys.modules.get(module), "__version__", None)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": versions,
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
    }


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
