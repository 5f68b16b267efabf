"""A channel to several replicas sends calls to the one that leads, also after the lead moves."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from engine.errors import UnavailableError
from muxtune.v1 import ledger_pb2, ledger_pb2_grpc
from services.rpc.authentication import mesh_authenticator
from services.rpc.client_channel import open_channel
from services.rpc.interceptor import RpcInterceptor

SECRET, LEDGER = "mesh_of-the-replicas", ledger_pb2.DESCRIPTOR.services_by_name["LedgerService"].full_name
REQUEST = ledger_pb2.EndLeaseRequest()
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Replica(ledger_pb2_grpc.LedgerServiceServicer):
    """A replica that refuses calls unless it leads the ledger, as admission does."""

    def __init__(self) -> None:
        self.is_leading, self.num_calls, self.num_refused = False, 0, 0
        self._health = health_aio.HealthServicer()
        self._server = grpc.aio.server(interceptors=[RpcInterceptor(mesh_authenticator(SECRET))])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        ledger_pb2_grpc.add_LedgerServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    async def start(self) -> None:
        await self.set_leading(False)
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    async def set_leading(self, is_leading: bool, reports_health: bool = True) -> None:
        self.is_leading = is_leading
        if reports_health:
            await self._health.set(LEDGER, SERVING if is_leading else NOT_SERVING)

    async def EndLease(self, request: Any, context: Any) -> ledger_pb2.EndLeaseResponse:
        if not self.is_leading:
            self.num_refused += 1
            raise UnavailableError("another replica leads the ledger")
        self.num_calls += 1
        return ledger_pb2.EndLeaseResponse()


@pytest.fixture
async def replicas() -> AsyncIterator[list[Replica]]:
    replicas = [Replica() for _ in range(3)]
    for replica in replicas:
        await replica.start()
    yield replicas
    for replica in replicas:
        await replica.stop()


def channel_to(replicas: list[Replica]) -> grpc.aio.Channel:
    return open_channel(",".join(replica.address for replica in replicas), SECRET, health_service=LEDGER)


async def test_calls_go_to_the_leading_replica_only(replicas: list[Replica]) -> None:
    await replicas[1].set_leading(True)
    async with channel_to(replicas) as channel:
        stub: Any = ledger_pb2_grpc.LedgerServiceStub(channel)
        for _ in range(50):
            await stub.EndLease(REQUEST)
    assert [replica.num_calls for replica in replicas] == [0, 50, 0]
    assert not any(replica.num_refused for replica in replicas)


async def test_no_call_fails_while_the_ledger_moves(replicas: list[Replica]) -> None:
    draw, leader = random.Random(11), replicas[0]
    await leader.set_leading(True)
    async with channel_to(replicas) as channel:
        stub: Any = ledger_pb2_grpc.LedgerServiceStub(channel)
        for _ in range(15):
            await leader.set_leading(False)
            leader = draw.choice(replicas)
            moving = asyncio.create_task(leader.set_leading(True))
            for _ in range(draw.randint(1, 10)):
                await stub.EndLease(REQUEST)
            await moving


async def test_calls_without_a_leader_are_unavailable_until_one_leads(
    replicas: list[Replica],
) -> None:
    async with channel_to(replicas) as channel:
        stub: Any = ledger_pb2_grpc.LedgerServiceStub(channel)
        with pytest.raises(UnavailableError):
            await stub.EndLease(REQUEST)
        calling = asyncio.ensure_future(stub.EndLease(REQUEST, wait_for_ready=True, timeout=20))
        await replicas[2].set_leading(True)
        await calling
        await replicas[2].stop()
        await replicas[0].set_leading(True)
        await stub.EndLease(REQUEST)
