"""The local pipe between the servicer's process and the trainer's: tagged, length-prefixed protobuf messages.

A frame is one byte of tag, four of length (little-endian), then the message. The trainer's end blocks, the servicer's
is asyncio. The other end's death reads as the end of the pipe.
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
    """What a frame holds. Down: to the trainer; up: from it."""

    PLAN = b"P"  # down: ExecutorPlan
    STALE = b"S"  # down: RunPlanRequest.stale_tasks
    LEASE_LOST = b"L"  # down: empty; drop every task without committing anything
    HOLD = b"H"  # down: empty; too much is unacknowledged
    GO = b"G"  # down: empty
    EXPORT = b"X"  # down: ExportAdapterRequest
    DRAIN = b"D"  # down: empty
    DESCRIBED = b"d"  # up: DescribeExecutorResponse; the first says that the trainer is ready
    RESULTS = b"r"  # up: RunPlanResponse, not numbered yet
    EXPORTED = b"x"  # up: ExportAdapterResponse; answers come in the order of EXPORT
    EXPORT_FAILED = b"e"  # up: TaskFailure
    DRAINED = b"q"  # up: empty
    ALIVE = b"a"  # up: empty; now and then while it works
    IDLE = b"i"  # up: empty; it waits to be told something


Frame = tuple[Tag, bytes]
_TAGS = frozenset(tag.value for tag in Tag)


class BlockingPipe:
    """The trainer's end. One thread reads; writing is locked."""

    def __init__(self, file_descriptor: int) -> None:
        self._socket = socket.socket(fileno=file_descriptor)
        self._file = self._socket.makefile("rb")
        self._lock = threading.Lock()

    def write(self, tag: Tag, message: Message | None = None) -> None:
        """Raises OSError when the server is gone."""
        with self._lock:
            self._socket.sendall(_encode(tag, message))

    def read(self) -> Frame | None:
        """The next frame; None when the other end is gone."""
        try:
            header = self._file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return None
            tag, size = _length(header)
            payload = self._file.read(size)
            return (tag, payload) if len(payload) == size else None
        except OSError:
            return None


class AsyncPipe:
    """The servicer's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def of(cls, end: socket.socket) -> "AsyncPipe":
        return cls(*await asyncio.open_unix_connection(sock=end))

    async def write(self, tag: Tag, message: Message | None = None) -> None:
        """Raises ConnectionError when the trainer is gone."""
        self._writer.write(_encode(tag, message))
        await self._writer.drain()

    async def read(self) -> Frame | None:
        """The next frame; None when the trainer is gone."""
        try:
            tag, size = _length(await self._reader.readexactly(_HEADER.size))
            return tag, await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, OSError):
            return None

    def close(self) -> None:
        self._writer.close()


def _encode(tag: Tag, message: Message | None) -> bytes:
    payload = message.SerializeToString() if message is not None else b""
    return _HEADER.pack(tag.value, len(payload)) + payload


def _length(header: bytes) -> tuple[Tag, int]:
    tag, size = _HEADER.unpack(header)
    if size > MAX_FRAME_BYTES or tag not in _TAGS:
        raise ConnectionError(f"a frame {tag!r} of {size} bytes: the pipe is out of step")
    return Tag(tag), size
