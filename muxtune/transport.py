"""What the blocking and the asyncio client share: channel options, files as chunks, folders from chunks, spans."""

import hashlib
import ipaddress
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

import grpc
from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind

from muxtune.errors import AlreadyExistsError, ChecksumMismatchError, InvalidInputError, UnauthenticatedError
from muxtune.v1 import admission_pb2, artifact_pb2

CHUNK_BYTES = 1 << 20
DEADLINE_SECONDS = 60.0
ADMIT_SECONDS = 150.0  # admission may tokenize the whole dataset first
TRANSFER_SECONDS = 3600.0
STREAM_BACKOFFS_SECONDS = (0.3, 1.0, 3.0, 5.0, None)  # between tries of what is streamed; None: give up
STREAMED = ("UploadDataset", "UploadAdapter", "DownloadAdapter", "WatchTask")
# Nine seconds in all, about: a service of one replica is back by then when it is restarted.
_RETRY_POLICY = {
    "methodConfig": [
        {
            "name": [{"service": "muxtune.v1.AdmissionService"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.3s",
                "maxBackoff": "5s",
                "backoffMultiplier": 3,
                # CANCELLED is what gRPC itself tells who comes just as a server closes.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        },
        # Not streams: the client does it, whole. A client's stream cannot be sent again by gRPC; a server's that gRPC
        # tries again hangs now and then, for good, when its server is killed (grpcio 1.85; tests/test_mesh_kills.py).
        {"name": [{"service": "muxtune.v1.AdmissionService", "method": method} for method in STREAMED]},
    ],
    "loadBalancingConfig": [{"round_robin": {}}],  # over admission's replicas
}
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.service_config", json.dumps(_RETRY_POLICY)),
    ("grpc.keepalive_time_ms", 10_000),  # a replica that is cut off or paused is found out before calls time out
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_reconnect_backoff_ms", 1_000),  # what is there again is found within the retries' nine seconds
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),  # replicas come and go
]
_ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
Rows = Iterable[Mapping[str, Any]]


def watch_backoff(num_failures: int, was_heard: bool) -> float | None:
    """Seconds until the watch is opened again after so many failures in a row; None: it never was there."""
    last = len(STREAM_BACKOFFS_SECONDS) - 1
    backoff = STREAM_BACKOFFS_SECONDS[min(num_failures - 1, last)]
    return STREAM_BACKOFFS_SECONDS[last - 1] if backoff is None and was_heard else backoff


class CallOptions(TypedDict):
    """What every call carries."""

    timeout: float
    metadata: tuple[tuple[str, str], ...]


def address_and_key(address: str | None, api_key: str | None) -> tuple[str, str]:
    """Arguments, or MUXTUNE_ADDRESS and MUXTUNE_API_KEY. Raises UnauthenticatedError if there is neither."""
    address = address or os.environ.get("MUXTUNE_ADDRESS", "")
    api_key = api_key or os.environ.get("MUXTUNE_API_KEY", "")
    if not address or not api_key:
        raise UnauthenticatedError("no address or API key: pass them, or set MUXTUNE_ADDRESS and MUXTUNE_API_KEY")
    return address, api_key


def target(address: str) -> str:
    """What gRPC dials for "host:port", whose name may stand for several replicas, or for a list, "ip:port,ip:port".

    Raises InvalidInputError for a list of names: gRPC resolves one.
    """
    if "," not in address:
        return address
    replicas = [replica.strip().replace("localhost", "127.0.0.1") for replica in address.split(",")]
    try:
        versions = {ipaddress.ip_address(_host(replica)).version for replica in replicas}
    except ValueError as error:
        raise InvalidInputError(
            f'address "{address}": {error}: each of a list must be IP:PORT; else give one name that resolves to all'
        ) from error
    if len(versions) > 1:
        raise InvalidInputError(f'address "{address}": IPv4 and IPv6 are mixed: give addresses of one kind')
    return f"ipv{versions.pop()}:{','.join(replicas)}"


def channel_options(address: str) -> list[tuple[str, Any]]:
    """Of a list of replicas, the certificate of each must name the first: the list is no name."""
    named = [("grpc.ssl_target_name_override", _host(address.split(",")[0]))] if "," in address else []
    return [*_OPTIONS, *named]


def credentials(address: str, ca: Path | str | None) -> grpc.ChannelCredentials | None:
    """TLS with the roots in `ca`, or in MUXTUNE_CA, or the system's; None (plain text) on loopback without one.

    Raises InvalidInputError if the file cannot be read.
    """
    source = ca or os.environ.get("MUXTUNE_CA")
    if not source:
        return None if is_loopback(address) else grpc.ssl_channel_credentials()
    return grpc.ssl_channel_credentials(rows_as_bytes(source))


def metadata(api_key: str) -> tuple[tuple[str, str], ...]:
    """The key, and the trace this call belongs to."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return (("authorization", f"Bearer {api_key}"), *carrier.items())


@contextmanager
def call_span(method: str) -> Iterator[None]:
    """The client's span around a call: the root of a task's trace, where OpenTelemetry is configured."""
    attributes = {"rpc.system.name": "grpc", "rpc.method": f"muxtune.v1.AdmissionService/{method}"}
    tracer = trace.get_tracer("muxtune.client")
    with tracer.start_as_current_span(attributes["rpc.method"], kind=SpanKind.CLIENT, attributes=attributes):
        yield


def new_request_id() -> str:
    return str(uuid.uuid4())


def rows_as_bytes(rows: Path | str | bytes | Rows) -> bytes:
    """JSON Lines from a path, from bytes as they are, or from dicts."""
    if isinstance(rows, bytes):
        return rows
    if isinstance(rows, str | Path):
        try:
            return Path(rows).read_bytes()
        except OSError as error:
            raise InvalidInputError(f"{rows}: cannot be read: {error.strerror}") from error
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def file_parts(name: str, data: bytes) -> Iterator[artifact_pb2.FileHeader | artifact_pb2.FileChunk]:
    """A file's header, then its chunks."""
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
    """Receives a folder's files beside `dest` and moves them there when all are whole and right, or not at all.

    Raises AlreadyExistsError where `dest` is there and is not an adapter's folder: nothing else is ever replaced.
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
        """Raises ChecksumMismatchError where what comes is not what was announced."""
        if response.WhichOneof("part") == "file":
            self._close_file()
            self._header, self._data = response.file, bytearray()
            if self._header.file_name not in _ADAPTER_FILES:
                raise ChecksumMismatchError(f'"{self._header.file_name}" is no file of an adapter')
        elif self._header is None or response.chunk.offset != len(self._data):
            raise ChecksumMismatchError(f"a chunk at {response.chunk.offset} where {len(self._data)} was due")
        else:
            self._data += response.chunk.data

    def close(self) -> Path:
        """The folder in its place, replacing one that was there."""
        self._close_file()
        if self._num_files == 0:
            raise ChecksumMismatchError("no file came")
        _check_replaceable(self._dest)
        if self._dest.exists():
            shutil.rmtree(self._dest)
        self._partial.rename(self._dest)
        self._dest.chmod(0o755)
        return self._dest

    def _close_file(self) -> None:
        if self._header is None:
            return
        found = hashlib.sha256(self._data).hexdigest()
        if found != self._header.sha256 or len(self._data) != self._header.size_bytes:
            raise ChecksumMismatchError(
                f"{self._header.file_name} came with {len(self._data)} bytes that are not its own"
            )
        (self._partial / self._header.file_name).write_bytes(self._data)
        self._num_files += 1

    def __enter__(self) -> "FolderSink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)


def is_loopback(address: str) -> bool:
    """Of "host:port", or of all in a list."""
    hosts = [_host(replica) for replica in address.split(",")]
    try:
        return all(host == "localhost" or ipaddress.ip_address(host).is_loopback for host in hosts)
    except ValueError:
        return False


def _host(address: str) -> str:
    return address.strip().rpartition(":")[0].strip("[]")


def _check_replaceable(dest: Path) -> None:
    """An earlier download may be replaced, and an empty folder; nothing else."""
    if not dest.exists() and not dest.is_symlink():
        return
    if dest.is_symlink() or not dest.is_dir() or {path.name for path in dest.iterdir()} - _ADAPTER_FILES:
        raise AlreadyExistsError(f"{dest} is there and is no adapter's folder: choose another place")
