"""Calls without a valid key are limited and counted by address; callers with a valid key at that address are not."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import MuxtuneError, OverloadedError, UnauthenticatedError, UnavailableError
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import admission_pb2_grpc
from services.rpc import rate_limit, unauthenticated_limiter
from services.rpc.audit import AuditEntry
from services.rpc.authorization import Principal, Role
from services.rpc.interceptor import RpcInterceptor
from services.rpc.rate_limit import RateLimit
from services.rpc.unauthenticated_limiter import UnauthenticatedCallLimiter, client_address

METHOD = "/muxtune.v1.AdmissionService/GetTask"
HERE, THERE = "ipv4:192.0.2.1:5000", "ipv4:198.51.100.7:5000"


@dataclass
class Service:
    """A limiter before a list of valid keys, with two refusals a second (four in a burst)."""

    per_second: float = 2.0
    now: float = 100.0
    good: set[str] = field(default_factory=lambda: {"good"})
    looked_up: list[str] = field(default_factory=list)
    entries: list[AuditEntry] = field(default_factory=list)
    failure: MuxtuneError | None = None

    def __post_init__(self) -> None:
        self.limiter = UnauthenticatedCallLimiter(RateLimit(self.per_second, lambda: self.now), self.audit)

    async def audit(self, entry: AuditEntry) -> None:
        self.entries.append(entry)

    async def authenticate(self, method: str, token: str) -> Principal:
        self.looked_up.append(token)
        await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure
        if token not in self.good:
            raise UnauthenticatedError("unknown")
        return Principal("tenants/a", Role.TENANT, token)

    async def call(self, token: str | None, peer: str = HERE) -> type[MuxtuneError] | None:
        """Return the class of the error that the call got."""
        metadata = [] if token is None else [("authorization", f"Bearer {token}")]
        try:
            await self.limiter.authenticate(peer, METHOD, metadata, self.authenticate)
        except MuxtuneError as error:
            return type(error)
        return None


async def test_guesses_from_one_address_are_limited() -> None:
    service = Service()
    answers = [await service.call(f"guess-{number}") for number in range(50)]
    assert answers == [UnauthenticatedError] * 4 + [OverloadedError] * 46
    assert len(service.looked_up) == 4
    assert await service.call("guess", THERE) is UnauthenticatedError  # another address
    service.now += 1.0  # what RetryInfo promises
    assert [await service.call("guess") for _ in range(3)] == [UnauthenticatedError] * 2 + [OverloadedError]


async def test_concurrent_guesses_are_limited() -> None:
    service = Service()
    answers = await asyncio.gather(*(service.call(f"guess-{number}") for number in range(50)))
    assert answers.count(UnauthenticatedError) == len(service.looked_up) == 4


async def test_a_known_key_is_not_limited_by_its_address() -> None:
    service = Service(good={"good", "new"})
    assert await service.call("good") is None
    for number in range(50):
        await service.call(f"guess-{number}")
        assert await service.call("good") is None
    assert await service.call("new") is OverloadedError  # for a second
    service.now += 1.0
    assert await service.call("new") is None
    assert await service.call("new") is None


async def test_valid_calls_are_not_counted() -> None:
    service = Service(good={f"good-{number}" for number in range(100)})
    assert not any([await service.call(f"good-{number}") for number in range(100)])


async def test_a_revoked_key_is_limited() -> None:
    service = Service()
    assert await service.call("good") is None
    service.good.clear()
    assert [await service.call("good") for _ in range(6)] == [UnauthenticatedError] * 5 + [OverloadedError]


@pytest.mark.parametrize("failure", [UnavailableError("away"), OverloadedError("a tenant's own limit")], ids=repr)
async def test_failures_of_the_service_are_not_counted(failure: MuxtuneError) -> None:
    service = Service(failure=failure)
    assert [await service.call("good") for _ in range(20)] == [type(failure)] * 20
    service.failure = None
    assert await service.call("other") is UnauthenticatedError
    await service.limiter.write_audit_entries()
    assert [entry.principal.subject for entry in service.entries] == ["nobody, 1 calls from 192.0.2.1"]


async def test_unauthenticated_calls_are_one_entry_per_address() -> None:
    service, draw, expected = Service(), random.Random(3), dict[str, int]()
    for _ in range(500):
        host = f"192.0.2.{draw.randrange(3)}"
        await service.call(draw.choice([None, "guess", ""]), f"ipv4:{host}:{draw.randrange(1 << 16)}")
        expected[host] = expected.get(host, 0) + 1
    await service.limiter.write_audit_entries()
    assert {entry.principal.subject for entry in service.entries} == {
        f"nobody, {count} calls from {host}" for host, count in expected.items()
    }
    assert {(entry.method, entry.resource, entry.status_code) for entry in service.entries} == {
        (METHOD, "", "UNAUTHENTICATED")
    }
    await service.limiter.write_audit_entries()
    assert len(service.entries) == 3  # nothing new, no line


async def test_calls_from_many_addresses_use_bounded_entries_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "_MAX_BUCKETS", 50)
    monkeypatch.setattr(unauthenticated_limiter, "_MAX_TOKENS", 50)
    service = Service(good={f"good-{number}" for number in range(200)})
    for number in range(200):
        await service.call(f"good-{number}")
    for number in range(3000):
        await service.call("guess", f"ipv4:10.0.{number % 256}.{number // 256}:1")
    assert len(service.limiter._limit._buckets) == 50 == len(service.limiter._valid_digests)
    await service.limiter.write_audit_entries()
    assert len(service.entries) == 101
    counts = [int(entry.principal.subject.split()[1]) for entry in service.entries]
    assert sum(counts) == 3000
    assert service.entries[-1].principal.subject.endswith("calls from elsewhere")


async def test_counted_calls_are_written_at_the_end() -> None:
    service = Service()
    running = asyncio.create_task(service.limiter.run())
    await service.call(None)
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert len(service.entries) == 1


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1:5000", "192.0.2.1"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:5000", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2:ffff::9]:1", "2001:db8:1:2::/64"),
        ("ipv6:[::ffff:192.0.2.1]:5000", "192.0.2.1"),
        ("ipv6:[fe80::1%eth0]:5000", "fe80::/64"),
        ("ipv6:%5B::1%5D:5000", "::/64"),
        ("unix:/run/x", "unix"),
        ("unix:", "unix"),
        ("", ""),
    ],
)
def test_addresses_without_ports(peer: str, address: str) -> None:
    assert client_address(peer) == address


@given(st.text())
def test_any_peer_name_gives_an_address(peer: str) -> None:
    for text in (peer, f"ipv4:{peer}", f"ipv6:{peer}", f"ipv6:[{peer}]:1"):
        assert isinstance(client_address(text), str)


@pytest.fixture
async def served() -> AsyncIterator[tuple[Service, str]]:
    class Servicer(admission_pb2_grpc.AdmissionServiceServicer):
        async def GetTask(self, request: object, context: object) -> pb.GetTaskResponse:
            return pb.GetTaskResponse()

    service = Service()
    server = grpc.aio.server(
        interceptors=[RpcInterceptor(service.authenticate, unauthenticated_limiter=service.limiter)]
    )
    admission_pb2_grpc.add_AdmissionServiceServicer_to_server(Servicer(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield service, address
    await server.stop(None)


async def test_ports_and_forwarding_headers_do_not_change_the_address(served: tuple[Service, str]) -> None:
    service, address = served
    codes = []
    for number in range(8):
        forged = [("x-forwarded-for", f"203.0.113.{number}"), ("authorization", f"Bearer guess-{number}")]
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options) as channel:  # a connection of its own
            call = admission_pb2_grpc.AdmissionServiceStub(channel).GetTask(pb.GetTaskRequest(), metadata=forged)
            codes.append(await call.code())
    assert codes == [grpc.StatusCode.UNAUTHENTICATED] * 4 + [grpc.StatusCode.RESOURCE_EXHAUSTED] * 4
    await service.limiter.write_audit_entries()
    assert [entry.principal.subject for entry in service.entries] == ["nobody, 8 calls from 127.0.0.1"]
