"""Pipe between the server's process and the trainer's: tagged, length-prefixed protobuf messages over a socket pair.

A frame is one byte of tag, four bytes of length (little-endian), and the message. The trainer's end blocks, the
server's end is asyncio. When one process dies, the other reads the end of the pipe.
"""

import asyncio
import enum
import socket
import struct
import threading

from google.protobuf.message import Message

_HEADER = struct.Struct("<cI")
MAX_FRAME_BYTES = 64 << 20


class Tag(enum.Enum):
    """Kinds of frames, with the message of each. The first group goes to the trainer, the second comes from it."""

    PLAN = b"P"  # ExecutorPlan, or the last part of one
    PLAN_PART = b"p"  # ExecutorPlan with some of its tasks; further parts follow
    STALE = b"S"  # RunPlanRequest.stale_tasks
    LEASE_LOST = b"L"  # empty; drop every task without committing anything
    PAUSE = b"H"  # empty; scheduling is away, or too many results are not acknowledged
    RESUME = b"G"  # empty
    EXPORT = b"X"  # ExportAdapterRequest
    DRAIN = b"D"  # empty

    DESCRIBED = b"d"  # DescribeExecutorResponse; the first one says that the trainer is ready
    RESULTS = b"r"  # RunPlanResponse, not numbered yet
    EXPORTED = b"x"  # ExportAdapterResponse; in the order of the EXPORT frames
    EXPORT_FAILED = b"e"  # TaskFailure
    DRAINED = b"q"  # empty
    ALIVE = b"a"  # empty; a heartbeat while the trainer works
    IDLE = b"i"  # empty; the trainer waits for a request


Frame = tuple[Tag, bytes]
_TAGS = frozenset(tag.value for tag in Tag)


class BlockingPipe:
    """The trainer's end. One thread reads; any thread may write."""

    def __init__(self, file_descriptor: int) -> None:
        self._socket = socket.socket(fileno=file_descriptor)
        self._file = self._socket.makefile("rb")
        self._lock = threading.Lock()

    def write(self, tag: Tag, message: Message | None = None) -> None:
        """Writes one frame. Raises OSError when the server is gone."""
        with self._lock:
            self._socket.sendall(_encode(tag, message))

    def read(self) -> Frame | None:
        """Returns the next frame; None when the server is gone."""
        try:
            header = self._file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return None
            tag, size = _decode_header(header)
            payload = self._file.read(size)
            return (tag, payload) if len(payload) == size else None
        except OSError:
            return None


class AsyncPipe:
    """The server's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def of(cls, end: socket.socket) -> "AsyncPipe":
        return cls(*await asyncio.open_unix_connection(sock=end))

    async def write(self, tag: Tag, message: Message | None = None) -> None:
        """Writes one frame. Raises ConnectionError when the trainer is gone."""
        self._writer.write(_encode(tag, message))
        await self._writer.drain()

    async def read(self) -> Frame | None:
        """Returns the next frame; None when the trainer is gone."""
        try:
            tag, size = _decode_header(await self._reader.readexactly(_HEADER.size))
            return tag, await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, OSError):
            return None

    def close(self) -> None:
        self._writer.close()


def _encode(tag: Tag, message: Message | None) -> bytes:
    payload = message.SerializeToString() if message is not None else b""
    return _HEADER.pack(tag.value, len(payload)) + payload


def _decode_header(header: bytes) -> tuple[Tag, int]:
    tag, size = _HEADER.unpack(header)
    if size > MAX_FRAME_BYTES or tag not in _TAGS:
        raise ConnectionError(f"the pipe holds no valid frame: tag {tag!r}, {size} bytes, at most {MAX_FRAME_BYTES}")
    return Tag(tag), size
