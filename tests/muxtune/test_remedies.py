"""A client that cannot connect names the setting to change, in Python and on the command line."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from muxtune.aio import AsyncClient
from muxtune.cli.main import app
from muxtune.client import Client
from muxtune.errors import UnavailableError, from_rpc_error
from muxtune.local.certificate_authority import issue
from services.rpc.certificates import Certificates

pytestmark = pytest.mark.usefixtures("quick_retries")
CA_REMEDY = r"Set MUXTUNE_CA .*certs/ca\.crt"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[tuple[int, int, Path]]:
    """Yield a port with TLS, a port without, and the folder of the CA."""
    issue(tmp_path / "certs", hosts=["192.0.2.1"])
    server = grpc.aio.server()
    secure = Certificates(tmp_path / "certs" / "admission").for_server(is_mutual=False)
    ports = server.add_secure_port("127.0.0.1:0", secure), server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield *ports, tmp_path / "certs"
    await server.stop(None)


def message_of(address: str, ca: Path | None) -> str:
    with Client(address, "mxt_0_x", ca) as client, pytest.raises(UnavailableError) as refused:
        client.list_backbones()
    return refused.value.message


async def test_connection_errors_name_the_setting(server: tuple[int, int, Path], tmp_path: Path) -> None:
    secure, plain, certs = server
    issue(tmp_path / "other")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    cases = [
        (secure, None, CA_REMEDY),
        (secure, tmp_path / "other" / "ca.crt", CA_REMEDY),
        (secure, certs / "ca.crt", "muxtune certs FOLDER --host NAME"),  # it is of another address
        (plain, certs / "ca.crt", "does not speak TLS"),
        (closed, None, "Nothing listens there.*MUXTUNE_ADDRESS"),
    ]
    calls = (asyncio.to_thread(message_of, f"127.0.0.1:{port}", ca) for port, ca, _ in cases)
    for said, (_, _, remedy) in zip(await asyncio.gather(*calls), cases, strict=True):
        assert re.search(remedy, said), said


async def test_connection_errors_of_the_asyncio_client_name_the_setting(server: tuple[int, int, Path]) -> None:
    async with AsyncClient(f"127.0.0.1:{server[0]}", "mxt_0_x") as client:
        with pytest.raises(UnavailableError, match=CA_REMEDY):
            await client.list_backbones()


async def test_connection_errors_of_the_command_name_the_setting(
    server: tuple[int, int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUXTUNE_ADDRESS", f"127.0.0.1:{server[0]}")
    monkeypatch.setenv("MUXTUNE_API_KEY", "mxt_0_x")
    monkeypatch.delenv("MUXTUNE_CA", raising=False)
    done = await asyncio.to_thread(CliRunner().invoke, app, ["task", "list", "--data", str(tmp_path / "none")])
    assert done.exit_code == 1
    (line,) = done.output.splitlines()
    assert line.startswith("error:") and "MUXTUNE_CA" in line and "certs/ca.crt" in line


def test_a_call_that_broke_off_gets_no_advice_on_settings() -> None:
    """It had a connection: a service that is killed closes its sockets, too."""

    class Broken(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

        def details(self) -> str:
            return "Socket closed"

    assert from_rpc_error(Broken()).message == "UNAVAILABLE: Socket closed"
