"""No HTTP proxy of the environment carries what goes to loopback: not of clients, services, health checks or OTLP."""

from collections.abc import Iterator

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider

from engine.errors import UnavailableError
from muxtune.aio import AsyncClient
from muxtune.client import Client
from muxtune.errors import MuxtuneError
from muxtune.transport import proxy_options, url_proxy_options
from muxtune.v1 import admission_pb2, admission_pb2_grpc
from services.rpc.client_channel import open_channel, open_sync_channel
from services.rpc.health import is_serving
from services.telemetry import TelemetrySettings, _span_exporters
from tests.counting_proxy import CountingProxy, counting_proxy
from tests.muxtune.admission_fake import KEY, Admission

GET = admission_pb2.GetTaskRequest(name="tenants/a/tasks/t")


@pytest.fixture(scope="module")
def proxy() -> Iterator[CountingProxy]:
    with counting_proxy() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def admission() -> Iterator[Admission]:
    fake = Admission()
    yield fake
    fake.close()


@pytest.fixture(params=["{}", "127.0.0.1:1,{}"], ids=["address", "replicas"])
def address(admission: Admission, request: pytest.FixtureRequest) -> str:
    return request.param.format(admission.address)


def test_the_clients_of_tenants_go_past_it(proxy: CountingProxy, address: str) -> None:
    with Client(address, KEY) as client:
        assert client.get_task(GET.name).name
    assert proxy.num_connections == 0


async def test_the_asyncio_client_goes_past_it(proxy: CountingProxy, address: str) -> None:
    async with AsyncClient(address, KEY) as client:
        assert (await client.get_task(GET.name)).name
    assert proxy.num_connections == 0


async def test_channels_between_services_go_past_it(proxy: CountingProxy, admission: Admission, address: str) -> None:
    async with open_channel(address, "secret") as channel:
        assert (await admission_pb2_grpc.AdmissionServiceStub(channel).GetTask(GET)).task.name
    with open_sync_channel(admission.address, "secret") as blocking:
        assert admission_pb2_grpc.AdmissionServiceStub(blocking).GetTask(GET).task.name
    assert proxy.num_connections == 0


def test_a_health_check_goes_past_it(proxy: CountingProxy, admission: Admission) -> None:
    assert not is_serving(admission.address)  # the fake has no health service
    assert proxy.num_connections == 0


def test_spans_go_past_it(proxy: CountingProxy, admission: Admission) -> None:
    (exporter,) = _span_exporters(TelemetrySettings(otlp_endpoint=f"http://{admission.address}"))
    with TracerProvider().get_tracer("test").start_as_current_span("a span") as span:
        pass
    exporter.export([span])  # the fake has no such service
    exporter.shutdown()
    assert proxy.num_connections == 0


async def test_other_addresses_are_reached_through_it(proxy: CountingProxy) -> None:
    """The proxy above is one that gRPC would use."""
    before = proxy.num_connections
    async with open_channel("192.0.2.1:443", "secret") as channel:
        with pytest.raises((UnavailableError, MuxtuneError)):
            await admission_pb2_grpc.AdmissionServiceStub(channel).GetTask(GET, timeout=0.5)
    with grpc.insecure_channel("192.0.2.1:443") as plain, pytest.raises(grpc.RpcError):
        admission_pb2_grpc.AdmissionServiceStub(plain).GetTask(GET, timeout=0.5)
    assert proxy.num_connections > before


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:1", "127.8.0.9:1", "127.1:1", "0.0.0.0:1", "[::1]:1", "[::]:1", "[::ffff:127.0.0.1]:1",
        "localhost:1", "LOCALHOST.:1", "mesh.localhost:1", "localhost.localdomain:1", "10.0.0.1:1, 127.0.0.1:2",
    ],
)  # fmt: skip
def test_loopback_has_many_names(address: str) -> None:
    assert proxy_options(address) == url_proxy_options(address) == [("grpc.enable_http_proxy", 0)]


@pytest.mark.parametrize(
    "url", ["http://localhost:4317", "https://127.0.0.1/keys?a=b", "http://[::1]/", "http://[::1]:1"]
)
def test_a_url_may_have_no_port(url: str) -> None:
    assert url_proxy_options(url) == [("grpc.enable_http_proxy", 0)]


@pytest.mark.parametrize("address", ["10.0.0.1:1", "muxtune.example:1", "localhost.example:1", "[2001:db8::1]:1", ""])
def test_other_names_are_not_loopback(address: str) -> None:
    assert proxy_options(address) == url_proxy_options(address) == url_proxy_options(f"http://{address}/") == []
