"""Both spans of a call end with it, however it ends, with the right status and in one trace."""

import asyncio
import gc
import time
from collections import Counter
from contextlib import suppress

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.trace import SpanKind, StatusCode

from engine.errors import InvalidInputError, MuxtuneError, NotFoundError, OverloadedError, UnavailableError
from muxtune.v1 import admission_pb2, admission_pb2_grpc, execution_pb2
from services.rpc import tracing
from services.rpc.interceptor import write_response
from services.telemetry import tracer

GET, DOWNLOAD = admission_pb2.GetTaskRequest(), admission_pb2.DownloadAdapterRequest()
PIECE = admission_pb2.DownloadAdapterResponse()
SERVER, CLIENT = SpanKind.SERVER, SpanKind.CLIENT


async def test_a_unary_call(start_mesh, spans) -> None:
    inner = []

    async def get(request, context):
        inner.append(trace.get_current_span().get_span_context().span_id)
        return admission_pb2.GetTaskResponse()

    mesh = await start_mesh(GetTask=get)
    with tracer().start_as_current_span("caller") as caller:
        await (await mesh.admission()).GetTask(GET)
    client, server = await spans.both("GetTask")
    assert client.parent.span_id == caller.get_span_context().span_id
    assert inner == [server.context.span_id]
    for span in (client, server):
        spans.check(span, "OK", is_error=False)
        assert span.name == "muxtune.v1.AdmissionService/GetTask" == span.attributes["rpc.method"]
        assert span.attributes["rpc.system.name"] == "grpc"
    host, _, port = mesh.address.partition(":")
    assert (client.attributes["server.address"], client.attributes["server.port"]) == (host, int(port))


@pytest.mark.parametrize(
    ("error", "code", "is_servers_fault"),
    [
        (NotFoundError("x"), "NOT_FOUND", False),
        (InvalidInputError("x"), "INVALID_ARGUMENT", False),
        (OverloadedError("x"), "RESOURCE_EXHAUSTED", False),
        (MuxtuneError("x"), "INTERNAL", True),
        (ZeroDivisionError("x"), "INTERNAL", True),
    ],
)
async def test_an_exception(start_mesh, spans, error, code: str, is_servers_fault: bool) -> None:
    async def get(request, context):
        raise error

    async def download(request, context):
        yield PIECE
        raise error

    mesh = await start_mesh(GetTask=get, DownloadAdapter=download)
    stub = await mesh.admission()
    with pytest.raises(MuxtuneError):
        await stub.GetTask(GET)
    with pytest.raises(MuxtuneError):
        _ = [piece async for piece in stub.DownloadAdapter(DOWNLOAD)]
    for method in ("GetTask", "DownloadAdapter"):
        client, server = await spans.both(method)
        spans.check(client, code, is_error=True)
        spans.check(server, code, is_error=is_servers_fault)


async def test_an_abort_and_a_code_that_was_set(start_mesh, spans) -> None:
    async def get(request, context):
        await context.abort(grpc.StatusCode.DATA_LOSS, "gone")

    async def download(request, context):
        yield PIECE
        context.set_code(grpc.StatusCode.OUT_OF_RANGE)

    mesh = await start_mesh(GetTask=get, DownloadAdapter=download)
    stub = await mesh.admission()
    with pytest.raises(MuxtuneError):
        await stub.GetTask(GET)
    with pytest.raises(MuxtuneError):
        _ = [piece async for piece in stub.DownloadAdapter(DOWNLOAD)]
    client, server = await spans.both("GetTask")
    spans.check(client, "DATA_LOSS", is_error=True)
    spans.check(server, "DATA_LOSS", is_error=True)
    client, server = await spans.both("DownloadAdapter")
    spans.check(client, "OUT_OF_RANGE", is_error=True)
    spans.check(server, "OUT_OF_RANGE", is_error=False)


async def test_a_callers_trace_continues_and_its_baggage_does_not(start_mesh, spans) -> None:
    seen = {}

    async def inner(request, context):
        seen.update(context.invocation_metadata())
        return admission_pb2.GetTaskResponse()

    last = await start_mesh(GetTask=inner)

    async def outer(request, context):
        return await (await last.admission()).GetTask(request)

    mesh = await start_mesh(GetTask=outer)
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    metadata = [
        ("authorization", f"Bearer {mesh.secret}"),
        ("traceparent", f"00-{trace_id}-b7ad6b7169203331-01"),
        ("tracestate", "vendor=1"),
        ("baggage", f"row={'x' * 4000}"),
    ]
    async with grpc.aio.insecure_channel(mesh.address) as plain:
        await admission_pb2_grpc.AdmissionServiceStub(plain).GetTask(GET, metadata=metadata)
    assert seen["traceparent"].split("-")[1] == trace_id and seen["tracestate"] == "vendor=1"
    assert "baggage" not in seen


async def test_unauthenticated_calls_have_spans(start_mesh, spans) -> None:
    mesh = await start_mesh()
    with pytest.raises(MuxtuneError):
        await (await mesh.admission("mesh_wrong")).GetTask(GET)
    client, server = await spans.both("GetTask")
    spans.check(client, "UNAUTHENTICATED", is_error=True)
    spans.check(server, "UNAUTHENTICATED", is_error=False)


async def test_uploads_and_downloads(start_mesh, spans) -> None:
    async def upload(requests, context):
        num_parts = len([part async for part in requests])
        return admission_pb2.UploadDatasetResponse(dataset={"num_rows": num_parts})

    async def download(request, context):
        for _ in range(3):
            yield PIECE

    mesh = await start_mesh(UploadDataset=upload, DownloadAdapter=download)
    stub = await mesh.admission()
    parts = (admission_pb2.UploadDatasetRequest() for _ in range(5))
    assert (await stub.UploadDataset(parts)).dataset.num_rows == 5
    assert len([piece async for piece in stub.DownloadAdapter(DOWNLOAD)]) == 3
    for method in ("UploadDataset", "DownloadAdapter"):
        for span in await spans.both(method):
            spans.check(span, "OK", is_error=False)


async def test_a_cancelled_unary_call(start_mesh, spans, endless) -> None:
    mesh = await start_mesh(GetTask=endless.unary)
    call = asyncio.ensure_future((await mesh.admission()).GetTask(GET))
    await endless.began.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    client, server = await spans.both("GetTask")
    spans.check(client, "CANCELLED", is_error=True)
    spans.check(server, "CANCELLED", is_error=False)
    assert endless.ended.is_set()


async def test_a_deadline(start_mesh, spans, endless) -> None:
    mesh = await start_mesh(GetTask=endless.unary)
    with pytest.raises(UnavailableError, match="DEADLINE_EXCEEDED"):
        await (await mesh.admission()).GetTask(GET, timeout=0.2)
    await asyncio.wait_for(endless.ended.wait(), 10)
    client, server = await spans.both("GetTask")
    spans.check(client, "DEADLINE_EXCEEDED", is_error=True)
    assert server.attributes["rpc.response.status_code"] in ("DEADLINE_EXCEEDED", "CANCELLED")


async def test_a_write_to_a_call_that_has_ended_is_its_cancellation() -> None:
    """Its span says CANCELLED; it said INTERNAL where the write failed before the cancellation was delivered."""

    class EndedCall:
        async def write(self, response: object) -> None:
            raise grpc.aio.InternalError("Failed to send a message")

    with pytest.raises(asyncio.CancelledError):
        await write_response(EndedCall(), b"")


@pytest.mark.parametrize("kind", ["stream", "flood"])
@pytest.mark.parametrize("how", ["cancel", "task", "abandon", "unread"])
async def test_an_abandoned_stream(start_mesh, spans, endless, how: str, kind: str) -> None:
    """A stream that is cancelled, left by `break` or never read ends its span without garbage collection."""
    mesh = await start_mesh(DownloadAdapter=getattr(endless, kind))
    stub = await mesh.admission()

    async def read_one() -> None:
        async for _ in stub.DownloadAdapter(DOWNLOAD):
            break

    async def read_all() -> None:
        async for _ in stub.DownloadAdapter(DOWNLOAD):
            pass

    gc.disable()
    try:
        if how == "abandon":
            await read_one()
        elif how == "task":
            reader = asyncio.create_task(read_all())
            await endless.began.wait()
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
        else:
            call = stub.DownloadAdapter(DOWNLOAD)
            await endless.began.wait()
            if how == "cancel":
                await anext(call)
                call.cancel()
            del call
        await asyncio.wait_for(endless.ended.wait(), 10)
        client, server = await spans.both("DownloadAdapter")
    finally:
        gc.enable()
    spans.check(client, "CANCELLED", is_error=True)
    spans.check(server, "CANCELLED", is_error=False)


async def test_the_readers_own_spans_are_not_the_streams_children(start_mesh, spans) -> None:
    async def download(request, context):
        yield PIECE
        yield PIECE

    mesh = await start_mesh(DownloadAdapter=download)
    with tracer().start_as_current_span("reader") as reader:
        async for _ in (await mesh.admission()).DownloadAdapter(DOWNLOAD):
            assert trace.get_current_span() is reader


async def test_a_server_that_stops(start_mesh, spans) -> None:
    server = grpc.aio.server()

    async def download(request, context):
        yield PIECE
        await asyncio.Event().wait()

    servicer = type(
        "Admission", (admission_pb2_grpc.AdmissionServiceServicer,), {"DownloadAdapter": staticmethod(download)}
    )
    admission_pb2_grpc.add_AdmissionServiceServicer_to_server(servicer(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    from services.rpc.client_channel import open_channel

    async with open_channel(address, "mesh_x") as channel:
        call = admission_pb2_grpc.AdmissionServiceStub(channel).DownloadAdapter(DOWNLOAD)
        await anext(call)
        await server.stop(None)
        with pytest.raises(UnavailableError):
            await anext(call)
    client = await spans.ended("DownloadAdapter", CLIENT)
    assert client.status.status_code is StatusCode.ERROR


async def test_a_long_stream_ends_its_span_when_established(start_mesh, spans) -> None:
    may_end = asyncio.Event()

    async def run_plan(requests, context):
        yield execution_pb2.RunPlanResponse(sequence=1)
        await may_end.wait()

    async def requests():
        yield execution_pb2.RunPlanRequest()
        await may_end.wait()

    mesh = await start_mesh(RunPlan=run_plan)
    call = (await mesh.execution()).RunPlan(requests())
    await anext(call)
    client, server = await spans.both("RunPlan")
    for span in (client, server):
        assert span.attributes["muxtune.stream_established"] is True
        assert "rpc.response.status_code" not in span.attributes
    may_end.set()
    assert [response async for response in call] == []
    for side in (client, server):
        await spans.ended("RunPlan ended", SpanKind.INTERNAL, 2)
        [end] = [s for s in spans.find("RunPlan ended", SpanKind.INTERNAL) if s.parent.span_id == side.context.span_id]
        spans.check(end, "OK", is_error=False)
        assert end.links[0].context.span_id == side.context.span_id and end.attributes["muxtune.stream_seconds"] > 0


async def test_a_silent_long_stream_is_established_soon(start_mesh, spans, monkeypatch) -> None:
    monkeypatch.setattr(tracing, "_ESTABLISHED_SECONDS", 0.05)

    async def run_plan(requests, context):
        await asyncio.Event().wait()
        yield

    mesh = await start_mesh(RunPlan=run_plan)
    call = (await mesh.execution()).RunPlan(iter([execution_pb2.RunPlanRequest()]))
    await spans.both("RunPlan")
    call.cancel()
    await spans.ended("RunPlan ended", SpanKind.INTERNAL, 2)
    codes = {s.attributes["rpc.response.status_code"] for s in spans.find("RunPlan ended", SpanKind.INTERNAL)}
    assert codes == {"CANCELLED"}


async def test_a_long_stream_refused_at_once_shows_the_error(start_mesh, spans) -> None:
    async def run_plan(requests, context):
        raise NotFoundError("no such executor")
        yield

    mesh = await start_mesh(RunPlan=run_plan)
    with pytest.raises(NotFoundError):
        await anext((await mesh.execution()).RunPlan(iter([execution_pb2.RunPlanRequest()])))
    client, server = await spans.both("RunPlan")
    spans.check(client, "NOT_FOUND", is_error=True)
    spans.check(server, "NOT_FOUND", is_error=False)


async def test_a_servicer_that_writes_to_the_context(start_mesh, spans) -> None:
    async def download(request, context):
        await context.write(PIECE)
        await context.write(PIECE)

    mesh = await start_mesh(DownloadAdapter=download)
    assert len([p async for p in (await mesh.admission()).DownloadAdapter(DOWNLOAD)]) == 2
    for span in await spans.both("DownloadAdapter"):
        spans.check(span, "OK", is_error=False)


async def test_durations_are_measured(start_mesh, monkeypatch) -> None:
    reader = InMemoryMetricReader()
    meter = MeterProvider(metric_readers=[reader]).get_meter("test")
    monkeypatch.setattr(tracing, "meter", lambda: meter)

    async def get(request, context):
        raise NotFoundError("x")

    mesh = await start_mesh(GetTask=get)
    stub = await mesh.admission()
    for _ in range(3):
        with pytest.raises(NotFoundError):
            await stub.GetTask(GET)
    [scope] = reader.get_metrics_data().resource_metrics[0].scope_metrics
    for metric in scope.metrics:
        [point] = metric.data.data_points
        assert metric.unit == "s" and point.count == 3
        assert point.attributes["rpc.method"] == "muxtune.v1.AdmissionService/GetTask"
        assert point.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert {metric.name for metric in scope.metrics} == {"rpc.client.call.duration", "rpc.server.call.duration"}


async def test_strangers_and_calls_over_a_limit_leave_few_spans_and_are_counted(start_mesh, spans, monkeypatch) -> None:
    """Each such call once wrote 744 bytes to the trace file, at 3,000 calls a second from one client."""
    reader = InMemoryMetricReader()
    meter = MeterProvider(metric_readers=[reader]).get_meter("test")
    monkeypatch.setattr(tracing, "meter", lambda: meter)

    async def get(request, context):
        if request.name == "too much":
            raise OverloadedError("x")
        return admission_pb2.GetTaskResponse()

    mesh = await start_mesh(GetTask=get)
    known, started, num_calls = await mesh.admission(), time.monotonic(), 100
    async with grpc.aio.insecure_channel(mesh.address) as channel:
        stranger = admission_pb2_grpc.AdmissionServiceStub(channel)
        for number in range(num_calls):
            for stub, name in ((stranger, "a"), (known, "too much"), (known, "b")):
                with suppress(grpc.RpcError, OverloadedError):
                    await stub.GetTask(admission_pb2.GetTaskRequest(name=name), metadata=[("n", str(number))])
    await spans.ended("GetTask", SERVER, num_calls)
    codes = Counter(span.attributes["rpc.response.status_code"] for span in spans.find("GetTask", SERVER))
    seconds = time.monotonic() - started
    assert codes["OK"] == num_calls
    for code in ("UNAUTHENTICATED", "RESOURCE_EXHAUSTED"):
        assert 1 <= codes[code] <= 3 + seconds
    counts = {}
    for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics:
        if metric.name == "muxtune.rpc.dropped_spans":
            counts = {p.attributes["rpc.response.status_code"]: p.value for p in metric.data.data_points}
    assert counts == {code: num_calls - codes[code] for code in ("UNAUTHENTICATED", "RESOURCE_EXHAUSTED")}
