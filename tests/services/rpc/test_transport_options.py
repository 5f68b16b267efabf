"""A server holds little of what its clients send before it is read."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import admission_pb2_grpc

_DELAY_SECONDS, _STALLED_SECONDS, _NUM_READ = 0.01, 1.0, 60
_CHUNK = pb.UploadAdapterRequest(chunk={"data": bytes(1 << 20)})
_SERVER = f"""
import asyncio, grpc
from muxtune.v1 import admission_pb2_grpc
from services.rpc.transport_options import SERVER_OPTIONS

class Servicer(admission_pb2_grpc.AdmissionServiceServicer):
    async def UploadAdapter(self, requests, context):
        for _ in range({_NUM_READ}):
            await anext(requests)
        await asyncio.Event().wait()

async def main():
    server = grpc.aio.server(options=SERVER_OPTIONS)
    admission_pb2_grpc.add_AdmissionServiceServicer_to_server(Servicer(), server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def distant(port: int) -> AsyncIterator[str]:
    """Yield the address of a server that is far away: all bytes take a while, however many they are."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(1 << 18):
            loop.call_later(_DELAY_SECONDS, writer.write, data)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, to_server[1]), pump(to_server[0], writer), return_exceptions=True)

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    proxy.close()


async def test_a_client_gets_a_few_messages_ahead_of_the_server() -> None:
    """The server reads as fast as it can, and then no more. By gRPC's defaults the client got 63 MiB ahead."""
    server = await asyncio.create_subprocess_exec(sys.executable, "-c", _SERVER, stdout=subprocess.PIPE)
    assert server.stdout is not None
    try:
        port = int(await server.stdout.readline())
        async with distant(port) as address, grpc.aio.insecure_channel(address) as channel:
            call, num_written = admission_pb2_grpc.AdmissionServiceStub(channel).UploadAdapter(), 0
            while await has_written(call, 30 if num_written < _NUM_READ else _STALLED_SECONDS):
                num_written += 1
            call.cancel()
    finally:
        server.kill()
        await server.wait()
    assert _NUM_READ <= num_written <= _NUM_READ + 4


async def has_written(call, seconds: float) -> bool:
    try:
        await asyncio.wait_for(call.write(_CHUNK), seconds)
    except TimeoutError:
        return False
    return True
