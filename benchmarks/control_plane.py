"""Measures admission beside a bare grpc.aio echo: requests per second and latencies of create, get and watch.

    PYTHONPATH=. python benchmarks/control_plane.py [--seconds 1.5] [--callers 16]

The mesh is as `muxtune up` starts it (TLS, SQLite that syncs each commit, spans to a file), without limits of tenants,
and with its scheduler suspended so that no training uses the CPU. The echo runs in a separate process and also answers
over TLS, with as many bytes as GetTask. `--callers` coroutines each send one call after another through one channel;
blocks of all calls alternate in the same run. CPU is stated per call, by the kernel's clocks: of the server's event
loop, of its other threads, and of the callers' process. Create creates the tasks of a sweep: one dataset, and another
learning rate for each task. Watch opens a stream and reads its first event.
"""

import argparse
import asyncio
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc

from benchmarks import report
from benchmarks.turns import cpu_seconds_of
from muxtune.local.mesh import Mesh
from muxtune.v1 import admission_pb2, admission_pb2_grpc, task_pb2
from tests.tiny_backbone import write_backbone

GOAL = 0.3  # of the echo's requests per second
BLOCKS = 15  # short ones: a neighbour on the machine then meets the echo as often as the others
WITHOUT_LIMITS = {
    "admission": {
        "MUXTUNE_REQUESTS_PER_SECOND": "1000000",
        "MUXTUNE_WATCH_EVENTS_PER_SECOND": "0",
        "MUXTUNE_MAX_UNFINISHED_TASKS": "0",
    }
}
PEERS = {"GetTask": "echo", "CreateTask": "echo", "WatchTask": "echo, stream"}
Call = Callable[[], Awaitable[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a block; each call has BLOCKS")
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="muxtune-bench-") as scratch:
        folder = Path(scratch) / "tiny"
        folder.mkdir()
        with Mesh(Path(scratch) / "data", {"tiny": write_backbone(folder)}, environment=WITHOUT_LIMITS) as mesh:
            blocks = asyncio.run(measure(mesh, arguments.seconds, arguments.callers))
    raw = report.origin("control_plane") | {"callers": arguments.callers, "blocks": blocks}
    if arguments.no_write:
        print(section(raw))
    else:
        report.write(raw, section(raw))


async def measure(mesh: Mesh, seconds: float, callers: int) -> dict[str, list[dict[str, float]]]:
    """Return by call the figures of each block. The first block of each call warms up and is not returned."""
    with mesh.client() as client:
        spec = task_pb2.TaskSpec(
            backbone="tiny", dataset=client.upload_dataset([{"text": "a row to learn from"}] * 8).name,
            lora=task_pb2.Lora(rank=4, alpha=8, target_modules=["q_proj"]),
            training=task_pb2.Training(learning_rate=1e-3, num_steps=100_000, max_sequence_tokens=64),
        )  # fmt: skip
        task = client.create_task(spec)
    trust = grpc.ssl_channel_credentials(mesh.ca.read_bytes())
    blocks_by_call: dict[str, list[dict[str, float]]] = {}
    with suspended(mesh, "scheduling"), echoing(mesh) as (address, echo_process):
        async with (
            grpc.aio.secure_channel(mesh.addresses["admission"], trust) as admission,
            grpc.aio.secure_channel(address, trust) as echo,
        ):
            calls = calls_of(mesh, admission, echo, task)
            for block in range(BLOCKS + 1):
                for name, call in calls.items():
                    server = mesh.processes["admission"].pid if name in PEERS else echo_process
                    figures = await run_block(call, seconds, callers, server)
                    if block:
                        blocks_by_call.setdefault(name, []).append(figures)
    return blocks_by_call


def calls_of(mesh: Mesh, admission: Any, echo: Any, task: task_pb2.Task) -> dict[str, Call]:
    stub, payload, spec = admission_pb2_grpc.AdmissionServiceStub(admission), task.SerializeToString(), task.spec
    unary, stream = echo.unary_unary("/echo/Unary"), echo.unary_stream("/echo/Stream")
    proof: Any = {"metadata": (("authorization", f"Bearer {mesh.api_key}"),), "timeout": 60}

    async def first_of(call: Any) -> None:
        async for _ in call:
            break
        call.cancel()

    def create() -> Awaitable[Any]:
        spec.training.learning_rate *= 0.9999
        return stub.CreateTask(admission_pb2.CreateTaskRequest(spec=spec, request_id=str(uuid.uuid4())), **proof)

    return {
        "echo": lambda: unary(payload),
        "GetTask": lambda: stub.GetTask(admission_pb2.GetTaskRequest(name=task.name), **proof),
        "CreateTask": create,
        "echo, stream": lambda: first_of(stream(payload)),
        "WatchTask": lambda: first_of(stub.WatchTask(admission_pb2.WatchTaskRequest(name=task.name), **proof)),
    }


async def run_block(call: Call, seconds: float, callers: int, server: int) -> dict[str, float]:
    """Return calls per second, median and 99th percentile in milliseconds, and microseconds of CPU per call."""
    latencies: list[float] = []
    cpu, started = cpu_microseconds(server), time.perf_counter()

    async def caller() -> None:
        while (now := time.perf_counter()) - started < seconds:
            await call()
            latencies.append(time.perf_counter() - now)

    await asyncio.gather(*(caller() for _ in range(callers)))
    whole = time.perf_counter() - started
    of_call = {part: (after - cpu[part]) / len(latencies) for part, after in cpu_microseconds(server).items()}
    hundredths = statistics.quantiles(latencies, n=100, method="inclusive")
    return {
        "per_second": len(latencies) / whole,
        "p50_ms": 1e3 * hundredths[49],
        "p99_ms": 1e3 * hundredths[98],
        **of_call,
    }


def cpu_microseconds(server: int) -> dict[str, float]:
    """Return CPU microseconds of the server's event-loop thread, of its other threads, and of this process."""
    loop = int(Path(f"/proc/{server}/task/{server}/schedstat").read_text().split()[0]) / 1e3
    others = 1e6 * cpu_seconds_of(server) - loop
    return {"event_loop_us": loop, "other_threads_us": others, "callers_us": 1e6 * time.process_time()}


@contextmanager
def suspended(mesh: Mesh, service: str) -> Iterator[None]:
    process = mesh.processes[service].pid
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@contextmanager
def echoing(mesh: Mesh) -> Iterator[tuple[str, int]]:
    """Yield the address and the process id of an echo server that uses admission's certificate."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve_echo, args=(mesh.certs / "admission", theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield pipe.recv(), process.pid or 0
    finally:
        process.terminate()
        process.join()


def _serve_echo(certs: Path, pipe: Connection) -> None:
    async def serve() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((_Echo(),))
        pair = [((certs / "tls.key").read_bytes(), (certs / "tls.crt").read_bytes())]
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair))
        await server.start()
        pipe.send(f"127.0.0.1:{port}")
        await server.wait_for_termination()

    asyncio.run(serve())


class _Echo(grpc.GenericRpcHandler):
    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method == "/echo/Unary":
            return grpc.unary_unary_rpc_method_handler(self._unary)
        return grpc.unary_stream_rpc_method_handler(self._stream)

    async def _unary(self, request: bytes, context: Any) -> bytes:
        return request

    async def _stream(self, request: bytes, context: Any) -> Any:
        yield request
        await asyncio.Event().wait()  # as a watch: until the caller has gone


def section(raw: Mapping[str, Any]) -> str:
    middle = {
        name: {key: statistics.median(block[key] for block in blocks) for key in blocks[0]}
        for name, blocks in raw["blocks"].items()
    }
    rows: list[list[object]] = []
    for name, figures in middle.items():
        goal = ""
        if name in PEERS:
            blocks = zip(raw["blocks"][name], raw["blocks"][PEERS[name]], strict=True)
            ratios = sorted(block["per_second"] / echo["per_second"] for block, echo in blocks)
            ratio = statistics.median(ratios)
            goal = f"{ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}; {'held' if ratio >= GOAL else 'failed'})"
        cpu = [f"{figures[part]:.0f}" for part in ("event_loop_us", "other_threads_us", "callers_us")]
        rows.append(
            [name, f"{figures['per_second']:.0f}", f"{figures['p50_ms']:.1f}", f"{figures['p99_ms']:.1f}", goal, *cpu]
        )
    header = ["call", "per second", "p50 ms", "p99 ms", f"of the echo's rate (goal {GOAL})",
              "CPU of a call: event loop, microseconds", "server's other threads", "callers"]  # fmt: skip
    return f"""
## Control plane: admission beside a bare echo

{report.describe_origin(dict(raw))}
{raw["callers"]} callers, {BLOCKS} blocks of each call in turn; medians. A ratio is of neighbouring blocks.

{report.table(header, rows)}

Raw figures: `results/control_plane.json`.
"""


if __name__ == "__main__":
    main()
