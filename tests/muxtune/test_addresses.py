"""Addresses of clients: replicas, certificates and plain text; and the ports that a local mesh chooses."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from socket import create_server

import pytest

from muxtune.aio import AsyncClient
from muxtune.client import Client
from muxtune.errors import InvalidInputError, UnavailableError
from muxtune.local.certificate_authority import issue
from muxtune.local.loopback import free_addresses
from muxtune.transport import is_loopback, target
from services.rpc.certificates import Certificates
from tests.muxtune.admission_fake import KEY, Admission

PORTS_OF_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest.mark.parametrize(
    ("address", "dialled"),
    [
        ("muxtune.example:7401", "muxtune.example:7401"),
        ("10.0.0.1:7401", "10.0.0.1:7401"),
        ("10.0.0.1:7401,10.0.0.2:7402", "ipv4:10.0.0.1:7401,10.0.0.2:7402"),
        (" 10.0.0.1:7401 , localhost:7402", "ipv4:10.0.0.1:7401,127.0.0.1:7402"),
        ("[::1]:7401,[2001:db8::2]:7401", "ipv6:[::1]:7401,[2001:db8::2]:7401"),
    ],
)
def test_an_address_becomes_a_grpc_target(address: str, dialled: str) -> None:
    assert target(address) == dialled


@pytest.mark.parametrize("address", ["a:1,b:1", "10.0.0.1:1,b:1", "10.0.0.1:1,", "10.0.0.1,10.0.0.2", "::1:1,[::1]"])
def test_a_list_of_anything_else_is_refused_with_what_to_write_instead(address: str) -> None:
    with pytest.raises(InvalidInputError, match=r"IP:PORT.*one name that resolves to all"):
        target(address)


def test_a_list_of_two_kinds_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="IPv4 and IPv6"):
        target("10.0.0.1:1,[::1]:1")


def test_a_key_goes_in_plain_text_to_loopback_alone() -> None:
    assert is_loopback("127.0.0.1:1,localhost:2,[::1]:3")
    assert not is_loopback("127.0.0.1:1,10.0.0.1:2") and not is_loopback("10.0.0.1:2,127.0.0.1:1")


@pytest.fixture
def pair() -> Iterator[list[Admission]]:
    both = [Admission(), Admission()]
    yield both
    for admission in both:
        admission.close()


def addresses(admissions: list[Admission]) -> str:
    return ",".join(admission.address for admission in admissions)


def test_both_replicas_are_called_and_either_may_stop(pair: list[Admission]) -> None:
    with Client(addresses(pair), KEY) as client:
        while not all(admission.requests for admission in pair):
            client.list_backbones()
        pair[0].close()
        for _ in range(5):
            assert client.list_backbones()[0].name == "tiny"


async def test_a_watch_continues_at_the_other_replica(pair: list[Admission]) -> None:
    for admission, cut in zip(pair, (3, 7), strict=True):
        admission.num_events, admission.cuts = 10, [cut, cut + 1]
    async with AsyncClient(addresses(pair), KEY) as client:
        seen = [event.sequence async for event in client.watch_task("tenants/acme/tasks/t")]
    assert seen == list(range(1, 11))
    assert all(admission.requests for admission in pair)


def test_the_certificate_of_each_must_name_the_first(tmp_path: Path) -> None:
    issue(tmp_path / "right", ["127.0.0.1"])
    issue(tmp_path / "wrong", ["127.0.0.2"])
    for folder, is_taken in (("right", True), ("wrong", False)):
        certificates = Certificates(tmp_path / folder / "admission")
        with ExitStack() as stack:
            pair = [Admission(certificates.for_server(is_mutual=False)) for _ in range(2)]
            for admission in pair:
                stack.callback(admission.close)
            client = stack.enter_context(Client(addresses(pair), KEY, tmp_path / folder / "ca.crt"))
            if is_taken:
                while not all(admission.requests for admission in pair):
                    client.list_backbones()
            else:
                with pytest.raises(UnavailableError):
                    client.list_backbones()
                assert not any(admission.metadata for admission in pair)  # no key was sent


def test_a_mesh_keeps_its_ports_and_chooses_others_only_where_they_are_taken() -> None:
    doors = [f"door {number}" for number in range(200)]
    first = free_addresses(doors)
    assert len(set(first.values())) == len(doors)
    with ExitStack() as servers:
        for door in doors[:10]:
            host, port = first[door].split(":")
            servers.enter_context(create_server((host, int(port))))
        second = free_addresses(doors, first)
    assert all(second[door] != first[door] for door in doors[:10])
    assert all(second[door] == first[door] for door in doors[10:])


@pytest.mark.skipif(not PORTS_OF_CONNECTIONS.exists(), reason="Linux says there which ports connections go out from")
def test_no_outgoing_connection_can_take_the_port_of_a_service() -> None:
    lowest, highest = map(int, PORTS_OF_CONNECTIONS.read_text().split())
    if lowest <= 10_240:
        pytest.skip(f"connections go out from {lowest} on: no port is safe from them")
    ports = [int(address.rpartition(":")[2]) for address in free_addresses(map(str, range(200))).values()]
    assert not [port for port in ports if lowest <= port <= highest]
