"""A TCP proxy that can cut, refuse and hold connections: what networks do between two services."""

import asyncio
from contextlib import suppress

_CHUNK_BYTES = 1 << 16


class FaultProxy:
    """Between clients and `target` ("host:port"). Open until told otherwise."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._is_refusing = False
        self._may_flow = asyncio.Event()
        self._may_flow.set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> str:
        """Its own address."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Resets every connection, and each new one."""
        self._is_refusing = True
        for writer in self._writers:
            writer.transport.abort()

    def hold(self) -> None:
        """Nothing gets through any more, and nobody is told: a cable pulled."""
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
            there, back = await asyncio.open_connection(self._host, self._port)
        except OSError:
            return writer.transport.abort()
        self._writers |= {writer, back}
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        self._writers -= {writer, back}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                await self._may_flow.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
