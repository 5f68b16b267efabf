"""The stages of device_check.py that time kernels, linears, a layer, a model and the host.

Legend: T tokens, K inputs, N outputs of a linear.
"""

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks import bench_layer, bench_multi_lora
from benchmarks.bench_multi_lora import LAYER, Inputs, Point, Widths
from benchmarks.device_setting import FEW, MANY, Record, Setting, failure
from benchmarks.kernel_timing import ceilings, median_ms
from engine.alignment.microbatch import Microbatch
from engine.kernels import cupy_launcher
from engine.kernels.launch import Kernel
from engine.kernels.multi_lora.torch_ops import run as multi_lora


class EventLauncher:
    """A launcher that times each launch: by events on a GPU, else by the clock."""

    def __init__(self, launcher: Any) -> None:
        self._launcher, self.launches = launcher, list[tuple[str, Callable[[], float]]]()
        self._is_cuda = launcher.device.type == "cuda"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launcher, name)

    def launch(self, kernel: Kernel, *rest: Any) -> None:
        if self._is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self._launcher.launch(kernel, *rest)
            end.record()
            self.launches.append((kernel.name, lambda: begin.elapsed_time(end)))
        else:
            started = time.perf_counter()
            self._launcher.launch(kernel, *rest)
            seconds = time.perf_counter() - started
            self.launches.append((kernel.name, lambda: 1e3 * seconds))

    def times(self) -> list[tuple[str, float]]:
        """Return (kernel, milliseconds) of all launches since the last call, in order."""
        if self._is_cuda:
            torch.cuda.synchronize()
        launches, self.launches = self.launches, []
        return [(name, milliseconds()) for name, milliseconds in launches]


KERNEL_POINTS: tuple[tuple[str, Widths, int, tuple[int, ...]], ...] = (
    ("4096x4096, 16 tasks of 16", (4096, (4096,)), 16, (16,)), ("4096x11008, 16 of 16", (4096, (11008,)), 16, (16,)),
    ("q k v, 16 of 16", LAYER[0], 16, (16,)), ("gate up, 16 of 16", LAYER[2], 16, (16,)),
    ("down, 16 of 16", LAYER[3], 16, (16,)), ("4096x4096, 16 of 8 to 64", (4096, (4096,)), 16, (8, 16, 32, 64)),
    ("4096x4096, 64 of 8 to 64", (4096, (4096,)), 64, (8, 16, 32, 64)),
)  # fmt: skip


def time_kernels(setting: Setting) -> Iterator[Record]:
    """Yield the median of each launch of multi_lora with its bytes' rate, and of the base products (beta 0 and 1)."""
    copy_rate = ceilings(setting.device)["bytes_per_second"]
    for name, group, num_tasks, ranks in KERNEL_POINTS:
        point = setting.point(name, (group,), num_tasks, ranks)
        sets = [Inputs.drawn(point, point.groups[0], setting.device) for _ in range(1 if setting.is_dry else 3)]
        for writes in (True, False):
            milliseconds = launch_medians(sets, setting, writes)
            labels = launches_of(point, list(milliseconds), writes)
            for (label, size), value in zip(labels, milliseconds.values(), strict=True):
                rate = size / value * 1e3
                line = f"{name}: {label} {value:.4f} ms, {rate / 1e12:.2f} TB/s, {rate / copy_rate:.0%} of a copy"
                yield {"point": name, "writes": writes, "launch": label, "ms": value, "bytes": size, "line": line}
        for label, calls in base_products(sets).items():
            value = median_ms(calls, setting.rounds, setting.device)
            yield {"point": name, "product": label, "ms": value, "line": f"{name}: {label} {value:.4f} ms"}
        del sets


def launch_medians(sets: Sequence[Inputs], setting: Setting, writes: bool) -> dict[str, float]:
    """Return median milliseconds of each launch of a forward and backward, by its place in the order and its name."""
    launcher, samples = EventLauncher(setting.launcher), defaultdict[str, list[float]](list)
    for turn in range(setting.rounds + 2):
        if setting.device.type == "cuda":
            torch.cuda._sleep(3_000_000)  # the queue is not empty while the host launches
        bench_multi_lora.ours(sets[turn % len(sets)], launcher, writes)  # type: ignore[arg-type]
        for place, (kernel, milliseconds) in enumerate(launcher.times()):
            samples[f"{place} {kernel}"] += [milliseconds] if turn >= 2 else []
    return {key: statistics.median(values) for key, values in samples.items()}


def launches_of(point: Point, names: Sequence[str], writes: bool) -> list[tuple[str, int]]:
    """Return (what a launch does, bytes of the streams that it must pass) for launches in order."""
    (width_in, widths_out), size = point.groups[0], point.dtype.itemsize
    x, y = point.num_tokens * width_in * size, point.num_tokens * sum(widths_out) * size
    kernels = [name.split("multi_lora_")[-1].rsplit("_", 1)[0] for name in names]
    last_outer = max(i for i, kernel in enumerate(kernels) if kernel == "outer")
    what = []
    for i, kernel in enumerate(kernels):
        if i == 0:
            what.append(("S from X (shrink)", x))
        elif i == 1:
            what.append(("Y written (expand)", y) if writes else ("Y added to (expand)", 2 * y))
        elif kernel == "expand":
            what.append(("dX written (expand)", x))
        elif i == last_outer:
            what.append(("dA from X (outer)", x))
        else:
            names_by_kernel = {"shrink_outer": "E and dB from dY (shrink_outer)", "shrink": "E from dY (shrink)"}
            what.append((names_by_kernel.get(kernel, "dB from dY (outer)"), y))
    return what


def base_products(sets: Sequence[Inputs]) -> dict[str, list[Callable[[], object]]]:
    """Return the frozen products of the first operator, on fresh and on written results."""
    triples = [(i.x, i.operators[0].weight_KN, i.dys[0]) for i in sets]
    outputs = [(torch.zeros_like(dy), torch.zeros_like(x)) for x, _, dy in triples]
    pairs = list(zip(triples, outputs, strict=True))
    return {
        "X W, beta 0": [lambda x=x, w=w: x @ w for x, w, _ in triples],  # type: ignore[misc]
        "X W, beta 1": [lambda x=x, w=w, y=y: y.addmm_(x, w) for (x, w, _), (y, _) in pairs],  # type: ignore[misc]
        "dY W^T, beta 0": [lambda w=w, dy=dy: dy @ w.T for _, w, dy in triples],  # type: ignore[misc]
        "dY W^T, beta 1": [lambda w=w, dy=dy, dx=dx: dx.addmm_(dy, w.T) for (_, w, dy), (_, dx) in pairs],  # type: ignore[misc]
    }


def compare_contenders(setting: Setting) -> Iterator[Record]:
    """Yield multi_lora beside block-diagonal cuBLAS, grouped_mm and HF PEFT, with errors against float64."""
    layer = list(LAYER)
    for name, groups, num_tasks, ranks in (
        ("4096x4096", layer[1:2], 16, (16,)), ("layer's linears", layer, 16, (16,)),
        ("layer's linears", layer, 16, (8, 16, 32, 64)), ("layer's linears", layer, 64, (8, 16, 32, 64)),
    ):  # fmt: skip
        if setting.remaining < 5:
            yield {"error": "out of time", "line": f"{name}, {num_tasks} tasks: no time left"}
            return
        point = setting.point(name, groups, num_tasks, ranks)
        try:
            figures = bench_multi_lora.measured(point, setting.launcher, setting.device, setting.rounds, 1)
        except Exception as error:
            yield failure(f"{name}, {num_tasks} tasks", error)
            continue
        yield {"point": figures, "line": compared(f"{name}, {num_tasks} tasks, ranks {ranks}", figures)}


def compared(name: str, figures: Record) -> str:
    times = {key: value["ms"] for key, value in figures["times"].items()}
    shares = ", ".join(f"{key} {ms / times['frozen'] - 1:+.1%}" for key, ms in times.items() if key != "frozen")
    left_out = "".join(f"; {key} left out: {why[:80]}" for key, why in figures.get("left_out", {}).items())
    return f"{name}: frozen {times['frozen']:.2f} ms, {shares}{left_out}"


def time_layer(setting: Setting) -> Iterator[Record]:
    """Yield a whole layer beside the same without tasks and HF PEFT's, and the bytes that it keeps for a token."""
    points = [bench_layer.Point(MANY, 16, (16,)), bench_layer.Point(MANY, 16), bench_layer.Point(FEW, 16, (16,))]
    for point in bench_layer.points(True) if setting.is_dry else points:
        name = f"layer, {point.num_tokens} tokens, {point.num_tasks} tasks, ranks {point.ranks}"
        try:
            figures = bench_layer.measured(point, setting.device, setting.rounds)
            kept = bytes_per_token(point, setting) if setting.device.type == "cuda" else float("nan")
        except Exception as error:
            yield failure(name, error)
            continue
        yield {"point": figures, "kept": kept, "line": f"{compared(name, figures)}; keeps {kept:.0f} bytes a token"}


def bytes_per_token(point: bench_layer.Point, setting: Setting) -> float:
    """Return what forward and backward hold at most beyond weights and adapters, by token."""
    layer = bench_layer.Layer(point, setting.device)
    resident = frozenset(layer.names)
    layer.run(resident)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer.run(resident)
    return (torch.cuda.max_memory_allocated() - before) / point.num_tokens


def time_host(setting: Setting) -> Iterator[Record]:
    """Yield host microseconds of multi_lora's forward and backward, into leaves with gradients, and of a launch."""
    for num_tasks in (1, 16, 64):
        for num_operators in (1, 2, 3):
            point = setting.point("", ((1024, (1024,) * num_operators),), num_tasks, (16,))
            point = dataclasses.replace(point, num_tokens=min(point.num_tokens, FEW))
            inputs = Inputs.drawn(point, point.groups[0], setting.device)
            forward_us, backward_us, launch_us = host_costs(inputs, setting)
            line = (
                f"{num_operators} operators, {num_tasks} tasks: forward {forward_us:.0f} us, "
                f"backward {backward_us:.0f} us, a launch {launch_us:.1f} us"
            )
            yield {
                "operators": num_operators, "tasks": num_tasks, "forward_us": forward_us, "backward_us": backward_us,
                "launch_us": launch_us, "line": line,
            }  # fmt: skip


def host_costs(inputs: Inputs, setting: Setting) -> tuple[float, float, float]:
    """Return median microseconds of forward, of backward, and of one call of the launcher within them."""
    launches: list[float] = []
    launcher = setting.launcher

    class Clocked(EventLauncher):
        def launch(self, kernel: Kernel, *rest: Any) -> None:
            started = time.perf_counter()
            launcher.launch(kernel, *rest)
            launches.append(1e6 * (time.perf_counter() - started))

    original, cupy_launcher.launcher_of = cupy_launcher.launcher_of, lambda _: Clocked(launcher)  # type: ignore[assignment]
    try:
        times: list[list[float]] = [[], []]
        x_TK = inputs.x.clone().requires_grad_()
        for _ in range(setting.rounds + 3):
            synchronize(setting.device)
            started = time.perf_counter()
            ys = multi_lora(x_TK, inputs.operators)
            times[0].append(1e6 * (time.perf_counter() - started))
            synchronize(setting.device)
            started = time.perf_counter()
            torch.autograd.backward(ys, inputs.dys)
            times[1].append(1e6 * (time.perf_counter() - started))
    finally:
        cupy_launcher.launcher_of = original
    return statistics.median(times[0][3:]), statistics.median(times[1][3:]), statistics.median(launches)


def time_model(setting: Setting) -> Iterator[Record]:
    """Yield milliseconds of a training microbatch of 8 layers of Llama-3-8B's shape, and the GPU's busy share."""
    for num_tokens in (MANY, FEW):
        point = bench_layer.Point(num_tokens, 16, (16,), num_layers=8, vocabulary=128256)
        if setting.is_dry:
            point = dataclasses.replace(bench_layer.points(True)[0], num_layers=2)
        layer = bench_layer.Layer(point, setting.device)
        microbatch = with_targets(layer.microbatch)
        calls = [lambda layer=layer, microbatch=microbatch: layer.executor.run(microbatch)]  # type: ignore[misc]
        milliseconds = median_ms(calls, 2 if setting.is_dry else 8, setting.device)
        busy, kernels = busy_share(calls[0], setting)
        line = f"8 layers, {num_tokens} tokens, 16 tasks: {milliseconds:.1f} ms a microbatch, busy {busy:.0%}"
        yield {"tokens": num_tokens, "ms": milliseconds, "busy": busy, "kernels": kernels, "line": line}
        yield {"line": "; ".join(f"{name[:60]} {share:.1%}" for name, share in kernels[:8])}
        del layer


def with_targets(microbatch: Microbatch) -> Microbatch:
    """Return the microbatch with a target at each position, in the middle of a step: the optimizer does not run."""
    ranges = tuple(dataclasses.replace(r, num_step_target_tokens=r.num_tokens) for r in microbatch.ranges)
    return dataclasses.replace(microbatch, targets_T=microbatch.token_ids_T, ranges=ranges)


def busy_share(call: Callable[[], object], setting: Setting) -> tuple[float, list[tuple[str, float]]]:
    """Return the share of time in which kernels ran, and each kernel's share of that, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    is_cuda = setting.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        for _ in range(3):
            call()
        synchronize(setting.device)
        microseconds = 1e6 * (time.perf_counter() - started)
    times = {e.key: e.self_device_time_total if is_cuda else e.self_cpu_time_total for e in profiler.key_averages()}
    total = sum(times.values()) or float("nan")
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return total / microseconds, [(name, value / total) for name, value in ordered]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
