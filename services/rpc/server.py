"""The gRPC server every service runs in: gate, health, reflection, graceful stop."""

import asyncio
import gc
import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from services.rpc.audit import Audit
from services.rpc.authentication import Authenticate
from services.rpc.interceptor import RpcInterceptor
from services.rpc.server_settings import ServerSettings
from services.rpc.transport_options import SERVER_OPTIONS
from services.rpc.unauthenticated_limiter import UnauthenticatedCallLimiter
from services.telemetry import configure

_PARENT_SECONDS = 1.0
_log = logging.getLogger(__name__)

Register = Callable[[grpc.aio.Server], Sequence[str]]


async def serve(
    service_name: str,
    settings: ServerSettings,
    register: Register,
    *,
    authenticate: Authenticate,
    audit: Audit | None = None,
    strangers: UnauthenticatedCallLimiter | None = None,
    on_ready: Callable[[str], Awaitable[None]] | None = None,
    on_stop: Callable[[], Awaitable[None]] | None = None,
    stopping: asyncio.Event | None = None,
    health: health_aio.HealthServicer | None = None,
    unannounced: Collection[str] = (),
    grace_seconds: float = 5,
) -> None:
    """Serves until SIGTERM, SIGINT or `stopping`; then health says NOT_SERVING, `on_stop` runs, calls get the grace.

    `register` adds servicers and returns their full names. Whoever passes `health` may change it meanwhile, and alone
    says how the services `unannounced` are. Exits with a clear error if the port is taken.
    """
    parent = os.getppid()
    telemetry = configure(service_name, settings)
    gate = RpcInterceptor(authenticate, settings.listen, audit, settings.max_calls, settings.max_streams, strangers)
    server = grpc.aio.server(interceptors=[gate], options=SERVER_OPTIONS)
    health = health or health_aio.HealthServicer()
    names = [*register(server), health_pb2.DESCRIPTOR.services_by_name["Health"].full_name]
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    if settings.reflection:
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
    address, *_ = [_bind(server, *port) for port in settings.ports()]
    names = [name for name in names if name not in unannounced]
    await _announce(health, names, health_pb2.HealthCheckResponse.NOT_SERVING)  # it would say SERVING before it is
    await server.start()
    stopping = stopping or asyncio.Event()
    try:
        with _set_by_signals(stopping):
            if on_ready is not None:
                await on_ready(address)
            _spare_the_collector()
            await _announce(health, names, health_pb2.HealthCheckResponse.SERVING)
            _write_ready_file(settings, address)
            _log.info("%s listens on %s", service_name, address)
            await _until(stopping, parent if settings.stop_with_parent else None)
            await _announce(health, names, health_pb2.HealthCheckResponse.NOT_SERVING)
            if on_stop is not None:
                await on_stop()
    finally:
        await server.stop(grace_seconds)
        await asyncio.to_thread(telemetry.shutdown)
        if settings.ready_file is not None:
            settings.ready_file.unlink(missing_ok=True)


def _spare_the_collector() -> None:
    """What a service is made of stays to its end: looked through again and again, it holds all calls up for 0.1 s."""
    gc.collect()
    gc.freeze()


async def _until(stopping: asyncio.Event, parent: int | None) -> None:
    """Or until `parent` is not this process's parent any more."""
    while not stopping.is_set() and parent in (None, os.getppid()):
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), None if parent is None else _PARENT_SECONDS)


def start_critical_task(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """A task the service cannot do without: where it raises, the service stops, and whoever runs it starts it again."""

    def judge(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("%s failed: the service stops", name, exc_info=error)
            os.kill(os.getpid(), signal.SIGTERM)

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(judge)
    return task


@contextmanager
def _set_by_signals(stopping: asyncio.Event) -> Iterator[None]:
    loop, numbers = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, stopping.set)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _bind(server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials | None) -> str:
    try:
        port = server.add_secure_port(listen, credentials) if credentials else server.add_insecure_port(listen)
    except RuntimeError as error:
        raise SystemExit(f"cannot listen on {listen}: {error}; is another service on that port?") from error
    return f"{listen.rpartition(':')[0]}:{port}"


async def _announce(health: Any, names: Sequence[str], status: Any) -> None:
    for name in ("", *names):
        await health.set(name, status)


def _write_ready_file(settings: ServerSettings, address: str) -> None:
    if settings.ready_file is not None:
        partial = settings.ready_file.with_suffix(".partial")
        partial.write_text(json.dumps({"address": address, "pid": os.getpid()}))
        partial.replace(settings.ready_file)
