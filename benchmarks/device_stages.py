"""The stages of device_check.py that check and count; those that time are in device_timings.py.

On a machine without a GPU they run with small sizes, on the kernels' host launcher (`Setting.is_dry`), to show that
none of them fails for a reason that has nothing to do with a GPU.
"""

import csv
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import metadata

import torch

from benchmarks import bench_kernels, bench_multi_lora
from benchmarks.bench_multi_lora import Inputs
from benchmarks.device_setting import FEW, MANY, Record, Setting, failure
from benchmarks.kernel_timing import ROOT, ceilings, environment
from engine.kernels import compile as compiler
from engine.kernels.launch import Kernel

REGISTERS = ROOT / "tests" / "engine" / "kernels" / "registers.json"
PROFILED_METRICS = (
    "smsp__inst_executed.sum", "smsp__issue_active.avg.pct_of_peak_sustained_active", "dram__bytes.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active", "lts__t_bytes.sum", "gpu__time_duration.sum",
)  # fmt: skip


def measure_ceilings(setting: Setting) -> Iterator[Record]:
    """Yield versions, the signature of varlen_attn, and this card's rates of a copy and of a bf16 product."""
    from torch.nn.attention.varlen import varlen_attn

    where = environment(setting.device)
    where["commit"] = setting.commit or where["commit"]
    for name in ("transformers", "peft", "numpy", "cupy-cuda13x", "hypothesis"):
        with suppress(metadata.PackageNotFoundError):
            where["versions"][name] = metadata.version(name)
    yield {"environment": where, "line": f"{where['device']}, driver {where['driver']}, {where['versions']}"}
    yield {"line": f"varlen_attn{inspect.signature(varlen_attn)}"}
    yield {"line": output_of(["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv,noheader"])}
    rates = ceilings(setting.device)
    copy, product = rates["bytes_per_second"] / 1e12, rates["flop_per_second"] / 1e12
    yield {"ceilings": rates, "line": f"copy {copy:.2f} TB/s, bf16 product {product:.0f} TFLOP/s"}


def launch_all(setting: Setting) -> Iterator[Record]:
    """Yield each kernel's registers and local memory as the driver loads it, then each checked on a small input."""
    expected = json.loads(REGISTERS.read_text())
    names = {source: list(kernels) for source, kernels in expected["sm_90"].items()}
    for source in () if setting.is_dry else compiler.sources():
        try:
            for name in names[source]:
                function = setting.launcher.function(Kernel(source, name), 0)
                registers, local = function.num_regs, function.local_size_bytes
                yield {"kernel": name, "registers": registers, "local_bytes": local, "line": ""}
            yield {"line": f"{source}: {len(names[source])} kernels loaded"}
        except Exception as error:
            yield failure(source, error)
    jobs = bench_kernels.jobs(setting.launcher, setting.device, 2, True)
    for kernel, measures in jobs.items():
        for measure in measures:
            try:
                point = measure()
                errors = "; ".join(bench_kernels.worst_errors(point["errors"]))
                yield {"point": point, "line": f"{kernel}: right, {errors}"}
            except Exception as error:
                yield failure(kernel, error)


def test_kernels(setting: Setting) -> Iterator[Record]:
    yield from pytest_run(setting, ["tests/engine/kernels"])


def test_runtime(setting: Setting) -> Iterator[Record]:
    files = ("test_attention.py", "test_staging.py", "test_cuda_graphs_on_device.py")
    yield from pytest_run(setting, [f"tests/engine/runtime/{name}" for name in files])


def pytest_run(setting: Setting, paths: Sequence[str]) -> Iterator[Record]:
    """Run the tests that need a GPU, at most 15 of them failing. Without a GPU they are collected and skipped."""
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--timeout=60", "--maxfail=15", "--tb=short"]
    done = run([sys.executable, "-m", "pytest", *options, *paths], setting)
    failed = [line for line in done.splitlines() if line.startswith(("FAILED", "ERROR"))]
    for line in failed:
        yield {"failed": line, "line": line}
    summaries = [line for line in done.splitlines() if re.search(r"\d+ (passed|skipped|failed)", line)]
    summary = summaries[-1] if summaries else ""
    yield {"tail": done[-6000:], "line": summary.strip("= ") or f"no summary: {done[-300:]}"}
    if not summary or failed or re.search(r"\d+ (failed|error)", summary):
        yield {"error": "tests failed", "line": "the tests' output is in the JSON"}


def launch_once(setting: Setting) -> None:
    """Run forward and backward once: what a profiler counts."""
    point = setting.point("", ((4096, (4096,)),), 16, (16,))
    inputs = Inputs.drawn(point, point.groups[0], setting.device)
    for writes in (True, False):
        bench_multi_lora.ours(inputs, setting.launcher, writes)


def count_instructions(setting: Setting) -> Iterator[Record]:
    """Yield what Nsight Compute counts in each kernel of `launch_once`."""
    if shutil.which("ncu") is None:
        yield {"line": "ncu is not installed: nothing was counted"}
        return
    once = [sys.executable, "benchmarks/device_check.py", "--launch-once"]
    options = ["--clock-control", "none", "--csv", "--kernel-name", "regex:multi_lora"]
    command = ["ncu", *options, "--metrics", ",".join(PROFILED_METRICS), *once]
    text = run(command, setting)
    rows = counts_of(text)
    for kernel, counts in rows:
        values = ", ".join(f"{name.split('.')[0]} {value}" for name, value in counts.items())
        yield {"kernel": kernel, "counts": counts, "line": f"{kernel}: {values}"}
    if not rows:
        yield {"error": "no counts", "tail": text[-3000:], "line": "ncu's output has no counts; it is in the JSON"}


def counts_of(text: str) -> list[tuple[str, dict[str, str]]]:
    """Return (kernel, value with unit by metric) of each launch in ncu's CSV, which other output may surround."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, tuple[str, dict[str, str]]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(line for line in lines[start:] if line.startswith('"')))):
        _, counts = launches.setdefault(row["ID"], (row["Kernel Name"].split("(")[0], {}))
        counts[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(launches.values())


def compare_bits(setting: Setting) -> Iterator[Record]:
    """Yield whether a product's bits are equal with beta 0 and 1, and for the same rows among more rows."""
    width = 64 if setting.is_dry else 4096
    dtype = torch.bfloat16
    weight = torch.randn(width, width, device=setting.device).to(dtype)
    x = torch.randn(setting.tokens(MANY), width, device=setting.device).to(dtype)
    sizes = (32, 70) if setting.is_dry else (512, FEW, MANY)
    first = x[: sizes[0]] @ weight
    for size in sizes:
        fresh, added = x[:size] @ weight, torch.zeros(size, width, device=setting.device, dtype=dtype)
        added.addmm_(x[:size], weight)
        same_beta, same_rows = torch.equal(fresh, added), torch.equal(fresh[: sizes[0]], first)
        beta, rows = ("equal" if same else "different" for same in (same_beta, same_rows))
        line = f"{size} rows: beta 0 and 1 give {beta} bits; the first {sizes[0]} rows alone give {rows} bits"
        yield {"rows": size, "same_beta": same_beta, "same_rows": same_rows, "line": line}


def sanitize(setting: Setting) -> Iterator[Record]:
    """Run three tests under compute-sanitizer: memory accesses, then races in shared memory."""
    if shutil.which("compute-sanitizer") is None:
        yield {"line": "compute-sanitizer is not installed: nothing was checked"}
        return
    file = "tests/engine/kernels/multi_lora/test_device_products.py"
    shapes = ("split columns", "one pass, floats", "split tokens")
    tests = [f"{file}::test_hostile_shapes[gpu-{shape}]" for shape in shapes]
    for tool in ("memcheck", "racecheck"):
        pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *tests]
        text = run(["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *pytest], setting)
        summary = [line for line in text.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
        is_clean = bool(summary) and all(re.search(r"SUMMARY: 0 (errors|hazards)", line) for line in summary)
        yield {"tool": tool, "tail": text[-4000:], "line": f"{tool}: {'; '.join(summary) or 'no summary'}"} | (
            {} if is_clean else {"error": f"{tool} reports errors or did not end"}
        )


def compare_side_by_side(setting: Setting) -> Iterator[Record]:
    """Run side_by_side.py on the 7B shape: 8 tasks, in turn with HF PEFT on the same base weights."""
    command = [sys.executable, "benchmarks/side_by_side.py", "--device", "cuda", "--works", "1", "--rounds", "3"]
    if setting.is_dry:  # its imports are what can be tried without one
        text = run(command, setting)
        yield {"line": text.strip()} | ({} if "needs a CUDA device" in text else {"error": "another answer"})
        return
    text = run([*command, "--seconds", str(int(setting.remaining)), "--no-write"], setting)
    yield {"text": text[-12000:], "line": text[-2500:]}
    if "engine is faster by" not in text:
        yield {"error": "no table", "line": "side_by_side.py printed no table; its output is in the JSON"}


def run(command: Sequence[str], setting: Setting) -> str:
    """Return the output of a command in the repository's root, ended when the stage's time is over."""
    limit = max(5.0, setting.remaining - 2)
    with tempfile.TemporaryFile() as output:  # no pipe: what the command leaves behind could hold it open
        try:
            subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            output.seek(0, io.SEEK_END)
            output.write(f"\nended after {limit:.0f} s: out of time\n".encode())
        output.seek(0)
        return output.read().decode(errors="replace")


def output_of(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {type(error).__name__}"
