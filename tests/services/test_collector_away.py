"""A tracing backend that is down, or that never answers, delays no call and costs no memory and no threads."""

import gc
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan

from muxtune.local.tracing import traced
from muxtune.v1 import admission_pb2
from services.rpc.server_settings import ServerSettings
from services.telemetry import configure
from tests.services.conftest import StartMesh

NUM_CALLS = 1400  # with a span on either side: more than the queue holds
BACKEND = "backend"
MAX_SPANS = 2048 + 512  # of the queue, and of the batch that is on its way


@contextmanager
def nothing_listens() -> Iterator[str]:
    with socket.socket() as reserved:  # bound, so that nobody else can listen there
        reserved.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{reserved.getsockname()[1]}"


@contextmanager
def accepts_and_is_silent() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def never_answers() -> Iterator[str]:
    """Serve a backend that accepts batches and answers when the block ends."""
    may_answer = threading.Event()

    class Stuck(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request, context):
            may_answer.wait()

    server = grpc.server(futures.ThreadPoolExecutor(4, thread_name_prefix=BACKEND))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Stuck(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        may_answer.set()
        server.stop(None).wait()


Away = Callable[[], AbstractContextManager[str]]
LESS_OFTEN = [pytest.param(away, marks=pytest.mark.thorough) for away in (nothing_listens, accepts_and_is_silent)]
every_way = pytest.mark.parametrize("away", [*LESS_OFTEN, never_answers])


@pytest.fixture
def own_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the test run's global providers."""
    monkeypatch.setattr("opentelemetry.trace.set_tracer_provider", lambda provider: None)
    monkeypatch.setattr("opentelemetry.metrics.set_meter_provider", lambda provider: None)
    monkeypatch.setattr("services.telemetry._configure_logs", lambda name, level: None)


@every_way
async def test_every_call_is_answered_while_the_first_batch_waits(
    away: Away,
    own_providers: None,
    start_mesh: StartMesh,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A call that waited for the exporter would wait forever for a backend that never answers."""
    others = set(threading.enumerate())
    with away() as endpoint:
        exporting = configure("admission", ServerSettings(mesh_secret="s", otlp_endpoint=endpoint))
        monkeypatch.setattr("services.rpc.tracing.tracer", lambda: exporting.tracer_provider.get_tracer("x"))

        async def answer(request: admission_pb2.GetTaskRequest, context: object) -> admission_pb2.GetTaskResponse:
            return admission_pb2.GetTaskResponse(task={"name": request.name})

        stub = await (await start_mesh(GetTask=answer)).admission()
        await stub.GetTask(admission_pb2.GetTaskRequest(name="first"))
        num_spans, num_threads = live_spans(), live_threads()
        caplog.set_level(logging.WARNING)
        for number in range(NUM_CALLS):
            answered = await stub.GetTask(admission_pb2.GetTaskRequest(name=f"{number}"), timeout=30)
            assert answered.task.name == f"{number}"
        assert 1000 < live_spans() - num_spans <= MAX_SPANS + 2
        assert live_threads() <= num_threads
        assert len(caplog.records) < 50  # nor is a line logged for each span that is dropped
        exporting.shutdown()
    for thread in set(threading.enumerate()) - others:
        if thread.name.startswith("Otel"):
            thread.join(30)
            assert not thread.is_alive()


def live_spans() -> int:
    gc.collect()
    return sum(issubclass(type(thing), ReadableSpan) for thing in gc.get_objects())  # lazy modules warn when asked


def live_threads() -> int:
    return sum(not thread.name.startswith(BACKEND) for thread in threading.enumerate())


@every_way
def test_a_command_does_not_wait_long_for_the_collector(
    away: Away, own_providers: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A command exports its spans before it ends, within a few seconds."""
    with away() as endpoint:
        monkeypatch.setenv("MUXTUNE_OTLP_ENDPOINT", endpoint)
        with traced(tmp_path) as provider:
            provider.get_tracer("x").start_span("task create").end()
            started = time.monotonic()
        assert time.monotonic() - started < 5  # it was ten seconds
