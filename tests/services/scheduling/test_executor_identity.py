"""Executors act under the name in their certificate only, and only an operator may drain one; over mutual TLS."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from engine.errors import InvalidInputError, NotFoundError, PermissionDeniedError, SupersededError, UnavailableError
from engine.planning.types import PlannerConfig
from muxtune.local import certificate_authority
from muxtune.v1 import execution_pb2, execution_pb2_grpc, plan_pb2, scheduling_pb2, scheduling_pb2_grpc
from services.rpc.authentication import mesh_authenticator
from services.rpc.certificates import Certificates, ClientTls
from services.rpc.client_channel import open_channel
from services.rpc.interceptor import RpcInterceptor
from services.scheduling.audit_forwarder import audit_through_ledger
from services.scheduling.executor_streams import ExecutorStream
from services.scheduling.scheduler import Scheduler
from services.scheduling.servicer import SchedulingServicer
from tests.services.scheduling.mesh_fakes import BACKBONE, Changes, FakeExecutor, FakeLedger

A, B = "executors/gpu-a", "executors/gpu-b"


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ca")
    certificate_authority.issue(folder, executors=["gpu-a", "gpu-b"])
    return folder


class Mesh:
    """A scheduling servicer with a fake ledger, and executors with certificates."""

    def __init__(self, certs: Path, stack: AsyncExitStack) -> None:
        self.certs, self._stack = certs, stack
        self.changes = Changes()
        self.ledger = FakeLedger(self.changes)
        self.address = ""

    async def serve(self, name: str, add: Any, servicer: Any) -> str:
        audit = audit_through_ledger(Forwarding(self.ledger))  # type: ignore[arg-type]
        server = grpc.aio.server(interceptors=[RpcInterceptor(mesh_authenticator(""), audit=audit)])
        add(servicer, server)
        credentials = Certificates(self.certs / name).for_server(is_mutual=True)
        address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
        await server.start()
        self._stack.push_async_callback(server.stop, None)
        return address

    async def scheduling(self, name: str) -> Any:
        """Return a stub that authenticates with the certificate in the folder."""
        tls = ClientTls(Certificates(self.certs / name), "scheduling")
        channel = await self._stack.enter_async_context(open_channel(self.address, "", tls))
        return scheduling_pb2_grpc.SchedulingServiceStub(channel)


class Forwarding:
    """A stub that calls the ledger directly, without gRPC."""

    def __init__(self, ledger: FakeLedger) -> None:
        self._ledger = ledger

    def __getattr__(self, method: str) -> Any:
        return lambda request: getattr(self._ledger, method)(request, None)


@pytest.fixture
async def mesh(certs: Path) -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        mesh = Mesh(certs, stack)
        ledger: Any = Forwarding(mesh.ledger)
        tls = ClientTls(Certificates(certs / "scheduling"), "execution")
        servicer = SchedulingServicer(Scheduler(ledger, "", PlannerConfig(256, 16), tls=tls), ledger, 15.0)
        add = scheduling_pb2_grpc.add_SchedulingServiceServicer_to_server
        mesh.address = await mesh.serve("scheduling", add, servicer)
        yield mesh


def register(name: str) -> scheduling_pb2.RegisterExecutorRequest:
    executor = plan_pb2.Executor(name=name, address="127.0.0.1:1", incarnation="i1", backbone=BACKBONE)
    return scheduling_pb2.RegisterExecutorRequest(executor=executor)


async def test_an_executor_registers_under_its_own_name_alone(mesh: Mesh) -> None:
    a, b = await mesh.scheduling(A), await mesh.scheduling(B)
    assert (await a.RegisterExecutor(register(A))).lease_term == 1
    keep = scheduling_pb2.KeepLeaseRequest(executor=A, incarnation="i1", lease_term=1)
    end = scheduling_pb2.SchedulingServiceEndLeaseRequest(executor=A, incarnation="i1")
    for call, request in ((b.RegisterExecutor, register(A)), (b.KeepLease, keep), (b.EndLease, end)):
        with pytest.raises(PermissionDeniedError, match=f"for {B}, not for .*{A}.*muxtune certs"):
            await call(request)
    assert list(mesh.ledger.executors) == [A]
    await a.KeepLease(keep)
    await a.EndLease(end)
    assert not mesh.ledger.executors
    assert (await b.RegisterExecutor(register(B))).lease_term == 1


@pytest.mark.parametrize("name", ["", "gpu-a", "executors/GPU-A", "executors/gpu-a/", "executors/gpu-a.execution"])
async def test_a_similar_name_is_refused(mesh: Mesh, name: str) -> None:
    with pytest.raises(PermissionDeniedError):
        await (await mesh.scheduling(A)).RegisterExecutor(register(name))


async def test_the_name_is_checked_first(mesh: Mesh) -> None:
    broken = plan_pb2.Executor(name=B, address="unix:/etc/passwd")
    request = scheduling_pb2.RegisterExecutorRequest(executor=broken)
    for mine, refusal in ((A, PermissionDeniedError), (B, InvalidInputError)):
        with pytest.raises(refusal):
            await (await mesh.scheduling(mine)).RegisterExecutor(request)


@pytest.mark.parametrize("dns_names", [("execution",), ("execution", "gpu-a.execution", "gpu-b.execution")])
async def test_a_certificate_that_names_no_executor_or_two_is_refused(
    mesh: Mesh, tmp_path: Path, dns_names: tuple[str, ...]
) -> None:
    """`muxtune certs` made such certificates before executors had names."""
    ca = x509.load_pem_x509_certificate((mesh.certs / "ca.crt").read_bytes())
    ca_key = certificate_authority._authority(mesh.certs)[0]
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certificate_authority._signed("execution", key, (ca_key, ca), 1, dns_names)
    (tmp_path / "tls.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    (tmp_path / "tls.key").write_bytes(certificate_authority._pem(key))
    (tmp_path / "ca.crt").write_bytes((mesh.certs / "ca.crt").read_bytes())
    with pytest.raises(PermissionDeniedError, match=r"exactly one executor.*muxtune certs FOLDER --executor"):
        await (await mesh.scheduling(str(tmp_path))).RegisterExecutor(register(A))


class Warnings(logging.Handler):
    """Collects warnings, so that a test can wait for one."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: asyncio.Queue[str] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.put_nowait(record.getMessage())


async def test_scheduling_sends_no_plan_to_another_certificate(mesh: Mesh) -> None:
    """B answers at the address that A registered: its certificate fails the handshake before any message."""
    player, log = FakeExecutor(mesh.changes, B), logging.getLogger("services.scheduling.executor_streams")
    address = await mesh.serve(B, execution_pb2_grpc.add_ExecutionServiceServicer_to_server, player)
    tls, ledger = ClientTls(Certificates(mesh.certs / "scheduling"), "execution"), Forwarding(mesh.ledger)
    log.addHandler(warned := Warnings())
    try:
        executor = plan_pb2.Executor(name=A, address=address, incarnation="i1", lease_term=1)
        stream = ExecutorStream(executor, 1, "", ledger, tls)  # type: ignore[arg-type]
        stream.requests.put_plan(plan_pb2.ExecutorPlan(executor=A, version=1))
        assert "Hostname" in await asyncio.wait_for(warned.messages.get(), 20)
        await stream.close()
    finally:
        log.removeHandler(warned)
    assert not player.num_streams
    executor.name = B
    stream = ExecutorStream(executor, 1, "", ledger, tls)  # type: ignore[arg-type]
    stream.requests.put_plan(plan_pb2.ExecutorPlan(executor=B, version=1))
    await mesh.changes.until(lambda: player.plans)
    await stream.close()


async def executor_to_drain(mesh: Mesh) -> tuple[FakeExecutor, Any]:
    """Return B, with a lease, and a function that requests its drain with a certificate."""
    player = FakeExecutor(mesh.changes, B)
    address = await mesh.serve(B, execution_pb2_grpc.add_ExecutionServiceServicer_to_server, player)
    mesh.ledger.executors[B] = plan_pb2.Executor(name=B, address=address, incarnation="i1", lease_term=1)

    async def drain(who: str, executor: str = B) -> None:
        request = scheduling_pb2.DrainExecutorRequest(executor=executor)
        await (await mesh.scheduling(who)).DrainExecutor(request, timeout=20)

    return player, drain


def audit_entries(mesh: Mesh) -> list[tuple[str, str, str, str]]:
    return [(e.subject, e.method.rpartition("/")[2], e.resource, e.status_code) for e in mesh.ledger.audit]


async def test_an_operators_drain_is_in_the_audit_log(mesh: Mesh) -> None:
    player, drain = await executor_to_drain(mesh)
    await drain("operator")
    await drain("operator")
    with pytest.raises(NotFoundError, match="executors/none"):
        await drain("operator", "executors/none")
    player.refusals = [SupersededError("as whatever goes wrong there")]
    with pytest.raises(SupersededError):
        await drain("operator")
    assert player.num_drains == 2
    assert audit_entries(mesh) == [
        ("certificate operator", "DrainExecutor", executor, code)
        for executor, code in ((B, "OK"), (B, "OK"), ("executors/none", "NOT_FOUND"), (B, "ABORTED"))
    ]


async def test_only_an_operator_drains_and_only_through_scheduling(mesh: Mesh) -> None:
    player, drain = await executor_to_drain(mesh)
    for who in (A, B, "admission", "alignment", "scheduling"):
        with pytest.raises(PermissionDeniedError):
            await drain(who)
    expected = [(f"certificate {who}", who) for who in ("admission", "alignment", "scheduling")]
    expected += [(f"certificate of {who}", who) for who in (A, B)]
    assert {line[0] for line in audit_entries(mesh)} == {subject for subject, _ in expected}
    assert {line[1:] for line in audit_entries(mesh)} == {("DrainExecutor", B, "PERMISSION_DENIED")}
    address = mesh.ledger.executors[B].address
    for who in ("operator", A, B):
        tls = ClientTls(Certificates(mesh.certs / who), "execution")
        async with open_channel(address, "", tls) as channel:
            with pytest.raises(PermissionDeniedError):
                await execution_pb2_grpc.ExecutionServiceStub(channel).Drain(execution_pb2.DrainRequest())
    assert not player.num_drains


async def test_repeated_refusals_do_not_fill_the_log(mesh: Mesh) -> None:
    a = await mesh.scheduling(A)
    for _ in range(20):
        with pytest.raises(PermissionDeniedError):
            await a.RegisterExecutor(register(B))
    assert audit_entries(mesh) == [(f"certificate of {A}", "RegisterExecutor", B, "PERMISSION_DENIED")]


async def test_drain_works_without_the_audit_log(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    player, drain = await executor_to_drain(mesh)
    mesh.ledger.refusals["RecordAuditEvent"] = [UnavailableError("the database is away")]
    await drain("operator")
    assert player.num_drains == 1 and not mesh.ledger.audit
    assert "not recorded" in caplog.text and "DrainExecutor" in caplog.text
