"""Measures what a mesh costs beside training: start, re-planning, waiting for data, tracing. It runs real processes.

    PYTHONPATH=. python benchmarks/mesh_costs.py [--repeats 7] [--pairs 40] [--backbone FOLDER] [--threads 1]

- **up**: from the start of `muxtune up` to the line that says that it serves; the first time (it creates certificates
  and prepares the backbone) and again. It includes calibration (6 s, the default).
- **first step**: from the answer of CreateTask until its watcher receives step 1, on a mesh without other tasks.
- **re-plan pause**: two tasks train, a third arrives. The idle time between two steps of a running task is their
  distance (of the times at which admission committed them) without the device seconds of all tasks' steps in between.
  Optimizer steps and reports count as idle, so the usual idle time, its median before the arrival, is subtracted. The
  pause is the sum of the rest, from the answer to the arrival until the new task's first step, compared with the median
  round before it.
- **wait for data**: the fraction of time in which the executor had tasks but ran none, from DescribeExecutor.
- **tracing**: one task on a mesh that sends its spans to an OTLP receiver in a separate process. Turns of `--steps`
  steps with and without recorded spans alternate (`turns.py`, `switched_spans.py`). Ratios, with tracing to without, of
  the seconds of a step and of the CPU seconds of all processes; 95 % intervals by bootstrap of the pairs of turns.
"""

import argparse
import itertools
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from benchmarks import report
from benchmarks.turns import Cost, cost_of, take_turns, turn, with_descendants
from muxtune.client import Client
from muxtune.local.mesh import Mesh
from muxtune.v1 import execution_pb2, execution_pb2_grpc, task_pb2
from tests.tiny_backbone import write_backbone

GOALS = {"pause": 1.0, "wait": 0.01, "tracing": 0.01}
SHAPE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6}
ROWS = [{"text": " ".join(["a row of words to learn from"] * (1 + i % 5))} for i in range(64)]
WARM_STEPS = 10
ROOT = Path(__file__).parents[1]
NAME = "measured"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement")
    parser.add_argument("--pairs", type=int, default=40, help="of turns, with tracing and without")
    parser.add_argument("--steps", type=int, default=30, help="of a turn")
    parser.add_argument("--threads", type=int, default=1, help="of torch: the services want a core as well")
    parser.add_argument("--backbone", type=Path, help="GGUF file or Hugging Face folder; default: random, 6 x 192")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="muxtune-bench-") as scratch:
        backbone = arguments.backbone or write_backbone(Path(scratch) / "backbone", **SHAPE)
        figures = measure(Path(scratch), backbone, arguments)
    settings = {name: getattr(arguments, name) for name in ("repeats", "pairs", "steps", "threads")}
    raw = report.origin("mesh_costs") | settings | {"backbone": str(arguments.backbone or SHAPE), "found": figures}
    if arguments.no_write:
        print(section(raw))
    else:
        report.write(raw, section(raw))


def measure(scratch: Path, backbone: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    switch, hook = scratch / "switch", scratch / "hook"
    switch.write_bytes(b"\1")
    hook.mkdir()
    (hook / "sitecustomize.py").write_text("import benchmarks.switched_spans\n")
    path = os.pathsep.join([str(hook), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        "*": {"PYTHONPATH": path, "MUXTUNE_TRACING_SWITCH": str(switch)},
        "execution": {"MUXTUNE_NUM_THREADS": str(arguments.threads), "MUXTUNE_CHECKPOINT_STEPS": "100000"},
    }
    figures: dict[str, Any] = {"up": [seconds_of_up(scratch / "up", backbone) for _ in range(2)]}
    with (
        receiving() as receiver,
        Mesh(scratch / "mesh", {NAME: backbone}, receiver.endpoint, environment=environment) as mesh,
        mesh.client() as client,
    ):
        dataset = client.upload_dataset(ROWS).name
        figures["first_step"] = [seconds_to_first_step(client, dataset) for _ in range(arguments.repeats)]
        figures |= replans(mesh, client, dataset, arguments.repeats)
        steps = Steps(client, client.create_task(spec(dataset, 1_000_000, 1)).name)
        steps.wait(WARM_STEPS)
        processes = [process for service in mesh.processes.values() for process in with_descendants(service.pid)]
        before = receiver.num_spans()
        pairs = take_turns(partial(write, switch), lambda: turn(steps, processes, arguments.steps), arguments.pairs)
        turns = [[vars(each) for each in pair] for pair in pairs]
        figures["tracing"] = {"pairs": turns, "spans": receiver.num_spans() - before}
        client.cancel_task(steps.task)
        steps.join()
    return figures


def write(switch: Path, is_on: bool) -> None:
    with switch.open("r+b") as file:  # in place: it is mapped
        file.write(bytes([is_on]))


def seconds_of_up(data: Path, backbone: Path) -> float:
    command = [sys.executable, "-m", "muxtune.cli.main", "up", "--data", str(data), "--backbone", f"{NAME}={backbone}"]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if len(lines) == 2:  # "starting on ...", then the line with the addresses
                break
        seconds = time.perf_counter() - started
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"muxtune up ended with {process.returncode}: {''.join(lines)}")
    return seconds


def spec(dataset: str, num_steps: int, seed: int) -> task_pb2.TaskSpec:
    return task_pb2.TaskSpec(
        backbone=NAME, dataset=dataset, lora=task_pb2.Lora(rank=8, alpha=16, target_modules=["q_proj", "v_proj"]),
        training=task_pb2.Training(
            learning_rate=1e-4, num_steps=num_steps, max_sequence_tokens=64, global_batch_size=8, micro_batch_size=4,
            seed=seed,
        ),
    )  # fmt: skip


def seconds_to_first_step(client: Client, dataset: str) -> float:
    name = client.create_task(spec(dataset, 2, 0)).name
    acknowledged = time.perf_counter()
    seconds = 0.0
    for event in client.watch_task(name):
        if event.WhichOneof("event") == "step_done" and not seconds:
            seconds = time.perf_counter() - acknowledged
    return seconds


class Steps(threading.Thread):
    """Follows a task: records when each step was committed, and its device seconds."""

    def __init__(self, client: Client, task: str) -> None:
        super().__init__(daemon=True)
        self._client, self.task = client, task
        self.times: list[float] = []
        self.device_seconds: list[float] = []
        self._news = threading.Condition()
        self.start()

    def run(self) -> None:
        for event in self._client.watch_task(self.task):
            if event.WhichOneof("event") == "step_done":
                with self._news:
                    self.times.append(event.time.ToNanoseconds() / 1e9)
                    self.device_seconds.append(event.step_done.device_seconds)
                    self._news.notify_all()

    def wait(self, count: int) -> None:
        with self._news:
            if not self._news.wait_for(lambda: len(self.times) >= count, timeout=600):
                raise SystemExit(f"{self.task} did not complete {count} steps in ten minutes")


def replans(mesh: Mesh, client: Client, dataset: str, repeats: int) -> dict[str, Any]:
    """Return `pauses`: for each arrival [pause, median round before it] in seconds; and `waits`: of each repeat."""
    running = [Steps(client, client.create_task(spec(dataset, 100_000, seed)).name) for seed in (2, 3)]
    newcomers: list[tuple[float, Steps]] = []
    waits = []
    for repeat in range(repeats):
        running[0].wait(len(running[0].times) + 2 * WARM_STEPS)
        name = client.create_task(spec(dataset, WARM_STEPS, 4 + repeat)).name
        newcomers.append((time.time(), Steps(client, name)))
        newcomers[-1][1].join()
        running[0].wait(len(running[0].times) + WARM_STEPS)
        waits.append(wait_fraction(mesh))
    for each in running:
        client.cancel_task(each.task)
        each.join()
    rounds = Rounds(running[0].times, [*running, *(steps for _, steps in newcomers)])
    return {"pauses": [rounds.pause(at, steps.times[0]) for at, steps in newcomers], "waits": waits}


class Rounds:
    """The times between the steps of one task, and the idle part of each."""

    def __init__(self, times: Sequence[float], tasks: Sequence[Steps]) -> None:
        self._ends = times[1:]
        self._gaps = [end - begin for begin, end in itertools.pairwise(times)]
        busy = [0.0] * len(self._ends)
        for steps in tasks:
            for at, seconds in zip(steps.times, steps.device_seconds, strict=True):
                busy[min(range(len(busy)), key=lambda i: abs(self._ends[i] - at))] += seconds
        self._idle = [gap - seconds for gap, seconds in zip(self._gaps, busy, strict=True)]

    def pause(self, begin: float, end: float) -> list[float]:
        within = [i for i, at in enumerate(self._ends) if at > begin and at - self._gaps[i] < end]
        before = range(max(0, within[0] - WARM_STEPS), within[0])
        usual = statistics.median(self._idle[i] for i in before)
        pause = sum(self._idle[i] - usual for i in within)
        return [pause, statistics.median(self._gaps[i] for i in before)]


def wait_fraction(mesh: Mesh) -> float:
    with mesh.operator_channel("execution") as channel:
        stub = execution_pb2_grpc.ExecutionServiceStub(channel)
        described = stub.DescribeExecutor(execution_pb2.DescribeExecutorRequest(), timeout=30)
    return float(described.executor.device.data_wait_fraction)


class Receiver:
    """An OTLP receiver's process."""

    def __init__(self, endpoint: str, pipe: Connection) -> None:
        self.endpoint, self._pipe = endpoint, pipe

    def num_spans(self) -> int:
        self._pipe.send("how many?")
        return int(self._pipe.recv())


@contextmanager
def receiving() -> Iterator[Receiver]:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve_receiver, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Receiver(pipe.recv(), pipe)
    finally:
        process.terminate()
        process.join()


def _serve_receiver(pipe: Connection) -> None:
    num_spans = 0

    class Traces(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            nonlocal num_spans
            num_spans += sum(len(scope.spans) for each in request.resource_spans for scope in each.scope_spans)
            return trace_service_pb2.ExportTraceServiceResponse()

    class Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            return metrics_service_pb2.ExportMetricsServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Traces(), server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(Metrics(), server)
    address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    pipe.send(address)
    while pipe.recv():
        pipe.send(num_spans)


def section(raw: Mapping[str, Any]) -> str:
    figures = raw["found"]
    shares = [pause / round_ for pause, round_ in figures["pauses"]]
    wall, cpu = (
        cost_of([(one[what], other[what]) for one, other in figures["tracing"]["pairs"]])
        for what in ("wall_seconds", "cpu_seconds")
    )
    rows: list[list[object]] = [
        ["muxtune up, the first time", f"{figures['up'][0]:.1f} s", "", ""],
        ["muxtune up, again", f"{figures['up'][1]:.1f} s", "", ""],
        ["first step after CreateTask", *spread(figures["first_step"], "{:.2f} s"), ""],
        ["a round before an arrival", *spread([round_ for _, round_ in figures["pauses"]], "{:.3f} s"), ""],
        ["pause at an arrival", *spread([pause for pause, _ in figures["pauses"]], "{:.3f} s"), ""],
        ["the same, in rounds", *spread(shares, "{:.2f}"), verdict(shares, GOALS["pause"], "under {:.0f}")],
        ["executor waits for data", *spread(figures["waits"], "{:.2%}"), verdict(figures["waits"], GOALS["wait"])],
        ["tracing costs, of a step's seconds", *interval(wall), wall.verdict(GOALS["tracing"])],
        ["tracing costs, of all processes' CPU seconds", *interval(cpu), cpu.verdict(GOALS["tracing"])],
    ]
    return f"""
## Costs of a mesh

{report.describe_origin(dict(raw))}
Backbone {raw["backbone"]}, torch on {raw["threads"]} threads; {raw["repeats"]} repeats, medians; tracing by
{raw["pairs"]} pairs of turns of {raw["steps"]} steps (their sums, and the interval that holds it with 95 %),
{figures["tracing"]["spans"]} spans received.

{report.table(["what", "median", "lowest to highest", "goal"], rows)}

Raw figures: `results/mesh_costs.json`.
"""


def spread(values: Sequence[float], form: str) -> list[str]:
    return [form.format(statistics.median(values)), f"{form.format(min(values))} to {form.format(max(values))}"]


def verdict(values: Sequence[float], goal: float, form: str = "under {:.0%}") -> str:
    return f"{form.format(goal)}: {'held' if statistics.median(values) < goal else 'FAILED'}"


def interval(cost: Cost) -> list[str]:
    return [f"{cost.middle:+.2%}", f"{cost.low:+.2%} to {cost.high:+.2%}"]


if __name__ == "__main__":
    main()
