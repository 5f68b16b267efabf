"""The local pipe between the servicer and its trainer: protobuf messages, each behind a tag and its length.

A frame is one byte of tag, four bytes of length (little-endian), then the message. The trainer's side blocks; the
servicer's side is asyncio. The other end's death reads as the end of the pipe.
"""

import asyncio
import enum
import socket
import struct
import threading
from collections.abc import Mapping

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from muxtune.v1 import errors_pb2, execution_pb2

_HEADER = struct.Struct("<BI")
MAX_FRAME_BYTES = 64 << 20


class Tag(enum.IntEnum):
    """What a frame says. The first group goes down to the trainer, the second comes up from it."""

    PLAN = 1  # a plan to adopt at the next round boundary, stale tasks to drop
    RUN = 2  # results are wanted: go on
    PAUSE = 3  # finish the round, then wait
    EXPORT = 4
    DRAIN = 5  # checkpoint and release everything
    DROP = 6  # forget everything, commit nothing: the lease is lost

    DESCRIBED = 16  # ready, or what is resident changed
    RESULTS = 17
    EXPORTED = 18  # answers to EXPORT come in its order
    EXPORT_FAILED = 19
    DRAINED = 20


_MESSAGES: Mapping[Tag, type[Message]] = {
    Tag.PLAN: execution_pb2.RunPlanRequest,
    Tag.RUN: Empty,
    Tag.PAUSE: Empty,
    Tag.EXPORT: execution_pb2.ExportAdapterRequest,
    Tag.DRAIN: Empty,
    Tag.DROP: Empty,
    Tag.DESCRIBED: execution_pb2.DescribeExecutorResponse,
    Tag.RESULTS: execution_pb2.RunPlanResponse,
    Tag.EXPORTED: execution_pb2.ExportAdapterResponse,
    Tag.EXPORT_FAILED: errors_pb2.TaskFailure,
    Tag.DRAINED: Empty,
}
Frame = tuple[Tag, Message]


def _encode(tag: Tag, message: Message | None) -> bytes:
    body = (message or Empty()).SerializeToString()
    return _HEADER.pack(tag, len(body)) + body


def _decode(tag: int, body: bytes) -> Frame:
    known = Tag(tag)
    return known, _MESSAGES[known].FromString(body)


def _length(header: bytes) -> tuple[int, int]:
    tag, length = _HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ConnectionError(f"a frame of {length} bytes: the pipe is out of step")
    return tag, length


class TrainerPipe:
    """The trainer's end, blocking. One thread may receive while another sends."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()

    def send(self, tag: Tag, message: Message | None = None) -> None:
        with self._sending:
            self._socket.sendall(_encode(tag, message))

    def receive(self) -> Frame | None:
        """The next frame; None when the servicer is gone."""
        try:
            tag, length = _length(self._read(_HEADER.size))
            return _decode(tag, self._read(length))
        except (EOFError, OSError):
            return None

    def _read(self, num_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < num_bytes:
            part = self._socket.recv(num_bytes - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


class ServicerPipe:
    """The servicer's end, asyncio."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, connection: socket.socket) -> "ServicerPipe":
        return cls(*await asyncio.open_unix_connection(sock=connection))

    def send(self, tag: Tag, message: Message | None = None) -> None:
        """Never blocks: what goes down is small, and the trainer always reads. Lost if the trainer is gone."""
        if not self._writer.is_closing():
            self._writer.write(_encode(tag, message))

    async def receive(self) -> Frame | None:
        """The next frame; None when the trainer is gone."""
        try:
            tag, length = _length(await self._reader.readexactly(_HEADER.size))
            return _decode(tag, await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):
            return None

    def close(self) -> None:
        self._writer.close()
