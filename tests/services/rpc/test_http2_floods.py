"""Callers without a key who flood HTTP/2 frames take little memory, and a flood of pings ends its connection."""

import socket
import struct
import threading
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxtune import transport
from services.rpc.client_channel import open_channel
from services.rpc.server_settings import ServerSettings
from services.rpc.transport_options import SERVER_OPTIONS, channel_options
from tests.services.rpc.test_server import Running, running, settings

__all__ = ["running", "settings"]  # fixtures
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PRIORITY, SETTINGS, PING, GOAWAY, UNKNOWN = 2, 4, 6, 7, 0xBB
ENHANCE_YOUR_CALM = 11
NUM_CONNECTIONS, FLOOD_BYTES, MAX_ADDED_BYTES = 4, 1 << 30, 40 << 20


def frame(kind: int, payload: bytes = b"", stream: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, 0, stream) + payload


FLOODS = {
    "settings": frame(SETTINGS, struct.pack(">HI", 4, 65535) * 2700) * 10,
    "unknown frames": frame(UNKNOWN, b"x" * 1000) * 100,
    "priorities": frame(PRIORITY, b"\0" * 5, 1) * 10_000,
}


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(PREFACE + frame(SETTINGS))
    return connection


def flood(address: str, block: bytes) -> None:
    """Send the block again and again, and read what the server answers, until all is sent or the server hangs up."""
    with connect(address) as connection:
        threading.Thread(target=drain, args=(connection,), daemon=True).start()
        try:
            for _ in range(FLOOD_BYTES // NUM_CONNECTIONS // len(block)):
                connection.sendall(block)
        except OSError:
            return


def drain(connection: socket.socket) -> None:
    try:
        while connection.recv(1 << 16):
            pass
    except OSError:
        return


def peak_bytes(running: Running) -> int:
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


@pytest.mark.parametrize("block", FLOODS.values(), ids=FLOODS.keys())
async def test_a_flood_takes_little_memory_and_others_are_served(
    running: Running, settings: ServerSettings, block: bytes
) -> None:
    before = peak_bytes(running)
    threads = [threading.Thread(target=flood, args=(running.address, block)) for _ in range(NUM_CONNECTIONS)]
    for thread in threads:
        thread.start()
    async with open_channel(running.address, settings.mesh_secret) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while any(thread.is_alive() for thread in threads):
            await health.Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert peak_bytes(running) - before < MAX_ADDED_BYTES


async def test_a_flood_of_pings_ends_its_connection(running: Running) -> None:
    with connect(running.address) as connection:
        connection.sendall(frame(PING, b"12345678") * 10)
        answer = bytearray()
        while data := connection.recv(1 << 16):  # until the server closes
            answer += data
    frames = []
    while answer:
        size, kind = int.from_bytes(answer[:3], "big"), answer[3]
        frames.append((kind, bytes(answer[9 : 9 + size])))
        del answer[: 9 + size]
    goodbyes = [payload for kind, payload in frames if kind == GOAWAY]
    assert goodbyes and struct.unpack(">I", goodbyes[-1][4:8]) == (ENHANCE_YOUR_CALM,)


def test_the_pings_of_the_meshs_own_channels_are_allowed() -> None:
    shortest = dict(SERVER_OPTIONS)["grpc.http2.min_ping_interval_without_data_ms"]
    for options in (channel_options(), channel_options("service"), transport._OPTIONS):
        assert dict(options)["grpc.keepalive_time_ms"] >= 2 * shortest
