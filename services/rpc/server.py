"""Runs a service's gRPC server: ports, interceptor, health, reflection, graceful stop."""

import asyncio
import gc
import json
import logging
import os
import resource
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

_log = logging.getLogger(__name__)

Register = Callable[[grpc.aio.Server], Sequence[str]]


async def serve(
    service_name: str,
    settings: ServerSettings,
    register: Register,
    *,
    authenticate: Authenticate,
    audit: Audit | None = None,
    unauthenticated_limiter: UnauthenticatedCallLimiter | None = None,
    on_ready: Callable[[str], Awaitable[None]] | None = None,
    on_stop: Callable[[], Awaitable[None]] | None = None,
    stopping: asyncio.Event | None = None,
    health: health_aio.HealthServicer | None = None,
    services_with_own_health: Collection[str] = (),
    grace_seconds: float = 5,
) -> None:
    """Serve until SIGTERM, SIGINT or `stopping`; then report NOT_SERVING, run `on_stop`, and end calls after the grace.

    `register` adds servicers and returns their full names. The caller sets the health of `services_with_own_health`
    itself, through the `health` servicer that it passes; "" is the overall health. Exits with an error message if a
    port is taken.
    """
    telemetry = configure(service_name, settings)
    interceptor = RpcInterceptor(authenticate, settings.listen, audit, settings.call_limits(), unauthenticated_limiter)
    options = [*SERVER_OPTIONS, ("grpc.max_concurrent_streams", settings.max_connection_calls)]
    _allow_all_open_files()
    server = grpc.aio.server(interceptors=[interceptor], options=options)
    health = health or health_aio.HealthServicer()
    names = [*register(server), health_pb2.DESCRIPTOR.services_by_name["Health"].full_name]
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    if settings.reflection:
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
    address, *_ = [_bind(server, *port) for port in settings.ports()]
    names = ["", *names]  # "" is the health of the server
    # By default it reports SERVING at once.
    await _set_health(health, names, health_pb2.HealthCheckResponse.NOT_SERVING)
    await server.start()
    stopping = stopping or asyncio.Event()
    try:
        with _set_by_signals(stopping):
            if on_ready is not None:
                await _run_unless(stopping, on_ready(address))
            if not stopping.is_set():
                _freeze_startup_objects()
                names = [name for name in names if name not in services_with_own_health]
                await _set_health(health, names, health_pb2.HealthCheckResponse.SERVING)
                _write_ready_file(settings, address)
                _log.info("%s listens on %s", service_name, address)
            await stopping.wait()
            await health.enter_graceful_shutdown()  # NOT_SERVING, for good
            if on_stop is not None:
                await on_stop()
    finally:
        await server.stop(grace_seconds)
        await asyncio.to_thread(telemetry.shutdown)
        if settings.ready_file is not None:
            settings.ready_file.unlink(missing_ok=True)


def _allow_all_open_files() -> None:
    """Raise the soft limit of open files to the hard one: strangers' connections must not keep the mesh's own out."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # on macOS the hard limit may be more than a process may have
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _run_unless(stopping: asyncio.Event, work: Awaitable[None]) -> None:
    """Await the work, or cancel it when `stopping` is set: a backbone may load for minutes."""
    running, stop = asyncio.ensure_future(work), asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait({running, stop}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
    finally:
        running.cancel()
        stop.cancel()
        await asyncio.gather(running, stop, return_exceptions=True)


def _freeze_startup_objects() -> None:
    """Exclude the objects that live as long as the service from garbage collection, whose full runs take 0.1 s."""
    gc.collect()
    gc.freeze()


def start_critical_task(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """Start a task that the service needs: if it raises, the service stops, to be restarted by its supervisor."""

    def stop_on_failure(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("%s failed; the service stops", name, exc_info=error)
            os.kill(os.getpid(), signal.SIGTERM)

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(stop_on_failure)
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
        raise SystemExit(f"cannot listen on {listen}: {error}. Is another service on that port?") from error
    return f"{listen.rpartition(':')[0]}:{port}"


async def _set_health(health: Any, names: Sequence[str], status: Any) -> None:
    for name in names:
        await health.set(name, status)


def _write_ready_file(settings: ServerSettings, address: str) -> None:
    if settings.ready_file is not None:
        partial = settings.ready_file.with_suffix(".partial")
        partial.write_text(json.dumps({"address": address, "pid": os.getpid()}))
        partial.replace(settings.ready_file)
