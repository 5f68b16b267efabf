"""A service's process: ready file, health, reflection, an occupied port, and a graceful stop."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from muxtune.v1 import admission_pb2, admission_pb2_grpc
from services.rpc import server as server_module
from services.rpc.authentication import mesh_authenticator
from services.rpc.client_channel import open_channel
from services.rpc.server_settings import ServerSettings
from services.settings import SettingsError, environment_of
from services.telemetry import configure

ROOT = Path(__file__).parents[3]
NAME = "muxtune.v1.AdmissionService"
PROGRAM = """
import asyncio, os, sys
from muxtune.v1 import admission_pb2, admission_pb2_grpc
from services.rpc.authentication import mesh_authenticator
from services.rpc.server_settings import ServerSettings
from services.settings import from_environment
from services.rpc.server import serve

class Admission(admission_pb2_grpc.AdmissionServiceServicer):
    async def GetTask(self, request, context):
        print("began", flush=True)
        await asyncio.sleep(float(request.name))
        return admission_pb2.GetTaskResponse(task={"name": "done"})

def register(server):
    admission_pb2_grpc.add_AdmissionServiceServicer_to_server(Admission(), server)
    return ["muxtune.v1.AdmissionService"]

async def stop():
    print("stopping", flush=True)

settings = from_environment(ServerSettings, os.environ)
asyncio.run(serve("test", settings, register, authenticate=mesh_authenticator(settings.mesh_secret), on_stop=stop))
print("left", flush=True)
"""


@dataclass
class Running:
    process: asyncio.subprocess.Process
    address: str

    async def line(self) -> str:
        return (await asyncio.wait_for(self.process.stdout.readline(), 20)).decode().strip()


def allow_few_open_files() -> None:
    """Set a soft limit, as many systems do; the hard one is higher."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))


async def start(settings: ServerSettings) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROGRAM,
        cwd=ROOT,
        env={**os.environ, **environment_of(settings)},
        preexec_fn=allow_few_open_files,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    return ServerSettings(
        mesh_secret="mesh_s",
        reflection=True,
        ready_file=tmp_path / "ready.json",
        trace_file=tmp_path / "trace.jsonl",
        max_connection_calls=2,
    )


@pytest.fixture
async def running(settings: ServerSettings) -> AsyncIterator[Running]:
    process = await start(settings)
    async with asyncio.timeout(30):
        while not settings.ready_file.exists():
            assert process.returncode is None, await process.stderr.read()
            await asyncio.sleep(0.02)
    ready = json.loads(settings.ready_file.read_text())
    assert ready["pid"] == process.pid
    yield Running(process, ready["address"])
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def test_a_process_from_start_to_stop(running: Running, settings: ServerSettings) -> None:
    async with grpc.aio.insecure_channel(running.address) as plain, open_channel(running.address, "mesh_s") as channel:
        # Ready means serving: health says so for the server and for its service, without a key.
        health = health_pb2_grpc.HealthStub(plain)
        for name in ("", NAME):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        # Reflection tells the services, and describes ours.
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=NAME),
        ]
        listed, described = [
            r async for r in reflection_pb2_grpc.ServerReflectionStub(plain).ServerReflectionInfo(iter(requests))
        ]
        assert NAME in {service.name for service in listed.list_services_response.service}
        assert described.file_descriptor_response.file_descriptor_proto
        # A second process cannot share the port, and says why it leaves.
        second = await start(replace(settings, listen=running.address, ready_file=None, trace_file=None))
        _, complaint = await asyncio.wait_for(second.communicate(), 30)
        assert second.returncode == 1 and f"cannot listen on {running.address}" in complaint.decode()
        # SIGTERM: watchers of health hear of it, the call under way is answered, then the process leaves with 0.
        watch = health.Watch(health_pb2.HealthCheckRequest(service=NAME))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        call = asyncio.ensure_future(
            admission_pb2_grpc.AdmissionServiceStub(channel).GetTask(admission_pb2.GetTaskRequest(name="0.5"))
        )
        assert await running.line() == "began"
        running.process.send_signal(signal.SIGTERM)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        assert await running.line() == "stopping"
        assert (await call).task.name == "done"
    assert await running.line() == "left"
    assert await asyncio.wait_for(running.process.wait(), 20) == 0
    # What it traced is in the file, whole.
    spans = [json.loads(line) for line in settings.trace_file.read_text().splitlines()]
    names = [s["name"] for r in spans for rs in r["resourceSpans"] for ss in rs["scopeSpans"] for s in ss["spans"]]
    assert f"{NAME}/GetTask" in names
    logs = [json.loads(line) for line in (await running.process.stderr.read()).decode().splitlines() if line[0] == "{"]
    assert any(line["service"] == "test" and "listens on" in line["message"] for line in logs)


async def test_many_silent_connections_keep_no_caller_out(running: Running) -> None:
    host, port = running.address.split(":")
    silent = [await asyncio.open_connection(host, int(port)) for _ in range(400)]  # over the soft limit of open files
    async with open_channel(running.address, "mesh_s") as channel:
        stub = admission_pb2_grpc.AdmissionServiceStub(channel)
        assert (await stub.GetTask(admission_pb2.GetTaskRequest(name="0"), timeout=20)).task.name == "done"
    for _, writer in silent:
        writer.close()


async def test_more_calls_than_a_connection_may_have_wait_and_are_served(running: Running) -> None:
    """The third call begins when another one has ended; one of another connection does not wait."""
    async with open_channel(running.address, "mesh_s") as one, open_channel(running.address, "mesh_s") as other:
        stub, request = admission_pb2_grpc.AdmissionServiceStub(one), admission_pb2.GetTaskRequest(name="0.5")
        calls = [asyncio.ensure_future(stub.GetTask(request, timeout=20)) for _ in range(3)]
        assert [await running.line(), await running.line()] == ["began", "began"]
        await admission_pb2_grpc.AdmissionServiceStub(other).GetTask(admission_pb2.GetTaskRequest(name="0"), timeout=20)
        assert await running.line() == "began"
        third = asyncio.ensure_future(running.line())
        done, _ = await asyncio.wait([*calls, third], return_when=asyncio.FIRST_COMPLETED)
        assert third not in done
        assert await third == "began"
        await asyncio.gather(*calls)


async def serve_here(settings: ServerSettings, **options: object) -> tuple[asyncio.Task[None], asyncio.Event, str]:
    """Serve in this process until the returned event is set; return when the server is ready."""
    stopping, ready = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def on_ready(address: str) -> None:
        ready.set_result(address)

    def register(server: grpc.aio.Server) -> list[str]:
        admission_pb2_grpc.add_AdmissionServiceServicer_to_server(admission_pb2_grpc.AdmissionServiceServicer(), server)
        return [NAME]

    serving = asyncio.create_task(
        server_module.serve(
            "test",
            settings,
            register,
            authenticate=mesh_authenticator("mesh_s"),
            on_ready=on_ready,
            stopping=stopping,
            **options,
        )
    )
    await asyncio.wait([serving, ready], return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        await serving
    return serving, stopping, await ready


@pytest.fixture(autouse=True)
def own_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the test run's global providers and logs."""
    monkeypatch.setattr("opentelemetry.trace.set_tracer_provider", lambda provider: None)
    monkeypatch.setattr("opentelemetry.metrics.set_meter_provider", lambda provider: None)
    monkeypatch.setattr("services.telemetry._configure_logs", lambda name, level: None)


async def test_the_grace_is_limited() -> None:
    settings = ServerSettings(mesh_secret="mesh_s")
    began = asyncio.Event()

    async def never(self, request, context):
        began.set()
        await asyncio.Event().wait()

    original = admission_pb2_grpc.AdmissionServiceServicer.GetTask
    admission_pb2_grpc.AdmissionServiceServicer.GetTask = never
    try:
        serving, stopping, address = await serve_here(settings, grace_seconds=0.1)
        async with open_channel(address, "mesh_s") as channel:
            call = asyncio.ensure_future(
                admission_pb2_grpc.AdmissionServiceStub(channel).GetTask(admission_pb2.GetTaskRequest(), timeout=20)
            )
            await began.wait()
            stopping.set()
            await asyncio.wait_for(serving, 10)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
    finally:
        admission_pb2_grpc.AdmissionServiceServicer.GetTask = original


async def test_prometheus_is_scraped_where_the_service_listens(unused_tcp_port: int, monkeypatch) -> None:
    providers = []
    monkeypatch.setattr("opentelemetry.metrics.set_meter_provider", providers.append)
    settings = ServerSettings(mesh_secret="mesh_s", prometheus_port=unused_tcp_port)
    serving, stopping, _ = await serve_here(settings)
    providers[0].get_meter("test").create_counter("seen").add(3)
    url = f"http://127.0.0.1:{unused_tcp_port}/metrics"
    page = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read().decode())
    assert 'service_name="muxtune-test"' in page and "seen_total" in page
    with pytest.raises(SettingsError, match="MUXTUNE_PROMETHEUS_PORT"):
        configure("another", settings)
    stopping.set()
    await serving


async def test_a_hook_that_fails_still_stops_the_server() -> None:
    async def fail() -> None:
        raise RuntimeError("on_stop failed")

    serving, stopping, address = await serve_here(ServerSettings(mesh_secret="mesh_s"), on_stop=fail)
    stopping.set()
    with pytest.raises(RuntimeError):
        await asyncio.wait_for(serving, 10)
    async with grpc.aio.insecure_channel(address) as plain:
        call = health_pb2_grpc.HealthStub(plain).Check(health_pb2.HealthCheckRequest(), timeout=2)
        assert await call.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_a_compression_bomb_is_not_inflated(compression: grpc.Compression) -> None:
    """64 MB of zeros arrive as 64 kB: the decompressed size is limited."""
    serving, stopping, address = await serve_here(ServerSettings(mesh_secret="mesh_s"))
    bomb = admission_pb2.GetTaskRequest(name="0" * (64 << 20))
    metadata = [("authorization", "Bearer mesh_s")]
    async with grpc.aio.insecure_channel(address) as channel:
        stub = admission_pb2_grpc.AdmissionServiceStub(channel)
        call = stub.GetTask(bomb, compression=compression, timeout=20, metadata=metadata)
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        small = stub.GetTask(admission_pb2.GetTaskRequest(), compression=compression, timeout=20, metadata=metadata)
        assert await small.code() is grpc.StatusCode.UNIMPLEMENTED  # the servicer's own answer: it got there
    stopping.set()
    await serving


async def test_metadata_size_is_limited() -> None:
    serving, stopping, address = await serve_here(ServerSettings(mesh_secret="mesh_s"))
    async with grpc.aio.insecure_channel(address) as channel:
        stub = admission_pb2_grpc.AdmissionServiceStub(channel)
        for extra in ([("x-long", "x" * 20_000)], [(f"x-{i}", "x" * 90) for i in range(200)]):
            metadata = [("authorization", "Bearer mesh_s"), *extra]
            call = stub.GetTask(admission_pb2.GetTaskRequest(), timeout=20, metadata=metadata)
            assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    stopping.set()
    await serving
