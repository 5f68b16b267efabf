"""Channel options, credentials, spans and file transfer, shared by the blocking and the asyncio client."""

import hashlib
import ipaddress
import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict
from urllib.parse import urlsplit

import grpc
from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind

from muxtune.errors import AlreadyExistsError, ChecksumMismatchError, InvalidInputError, UnauthenticatedError
from muxtune.v1 import admission_pb2, artifact_pb2

CHUNK_BYTES = 1 << 20
DEADLINE_SECONDS = 60.0
ADMIT_SECONDS = 1800.0  # the whole dataset may be read first, and that ends with the call
TRANSFER_SECONDS = 3600.0
STREAM_BACKOFFS_SECONDS = (0.3, 1.0, 3.0, 5.0, None)  # between attempts of a stream; None: give up
STREAMED = ("UploadDataset", "UploadAdapter", "DownloadAdapter", "WatchTask")
# About nine seconds in all: time to restart a service that has one replica.
_RETRY_POLICY = {
    "methodConfig": [
        {
            "name": [{"service": "muxtune.v1.AdmissionService"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.3s",
                "maxBackoff": "5s",
                "backoffMultiplier": 3,
                # gRPC ends a call with CANCELLED that reaches a server as it closes.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        },
        # Streams are repeated by the client itself. gRPC cannot repeat a stream of requests, and a stream of responses
        # that it repeats sometimes hangs for good when its server is killed (grpcio 1.85; tests/test_mesh_kills.py).
        {"name": [{"service": "muxtune.v1.AdmissionService", "method": method} for method in STREAMED]},
    ],
    "loadBalancingConfig": [{"round_robin": {}}],  # admission's replicas in turn
}
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.service_config", json.dumps(_RETRY_POLICY)),
    ("grpc.keepalive_time_ms", 10_000),  # a replica that hangs or is cut off is noticed before calls time out
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_reconnect_backoff_ms", 1_000),  # within the nine seconds of retries
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),  # replicas come and go
]
_ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
Rows = Iterable[Mapping[str, Any]]


def watch_backoff(num_failures: int, was_heard: bool) -> float | None:
    """Return the seconds to wait after so many failures in a row; None: give up, as no event ever came."""
    last = len(STREAM_BACKOFFS_SECONDS) - 1
    backoff = STREAM_BACKOFFS_SECONDS[min(num_failures - 1, last)]
    return STREAM_BACKOFFS_SECONDS[last - 1] if backoff is None and was_heard else backoff


class CallOptions(TypedDict):
    """Options of every call."""

    timeout: float
    metadata: tuple[tuple[str, str], ...]


def address_and_key(address: str | None, api_key: str | None) -> tuple[str, str]:
    """Return the arguments, or MUXTUNE_ADDRESS and MUXTUNE_API_KEY. Raises UnauthenticatedError if one is missing."""
    address = address or os.environ.get("MUXTUNE_ADDRESS", "")
    api_key = api_key or os.environ.get("MUXTUNE_API_KEY", "")
    if not address or not api_key:
        raise UnauthenticatedError(
            "Address or API key is missing: pass both, or set MUXTUNE_ADDRESS and MUXTUNE_API_KEY"
        )
    return address, api_key


def target(address: str) -> str:
    """Return gRPC's target for "host:port", a name that may resolve to several replicas, or for "ip:port,ip:port".

    Raises InvalidInputError for a list of names, as gRPC resolves only one.
    """
    if "," not in address:
        return address
    replicas = [replica.strip().replace("localhost", "127.0.0.1") for replica in address.split(",")]
    try:
        versions = {ipaddress.ip_address(_host(replica)).version for replica in replicas}
    except ValueError as error:
        raise InvalidInputError(
            f'address "{address}": {error}. Each entry of a list must be IP:PORT; or pass one name that resolves to all'
        ) from error
    if len(versions) > 1:
        raise InvalidInputError(f'address "{address}": IPv4 and IPv6 are mixed: pass addresses of one kind')
    return f"ipv{versions.pop()}:{','.join(replicas)}"


def channel_options(address: str) -> list[tuple[str, Any]]:
    """Return the channel's options. Of a list of replicas, the certificate of each must name the first."""
    named = [("grpc.ssl_target_name_override", _host(address.split(",")[0]))] if "," in address else []
    return [*_OPTIONS, *named, *proxy_options(address)]


def proxy_options(address: str) -> list[tuple[str, Any]]:
    """Return channel options by which no HTTP proxy of the environment carries what goes to loopback.

    gRPC reads grpc_proxy, https_proxy and http_proxy, and a proxy could read what is sent to loopback in plain text.
    """
    return [("grpc.enable_http_proxy", 0)] if any(_is_this_machine(_host(each)) for each in address.split(",")) else []


def url_proxy_options(url: str) -> list[tuple[str, Any]]:
    """Return `proxy_options` of a URL, or of an address, as an OTLP endpoint may be."""
    return proxy_options(f"{urlsplit(url).hostname}:" if "//" in url else url)


def credentials(address: str, ca: Path | str | None) -> grpc.ChannelCredentials | None:
    """Return TLS credentials with the CA in `ca`, in MUXTUNE_CA, or the system's; None on loopback without a CA.

    Raises InvalidInputError if the file cannot be read.
    """
    source = ca or os.environ.get("MUXTUNE_CA")
    if not source:
        return None if is_loopback(address) else grpc.ssl_channel_credentials()
    return grpc.ssl_channel_credentials(rows_as_bytes(source))


def metadata(api_key: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call: the API key and the context of the trace."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return (("authorization", f"Bearer {api_key}"), *carrier.items())


@contextmanager
def call_span(method: str) -> Iterator[None]:
    """Trace a call, if OpenTelemetry is configured. The span of CreateTask is the root of the task's trace."""
    attributes = {"rpc.system.name": "grpc", "rpc.method": f"muxtune.v1.AdmissionService/{method}"}
    tracer = trace.get_tracer("muxtune.client")
    with tracer.start_as_current_span(attributes["rpc.method"], kind=SpanKind.CLIENT, attributes=attributes):
        yield


def new_request_id() -> str:
    return str(uuid.uuid4())


def rows_as_bytes(rows: Path | str | bytes | Rows) -> bytes:
    """Return JSON Lines from a path, from bytes, or from dicts. Raises InvalidInputError if a file cannot be read."""
    if isinstance(rows, bytes):
        return rows
    if isinstance(rows, str | Path):
        try:
            return Path(rows).read_bytes()
        except OSError as error:
            raise InvalidInputError(f"{rows}: cannot be read: {error.strerror}") from error
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def file_parts(name: str, data: bytes) -> Iterator[artifact_pb2.FileHeader | artifact_pb2.FileChunk]:
    """Yield a file's header, then its chunks."""
    yield artifact_pb2.FileHeader(file_name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    for offset in range(0, len(data), CHUNK_BYTES):
        yield artifact_pb2.FileChunk(offset=offset, data=data[offset : offset + CHUNK_BYTES])


def dataset_requests(header: artifact_pb2.UploadHeader, data: bytes) -> Iterator[admission_pb2.UploadDatasetRequest]:
    yield admission_pb2.UploadDatasetRequest(header=header)
    for part in file_parts("", data):
        if isinstance(part, artifact_pb2.FileHeader):
            yield admission_pb2.UploadDatasetRequest(file=part)
        else:
            yield admission_pb2.UploadDatasetRequest(chunk=part)


def adapter_requests(header: artifact_pb2.UploadHeader, folder: Path) -> Iterator[admission_pb2.UploadAdapterRequest]:
    yield admission_pb2.UploadAdapterRequest(header=header)
    for name in sorted(_ADAPTER_FILES):
        for part in file_parts(name, rows_as_bytes(folder / name)):
            if isinstance(part, artifact_pb2.FileHeader):
                yield admission_pb2.UploadAdapterRequest(file=part)
            else:
                yield admission_pb2.UploadAdapterRequest(chunk=part)


class FolderSink:
    """Receives the files of an adapter beside `dest`, and moves them there if all arrived as announced.

    Raises AlreadyExistsError if `dest` exists and is not the folder of an adapter; nothing else is ever replaced.
    """

    def __init__(self, dest: Path) -> None:
        self._dest = dest
        _check_replaceable(dest)
        dest.parent.mkdir(parents=True, exist_ok=True)
        self._partial = Path(tempfile.mkdtemp(dir=dest.parent, prefix=".partial-"))
        self._header: artifact_pb2.FileHeader | None = None
        self._data = bytearray()
        self._num_files = 0

    def add(self, response: admission_pb2.DownloadAdapterResponse) -> None:
        """Receive a part. Raises ChecksumMismatchError if it does not fit the header of its file."""
        if response.WhichOneof("part") == "file":
            self._close_file()
            self._header, self._data = response.file, bytearray()
            if self._header.file_name not in _ADAPTER_FILES:
                raise ChecksumMismatchError(f'"{self._header.file_name}" is not a file of an adapter')
        elif self._header is None or response.chunk.offset != len(self._data):
            raise ChecksumMismatchError(
                f"a chunk at byte {response.chunk.offset} arrived instead of byte {len(self._data)}"
            )
        else:
            self._data += response.chunk.data

    def close(self) -> Path:
        """Move the folder to `dest`, replacing an existing adapter, and return it."""
        self._close_file()
        if self._num_files == 0:
            raise ChecksumMismatchError("the server sent no file")
        _check_replaceable(self._dest)
        if self._dest.exists():
            shutil.rmtree(self._dest)
        self._partial.rename(self._dest)
        self._dest.chmod(0o755)
        return self._dest

    def _close_file(self) -> None:
        if self._header is None:
            return
        header, sha256 = self._header, hashlib.sha256(self._data).hexdigest()
        if sha256 != header.sha256 or len(self._data) != header.size_bytes:
            raise ChecksumMismatchError(
                f"{header.file_name}: received {len(self._data)} bytes with SHA-256 {sha256}, announced were "
                f"{header.size_bytes} bytes with SHA-256 {header.sha256}: download it again"
            )
        (self._partial / header.file_name).write_bytes(self._data)
        self._num_files += 1

    def __enter__(self) -> "FolderSink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)


def is_loopback(address: str) -> bool:
    """Return whether an address, or each of a list, is on loopback."""
    hosts = [_host(replica) for replica in address.split(",")]
    try:
        return all(host == "localhost" or ipaddress.ip_address(host).is_loopback for host in hosts)
    except ValueError:
        return False


def _is_this_machine(host: str) -> bool:
    """Return whether connections to the host stay on this machine. Unlike `is_loopback` it knows all that resolvers
    take for loopback, such as "127.1", "0.0.0.0" and "x.localhost"."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith((".localhost", "localhost.localdomain")):
        return True
    try:
        ip = ipaddress.ip_address(name) if ":" in name else ipaddress.ip_address(socket.inet_aton(name))
    except (OSError, ValueError):
        return False
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_loopback or ip.is_unspecified


def _host(address: str) -> str:
    return address.strip().rpartition(":")[0].strip("[]")


def _check_replaceable(dest: Path) -> None:
    """Raise AlreadyExistsError unless `dest` is missing, an empty folder or an earlier download."""
    if not dest.exists() and not dest.is_symlink():
        return
    if dest.is_symlink() or not dest.is_dir() or {path.name for path in dest.iterdir()} - _ADAPTER_FILES:
        raise AlreadyExistsError(f"{dest} exists and is not the folder of an adapter: choose another place")
