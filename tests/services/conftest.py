"""Fixtures: a server with the interceptor, a channel of the mesh, and the spans that they record."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.trace import SpanKind, StatusCode

from muxtune.v1 import admission_pb2, admission_pb2_grpc, execution_pb2_grpc
from services.rpc.authentication import mesh_authenticator
from services.rpc.client_channel import open_channel
from services.rpc.interceptor import RpcInterceptor

SECRET = "mesh_of-the-test"


class SpanLog(SpanProcessor):
    """Records every ended span, in order; `wait_for` blocks until one with a name and kind has ended."""

    def __init__(self) -> None:
        self._spans: list[ReadableSpan] = []
        self._changed = threading.Condition()

    def on_end(self, span: ReadableSpan) -> None:
        with self._changed:
            self._spans.append(span)
            self._changed.notify_all()

    def clear(self) -> None:
        with self._changed:
            self._spans.clear()

    def find(self, name: str, kind: SpanKind) -> list[ReadableSpan]:
        return [s for s in self._spans if s.name.rpartition("/")[2] == name and s.kind is kind]

    def wait_for(self, name: str, kind: SpanKind, count: int = 1) -> ReadableSpan:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.find(name, kind)) >= count, timeout=10), self._spans
            return self.find(name, kind)[-1]

    async def ended(self, name: str, kind: SpanKind, count: int = 1) -> ReadableSpan:
        """Call `wait_for` without blocking the event loop that the server runs in."""
        return await asyncio.to_thread(self.wait_for, name, kind, count)

    async def both(self, method: str) -> tuple[ReadableSpan, ReadableSpan]:
        """Return the client's and the server's span of the only call of `method`."""
        client, server = await self.ended(method, SpanKind.CLIENT), await self.ended(method, SpanKind.SERVER)
        assert len(self.find(method, SpanKind.CLIENT)) == len(self.find(method, SpanKind.SERVER)) == 1
        assert server.parent.span_id == client.context.span_id
        assert server.context.trace_id == client.context.trace_id
        return client, server

    @staticmethod
    def check(span: ReadableSpan, code: str, is_error: bool) -> None:
        assert span.attributes["rpc.response.status_code"] == code
        assert span.status.status_code is (StatusCode.ERROR if is_error else StatusCode.UNSET)
        assert span.attributes.get("error.type") == (code if is_error else None)
        assert not span.events


class Endless:
    """Servicer methods that end by cancellation only; events say when they began and ended."""

    def __init__(self) -> None:
        self.began, self.ended = asyncio.Event(), asyncio.Event()

    async def unary(self, request, context):
        self.began.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()

    async def stream(self, request, context):
        self.began.set()
        try:
            yield admission_pb2.DownloadAdapterResponse()
            await asyncio.Event().wait()
        finally:
            self.ended.set()

    async def flood(self, request, context):
        """Stream without end; flow control blocks it at a `yield` most of the time."""
        self.began.set()
        try:
            while True:
                yield admission_pb2.DownloadAdapterResponse(chunk={"data": b"x" * 100_000})
        finally:
            self.ended.set()


@pytest.fixture
def endless() -> Endless:
    return Endless()


@pytest.fixture(scope="session")
def span_log() -> SpanLog:
    """Record the spans of the process's one tracer provider, which can be set only once."""
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())
    log = SpanLog()
    trace.get_tracer_provider().add_span_processor(log)
    return log


@pytest.fixture
def spans(span_log: SpanLog) -> Iterator[SpanLog]:
    span_log.clear()
    yield span_log
    span_log.clear()


class Mesh:
    """A server with the interceptor and the test's servicers, and clients of it."""

    secret = SECRET

    def __init__(self, address: str, stack: AsyncExitStack) -> None:
        self.address, self._stack = address, stack

    async def channel(self, secret: str = SECRET) -> grpc.aio.Channel:
        return await self._stack.enter_async_context(open_channel(self.address, secret))

    async def admission(self, secret: str = SECRET) -> "admission_pb2_grpc.AdmissionServiceAsyncStub":
        return admission_pb2_grpc.AdmissionServiceStub(await self.channel(secret))

    async def execution(self) -> "execution_pb2_grpc.ExecutionServiceAsyncStub":
        return execution_pb2_grpc.ExecutionServiceStub(await self.channel())


StartMesh = Callable[..., Awaitable[Mesh]]


@pytest.fixture
async def start_mesh() -> AsyncIterator[StartMesh]:
    """Return a function that starts a server with some methods of AdmissionService and ExecutionService replaced."""
    async with AsyncExitStack() as stack:

        async def start(options: tuple[tuple[str, int], ...] = (), **methods: object) -> Mesh:
            server = grpc.aio.server(interceptors=[RpcInterceptor(mesh_authenticator(SECRET))], options=options)
            admission = type("Admission", (admission_pb2_grpc.AdmissionServiceServicer,), _bound(methods))()
            execution = type("Execution", (execution_pb2_grpc.ExecutionServiceServicer,), _bound(methods))()
            admission_pb2_grpc.add_AdmissionServiceServicer_to_server(admission, server)
            execution_pb2_grpc.add_ExecutionServiceServicer_to_server(execution, server)
            address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            stack.push_async_callback(server.stop, None)
            return Mesh(address, stack)

        yield start


def _bound(methods: dict[str, object]) -> dict[str, object]:
    return {name: staticmethod(method) for name, method in methods.items()}  # type: ignore[arg-type]
