"""Mutual TLS between services over real sockets: only the certificate decides who the caller is."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from engine.errors import MuxtuneError, PermissionDeniedError, UnavailableError
from muxtune.local.certificate_authority import NAMES, issue
from muxtune.v1 import alignment_pb2, alignment_pb2_grpc, ledger_pb2, ledger_pb2_grpc
from services.rpc.authentication import current_principal, mesh_authenticator
from services.rpc.authorization import Principal
from services.rpc.certificates import Certificates, ClientTls
from services.rpc.client_channel import open_channel, open_sync_channel
from services.rpc.health import is_serving
from services.rpc.interceptor import RpcInterceptor
from services.rpc.server_settings import ServerSettings
from services.settings import SettingsError
from tests.certificates import certificates, trust

REMOVE = alignment_pb2.RemoveDatasetRequest(tenant="tenants/a", sha256="0" * 64)


class Server:
    """A server of alignment and the ledger with the certificate in `certs`; `seen` are its callers."""

    def __init__(self, certs: Certificates, is_mutual: bool = True) -> None:
        self.seen: list[Principal] = []
        self.server = grpc.aio.server(interceptors=[RpcInterceptor(mesh_authenticator(""))])

        async def answer(servicer: object, request: object, context: object) -> alignment_pb2.RemoveDatasetResponse:
            self.seen.append(current_principal())
            return alignment_pb2.RemoveDatasetResponse()

        async def watch(servicer: object, request: object, context: object) -> AsyncIterator[object]:
            while True:
                yield ledger_pb2.WatchChangesResponse(revision=1)
                await asyncio.sleep(0.01)

        alignment = type("A", (alignment_pb2_grpc.AlignmentServiceServicer,), {"RemoveDataset": answer})()
        ledger = type("L", (ledger_pb2_grpc.LedgerServiceServicer,), {"WatchChanges": watch})()
        alignment_pb2_grpc.add_AlignmentServiceServicer_to_server(alignment, self.server)
        ledger_pb2_grpc.add_LedgerServiceServicer_to_server(ledger, self.server)
        health_pb2_grpc.add_HealthServicer_to_server(health_aio.HealthServicer(), self.server)
        credentials = certs.for_server(is_mutual=is_mutual)
        self.address = f"127.0.0.1:{self.server.add_secure_port('127.0.0.1:0', credentials)}"

    async def __aenter__(self) -> "Server":
        await self.server.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.server.stop(None)


@pytest.fixture
async def alignment() -> AsyncIterator[Server]:
    async with Server(certificates("alignment")) as running:
        yield running


async def remove(address: str, client_tls: ClientTls, **options: object) -> None:
    async with open_channel(address, "", client_tls) as channel:
        await alignment_pb2_grpc.AlignmentServiceStub(channel).RemoveDataset(REMOVE, **options)


@pytest.mark.parametrize("name", [*NAMES, "execution"])
async def test_only_the_peers_in_the_table_get_in(alignment: Server, name: str) -> None:
    if name == "admission":
        await remove(alignment.address, trust(name, "alignment"))
        assert [(p.tenant, p.role) for p in alignment.seen] == [(None, "admission")]
    else:
        with pytest.raises(PermissionDeniedError, match=name):
            await remove(alignment.address, trust(name, "alignment"))
        assert not alignment.seen


@pytest.mark.parametrize(
    "forged",
    [
        [("authorization", "Bearer mxt_0_x")],
        [("authorization", "Bearer "), ("x-muxtune-tenant", "tenants/rival"), ("x-muxtune-role", "operator")],
        [("x-forwarded-client-cert", "Subject=CN=operator"), ("x509_common_name", "operator")],
    ],
    ids=["a key", "a tenant", "a certificate"],
)
async def test_a_peers_metadata_is_ignored(alignment: Server, forged: object) -> None:
    await remove(alignment.address, trust("admission", "alignment"), metadata=forged)
    assert alignment.seen == [Principal(None, alignment.seen[0].role, "certificate admission")]
    with pytest.raises(PermissionDeniedError):
        await remove(alignment.address, trust("execution", "alignment"), metadata=forged)


async def test_without_a_certificate_of_this_ca_there_is_no_connection(alignment: Server, tmp_path: Path) -> None:
    issue(tmp_path)  # a CA of somebody else, with all the right names
    other_ca = ClientTls(Certificates(tmp_path / "admission"), "alignment")
    with pytest.raises(UnavailableError):
        await remove(alignment.address, other_ca)
    # Their certificate, our roots: the server does not take it.
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name in ("tls.crt", "tls.key"):
        (mixed / name).write_bytes((tmp_path / "admission" / name).read_bytes())
    (mixed / "ca.crt").write_bytes((certificates("admission").folder / "ca.crt").read_bytes())
    with pytest.raises(UnavailableError):
        await remove(alignment.address, ClientTls(Certificates(mixed), "alignment"))
    roots = grpc.ssl_channel_credentials((mixed / "ca.crt").read_bytes())
    options = [("grpc.ssl_target_name_override", "alignment")]
    for channel in (
        grpc.aio.insecure_channel(alignment.address),
        grpc.aio.secure_channel(alignment.address, roots, options=options),
    ):
        async with channel:
            call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
    assert not alignment.seen


async def test_a_certificate_signed_by_a_service_is_refused(alignment: Server, tmp_path: Path) -> None:
    """A service's key cannot sign an operator's certificate: it is not a CA."""
    folder = tmp_path / "forged"
    folder.mkdir()
    stolen = certificates("scheduling").folder
    (folder / "ca.crt").write_bytes((stolen / "tls.crt").read_bytes())
    (folder / "ca.key").write_bytes((stolen / "tls.key").read_bytes())
    issue(folder)
    chain = (folder / "admission" / "tls.crt").read_bytes() + (stolen / "tls.crt").read_bytes()
    (folder / "admission" / "tls.crt").write_bytes(chain)
    (folder / "admission" / "ca.crt").write_bytes((stolen / "ca.crt").read_bytes())
    with pytest.raises(UnavailableError):
        await remove(alignment.address, ClientTls(Certificates(folder / "admission"), "alignment"))
    assert not alignment.seen


async def test_a_client_knows_a_service_by_its_name(alignment: Server) -> None:
    """A server at alignment's address with another service's certificate gets no call."""
    with pytest.raises(UnavailableError):
        await remove(alignment.address, trust("admission", "scheduling"))
    assert not alignment.seen


async def test_the_public_port_ignores_client_certificates() -> None:
    async with Server(certificates("alignment"), is_mutual=False) as public:
        with pytest.raises(MuxtuneError, match="no API key"):
            await remove(public.address, trust("admission", "alignment"))
        assert not public.seen


async def test_an_expired_certificate_opens_nothing(alignment: Server, tmp_path: Path) -> None:
    for name in ("ca.crt", "ca.key"):
        (tmp_path / name).write_bytes((certificates("admission").folder.parent / name).read_bytes())
    issue(tmp_path, days=0)
    with pytest.raises(UnavailableError):
        await remove(alignment.address, ClientTls(Certificates(tmp_path / "admission"), "alignment"))


async def test_certificates_are_replaced_without_a_restart(tmp_path: Path) -> None:
    """With a new CA on both sides the running server and the open channel use it; a running stream goes on."""
    issue(tmp_path)
    here = ClientTls(Certificates(tmp_path / "admission"), "alignment")
    scheduling = ClientTls(Certificates(tmp_path / "scheduling"), "alignment")
    async with (
        Server(Certificates(tmp_path / "alignment")) as server,
        open_channel(server.address, "", here) as channel,
        open_channel(server.address, "", scheduling) as watching,
    ):
        stub = alignment_pb2_grpc.AlignmentServiceStub(channel)
        await stub.RemoveDataset(REMOVE)
        stream = ledger_pb2_grpc.LedgerServiceStub(watching).WatchChanges(ledger_pb2.WatchChangesRequest())
        await anext(stream)
        for name in ("ca.crt", "ca.key"):
            (tmp_path / name).unlink()
        issue(tmp_path)
        await stub.RemoveDataset(REMOVE)
        await anext(stream)
        with open_sync_channel(server.address, "", here) as blocking:
            await asyncio.to_thread(alignment_pb2_grpc.AlignmentServiceStub(blocking).RemoveDataset, REMOVE)
            issue(tmp_path)
            await asyncio.to_thread(alignment_pb2_grpc.AlignmentServiceStub(blocking).RemoveDataset, REMOVE)
        assert len(server.seen) == 4
        # Only the files of now count: a copy of the first CA's certificate is refused by new handshakes.
        with pytest.raises(UnavailableError):
            await remove(server.address, trust("admission", "alignment"))
        stream.cancel()


async def test_half_replaced_files_change_nothing(tmp_path: Path) -> None:
    issue(tmp_path)
    tls = ClientTls(Certificates(tmp_path / "admission"), "alignment")
    async with Server(Certificates(tmp_path / "alignment")) as server:
        (tmp_path / "alignment" / "tls.key").write_bytes((tmp_path / "scheduling" / "tls.key").read_bytes())
        await remove(server.address, tls)
        (tmp_path / "alignment" / "tls.crt").unlink()
        await remove(server.address, tls)
    with pytest.raises(UnavailableError, match="muxtune certs"):
        Certificates(tmp_path / "alignment").version()


async def test_a_channel_survives_a_half_replaced_folder(alignment: Server, tmp_path: Path) -> None:
    here = tmp_path / "admission"
    here.mkdir()
    for name in ("tls.crt", "tls.key", "ca.crt"):
        (here / name).write_bytes((certificates("admission").folder / name).read_bytes())
    async with open_channel(alignment.address, "", ClientTls(Certificates(here), "alignment")) as channel:
        stub = alignment_pb2_grpc.AlignmentServiceStub(channel)
        await stub.RemoveDataset(REMOVE)
        (here / "tls.key").write_bytes((certificates("execution").folder / "tls.key").read_bytes())
        await stub.RemoveDataset(REMOVE)
        (here / "tls.crt").unlink()
        await stub.RemoveDataset(REMOVE)
    assert len(alignment.seen) == 3
    for folder in (here, tmp_path / "none"):
        with pytest.raises(SettingsError, match="MUXTUNE_CERTS"):
            ServerSettings(certs=folder).ports()
        with pytest.raises(SettingsError, match="MUXTUNE_CERTS"):
            ServerSettings(certs=folder).client_tls("alignment")


async def test_health_wants_a_certificate_and_no_role(alignment: Server) -> None:
    for name in (*NAMES, "execution"):
        answer = await asyncio.to_thread(is_serving, alignment.address, trust(name, "alignment"))
        assert answer


def test_settings_without_authentication_are_refused() -> None:
    folder = certificates("alignment").folder
    for wrong, said in (
        ({}, "MUXTUNE_CERTS"),
        ({"certs": folder, "mesh_secret": "s"}, "MUXTUNE_CERTS"),
        ({"mesh_secret": "s", "listen": "0.0.0.0:0"}, "not a loopback"),
        ({"mesh_secret": "s", "listen": "[::]:0"}, "not a loopback"),
        ({"mesh_secret": "s", "listen": ":0"}, "not a loopback"),
        ({"mesh_secret": "s", "listen": "127.example.com:0"}, "not a loopback"),
    ):
        with pytest.raises(SettingsError, match=said):
            ServerSettings(**wrong).ports()
    for right in ({"mesh_secret": "s", "listen": "[::1]:0"}, {"mesh_secret": "s", "listen": "127.0.0.9:0"}):
        assert ServerSettings(**right).ports() == [(right["listen"], None)]
