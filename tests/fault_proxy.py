"""A TCP proxy that can cut, refuse and hold connections between two services, as a faulty network does."""

import asyncio
from contextlib import suppress

_CHUNK_BYTES = 1 << 16


class FaultProxy:
    """Forwards connections of clients to `target` ("host:port")."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._is_refusing = False
        self._may_flow = asyncio.Event()
        self._may_flow.set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> str:
        """Start the proxy and return its address."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Reset all connections, and every new one."""
        self._is_refusing = True
        for writer in self._writers:
            writer.transport.abort()

    def hold(self) -> None:
        """Forward nothing, and keep connections open: like a pulled cable."""
        self._may_flow.clear()

    def heal(self) -> None:
        self._is_refusing = False
        self._may_flow.set()

    async def close(self) -> None:
        self.cut()
        self.heal()
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_refusing:
            return writer.transport.abort()
        try:
            target_reader, target_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            return writer.transport.abort()
        self._writers |= {writer, target_writer}
        await asyncio.gather(self._pump(reader, target_writer), self._pump(target_reader, writer))
        self._writers -= {writer, target_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                await self._may_flow.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
