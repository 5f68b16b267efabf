"""Runs admission's services on loopback behind their interceptor, with the real alignment service behind them.

What outlives a restart (database, artifacts, alignment) lies in `Admission`; the service itself can be stopped and
started again at will. Callers use the generated stubs and get gRPC's own statuses.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from engine.planning.types import PlannerConfig
from muxtune.upload_status import upload_response
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import (
    admission_pb2_grpc,
    alignment_pb2_grpc,
    artifact_pb2,
    event_pb2,
    key_pb2_grpc,
    ledger_pb2,
    ledger_pb2_grpc,
    operator_pb2_grpc,
    plan_pb2,
    task_pb2,
)
from services.admission.api.operator_rpcs import OperatorServicer
from services.admission.api.servicer import AdmissionServicer, KeyServicer, LedgerServicer
from services.admission.api.token_authenticator import create_authenticator
from services.admission.ledger.ledger import Ledger
from services.admission.ledger.limits_watcher import LimitsWatcher
from services.admission.policy.admission_controller import AdmissionController, DefaultQuota
from services.admission.store.api_keys import KeyStore
from services.admission.store.audit_log import create_audit_writer
from services.admission.store.change_notifier import ChangeNotifier
from services.admission.store.database import Database
from services.admission.store.tables import metadata
from services.admission.threads import AdmissionThreads
from services.concurrency.byte_budget import ByteBudget
from services.rpc.call_limits import CallLimits
from services.rpc.client_channel import open_channel
from services.rpc.interceptor import RpcInterceptor
from services.rpc.rate_limit import RateLimit
from services.rpc.unauthenticated_limiter import UnauthenticatedCallLimiter
from services.storage.artifact_store import ArtifactStore
from services.storage.scratch_folder import ScratchFolder
from tests.services.admission.running_alignment import MAX_DATASET_BYTES, SECRET, Alignment

__all__ = ["MAX_DATASET_BYTES", "SECRET", "Alignment"]  # for the tests

BOTH_DATABASES = ["sqlite", "postgresql"]  # of tests of what differs between them
DATABASES = ["sqlite", pytest.param("postgresql", marks=pytest.mark.thorough)]
TIMEOUT_SECONDS = 20.0
MAX_UPLOAD_BYTES = 1 << 20
ROWS = [{"text": "the quick brown fox " * (1 + i % 3)} for i in range(10)]


def lines(rows: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


TEN_ROWS = lines(ROWS)


class Caller:
    """Wraps a generated stub: every call carries a key and a deadline."""

    def __init__(self, stub: Any, token: str) -> None:
        self._stub, self._metadata = stub, (("authorization", f"Bearer {token}"),)

    def __getattr__(self, method: str) -> Any:
        start = getattr(self._stub, method)
        start = partial(_upload, start) if method.startswith("Upload") else start
        return partial(start, metadata=self._metadata, timeout=TIMEOUT_SECONDS)


async def _upload(start: Any, requests: Any, **options: Any) -> Any:
    return await upload_response(start(requests, **options))


class Clock:
    """The monotonic clock of leases, moved by hand."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@dataclass
class Refusal:
    """Holds the status and the details of a refused call."""

    message: str = ""
    details: list[Message] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    fields: list[str] = field(default_factory=list)

    def has(self, kind: type[Message]) -> bool:
        return any(isinstance(detail, kind) for detail in self.details)


@contextmanager
def refused(code: grpc.StatusCode, reason: str) -> Iterator[Refusal]:
    """Check that the block ends with this status and this ErrorInfo reason."""
    refusal = Refusal()
    with pytest.raises(grpc.RpcError) as caught:
        yield refusal
    error: Any = caught.value
    assert error.code() is code, error
    refusal.message = error.details()
    status = status_pb2.Status()
    status.ParseFromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert status.code == code.value[0]
    for packed in status.details:
        message = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])()
        assert packed.Unpack(message)
        refusal.details.append(message)
    (info,) = (detail for detail in refusal.details if isinstance(detail, error_details_pb2.ErrorInfo))
    assert (info.domain, info.reason) == ("muxtune", reason), error
    refusal.metadata = dict(info.metadata)
    for detail in refusal.details:
        if isinstance(detail, error_details_pb2.BadRequest):
            refusal.fields = [violation.field for violation in detail.field_violations]


class Admission:
    """Runs the service under test; `clock` drives its leases."""

    def __init__(self, database_url: str, folder: Path, alignment: str) -> None:
        self.database_url, self.folder, self.clock, self.quota = database_url, folder, Clock(), 1000
        self._alignment_address, self.started = alignment, asyncio.Event()
        self._keys: dict[str, str] = {}
        self.requests_per_second = self.refusals_per_second = self.watch_events_per_second = 0.0  # no limit
        self.call_limits, self._channels = CallLimits(), list[grpc.aio.Channel]()
        self.uploads = ByteBudget("unfinished uploads", 1 << 24, 1 << 23)

    async def start(self) -> None:
        self.database = Database(self.database_url)
        self.database.migrate()
        self.artifacts, self.notifier = ArtifactStore.open(str(self.folder)), ChangeNotifier()
        self._to_alignment = open_channel(self._alignment_address, SECRET)
        alignment = alignment_pb2_grpc.AlignmentServiceStub(self._to_alignment)
        quota, threads = DefaultQuota(self.quota, PlannerConfig(256, 1)), AdmissionThreads()
        self.threads = threads
        self.key_store, ledger = (
            KeyStore(self.database),
            LedgerServicer(self.notifier, lambda names: None, threads.ledger),
        )
        self._serving = ExitStack()
        self._serving.enter_context(ledger.serve_ledger(Ledger(self.database, self.clock, quota=quota.to_proto())))
        self.controller = AdmissionController(self.database, self.artifacts, alignment, quota, threads)
        self.limits = LimitsWatcher(self.database, quota.to_proto(), self.notifier, threads.ledger)
        servicer = self.servicer = AdmissionServicer(
            self.database, self.artifacts, alignment, self.controller, self.notifier, MAX_UPLOAD_BYTES, threads,
            RateLimit(self.watch_events_per_second),
            ScratchFolder.open(self.folder.parent / "scratch", "admission"), self.uploads,
        )  # fmt: skip
        limit, audit = RateLimit(self.requests_per_second), create_audit_writer(self.database)
        self.unauthenticated_limiter = UnauthenticatedCallLimiter(RateLimit(self.refusals_per_second), audit)
        authenticate = create_authenticator(self.key_store, SECRET, None, limit)
        interceptor = RpcInterceptor(authenticate, "", audit, self.call_limits, self.unauthenticated_limiter)
        self._server = grpc.aio.server(interceptors=[interceptor], options=[("grpc.so_reuseport", 0)])
        admission_pb2_grpc.add_AdmissionServiceServicer_to_server(servicer, self._server)
        key_pb2_grpc.add_KeyServiceServicer_to_server(KeyServicer(self.key_store, threads.operators), self._server)
        operator_pb2_grpc.add_OperatorServiceServicer_to_server(
            OperatorServicer(self.database, quota.to_proto(), self.notifier, threads.operators), self._server
        )
        ledger_pb2_grpc.add_LedgerServiceServicer_to_server(ledger, self._server)
        address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._channels.append(self._channel)
        self.started.set()

    async def stop(self) -> None:
        """Stop as on SIGTERM: end the watches, then stop the server."""
        self.started.clear()
        self.notifier.close()
        self._serving.close()
        await self._server.stop(TIMEOUT_SECONDS)
        await self._to_alignment.close()
        self.database.close()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def close(self) -> None:
        """Stop, then close the channels: closing them first would cancel calls that the server still answers."""
        await self.stop()
        for channel in self._channels:
            await channel.close()

    def tenant(self, name: str = "acme") -> Any:
        """Return AdmissionService with a key of `tenants/{name}`."""
        if name not in self._keys:
            self._keys[name] = self.key_store.create(f"tenants/{name}", None)[1]
        return self.with_token(self._keys[name])

    def with_token(self, token: str) -> Any:
        return Caller(admission_pb2_grpc.AdmissionServiceStub(self._channel), token)

    def ledger(self, token: str = SECRET) -> Any:
        return Caller(ledger_pb2_grpc.LedgerServiceStub(self._channel), token)

    def keys(self, token: str = SECRET) -> Any:
        return Caller(key_pb2_grpc.KeyServiceStub(self._channel), token)

    def operator(self, token: str = SECRET) -> Any:
        return Caller(operator_pb2_grpc.OperatorServiceStub(self._channel), token)

    @property
    def channel(self) -> grpc.aio.Channel:
        return self._channel

    def files(self) -> list[str]:
        """Return all files of the artifact store, committed or not; another thread may remove some meanwhile."""
        return sorted(
            os.path.relpath(os.path.join(folder, name), self.folder)
            for folder, _, names in os.walk(self.folder)
            for name in names
        )

    def num_rows(self) -> dict[str, int]:
        """Return the number of rows by table, without keys and the audit log."""
        with self.database.read() as connection:
            counts = {
                table.name: connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
                for table in metadata.sorted_tables
            }
        for name in ("api_keys", "audit_events"):
            del counts[name]
        return counts

    async def upload(self, data: bytes = TEN_ROWS, dataset_id: str = "", **options: Any) -> Any:
        """Upload a dataset as the tenant acme."""
        return (await self.tenant().UploadDataset(dataset_parts(data, dataset_id, **options))).dataset

    async def create(self, dataset: str, task_id: str = "", **options: Any) -> task_pb2.Task:
        request = pb.CreateTaskRequest(task_id=task_id, spec=spec(dataset, **options))
        return (await self.tenant().CreateTask(request)).task

    async def register(self, name: str = "executors/one", incarnation: str = "i1", seconds: int = 30) -> int:
        """Register an executor; return its lease term."""
        term: int = (await self.ledger().PutLease(lease(executor(name, incarnation), seconds))).lease_term
        return term

    async def run(self, *tasks: str, lease_term: int = 1, executor: str = "executors/one") -> list[int]:
        """Commit a plan that starts the tasks on the executor; return their attempts."""
        snapshot = await self.ledger().GetSnapshot(ledger_pb2.GetSnapshotRequest())
        seen = {entry.task.name: entry.task.attempt for entry in snapshot.tasks}
        starts = [ledger_pb2.AttemptStart(task=task, expected_attempt=seen[task]) for task in tasks]
        request = ledger_pb2.CommitPlanRequest(
            executor=executor, lease_term=lease_term, version=snapshot.plan_version + 1, starts=starts
        )
        return list((await self.ledger().CommitPlan(request)).attempts)

    async def commit(self, *results: Any, lease_term: int = 1, executor: str = "executors/one") -> list[str]:
        """Commit results; return the verdicts without their prefix."""
        request = ledger_pb2.CommitResultsRequest(executor=executor, lease_term=lease_term, results=results)
        verdicts = (await self.ledger().CommitResults(request)).verdicts
        return [ledger_pb2.ResultVerdict.Name(v).removeprefix("RESULT_VERDICT_") for v in verdicts]

    async def state(self, task: str) -> str:
        state = (await self.tenant().GetTask(pb.GetTaskRequest(name=task))).task.state
        return str(task_pb2.TaskState.Name(state)).removeprefix("TASK_STATE_")

    async def events(self, task: str, after: int = 0) -> list[event_pb2.TaskEvent]:
        """Return all events of a task that has ended."""
        watch = self.tenant().WatchTask(pb.WatchTaskRequest(name=task, after_sequence=after))
        return [answer.event async for answer in watch]


def dataset_parts(
    data: bytes, dataset_id: str = "", *, request_id: str = "", parent: str = "", chunk_bytes: int = 100, **file: Any
) -> Iterator[pb.UploadDatasetRequest]:
    """Yield the messages of a valid upload; `size_bytes` and `sha256` may be replaced by wrong ones."""
    header = artifact_pb2.UploadHeader(id=dataset_id, request_id=request_id, parent=parent)
    yield pb.UploadDatasetRequest(header=header)
    announced = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **file}
    yield pb.UploadDatasetRequest(file=artifact_pb2.FileHeader(**announced))
    for offset in range(0, len(data), chunk_bytes):
        part = artifact_pb2.FileChunk(offset=offset, data=data[offset : offset + chunk_bytes])
        yield pb.UploadDatasetRequest(chunk=part)


def adapter_files(rank: int = 4, alpha: float = 8, fill: int = 0) -> dict[str, bytes]:
    """Return the files of a PEFT adapter of one tensor, with safetensors written by hand."""
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"]}
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes([fill]) * 8
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights}


def adapter_parts(
    files: dict[str, bytes], adapter_id: str = "", *, request_id: str = "", chunk_bytes: int = 50
) -> Iterator[pb.UploadAdapterRequest]:
    yield pb.UploadAdapterRequest(header=artifact_pb2.UploadHeader(id=adapter_id, request_id=request_id))
    for name, data in files.items():
        sha256 = hashlib.sha256(data).hexdigest()
        file = artifact_pb2.FileHeader(file_name=name, size_bytes=len(data), sha256=sha256)
        yield pb.UploadAdapterRequest(file=file)
        for offset in range(0, len(data), chunk_bytes):
            part = artifact_pb2.FileChunk(offset=offset, data=data[offset : offset + chunk_bytes])
            yield pb.UploadAdapterRequest(chunk=part)


def spec(dataset: str, **changes: Any) -> task_pb2.TaskSpec:
    """Return a LoRA task of four steps on the backbone "tiny". Keywords replace fields of the training or the spec."""
    training: dict[str, Any] = {
        "learning_rate": 0.01,
        "num_steps": 4,
        "global_batch_size": 2,
        "max_sequence_tokens": 64,
    }
    names = task_pb2.Training.DESCRIPTOR.fields_by_name
    if "num_epochs" in changes:
        del training["num_steps"]
    training |= {key: value for key, value in changes.items() if key in names}
    fields: dict[str, Any] = {
        "backbone": "tiny",
        "dataset": dataset,
        "lora": task_pb2.Lora(rank=4, alpha=8, target_modules=["q_proj"]),
        **{key: value for key, value in changes.items() if key not in names},
    }
    return task_pb2.TaskSpec(**fields, training=task_pb2.Training(**training))


def executor(
    name: str = "executors/one", incarnation: str = "i1", memory_bytes: int = 1 << 30, lease_term: int = 0
) -> plan_pb2.Executor:
    """Return an executor of the backbone "tiny", which has two layers of two operators."""
    modules = [
        plan_pb2.AdaptableModule(name=f"model.layers.{layer}.self_attn.{part}_proj", in_features=32, out_features=32)
        for layer in range(2)
        for part in "qv"
    ]
    backbone = plan_pb2.Backbone(
        name="tiny", architecture="LlamaForCausalLM", num_parameters=10_000, num_layers=2, hidden_size=32,
        vocab_size=400, max_sequence_tokens=128, weight_bytes=40_000, dtype="float32", adaptable_modules=modules,
    )  # fmt: skip
    device = plan_pb2.Device(kind="cpu", memory_bytes=memory_bytes, effective_tokens_per_second=100)
    return plan_pb2.Executor(
        name=name, incarnation=incarnation, address="127.0.0.1:1", backbone=backbone, device=device,
        lease_term=lease_term,
    )  # fmt: skip


def lease(holder: plan_pb2.Executor, seconds: int = 30) -> ledger_pb2.PutLeaseRequest:
    request = ledger_pb2.PutLeaseRequest(executor=holder)
    request.duration.FromSeconds(seconds)
    return request


def step(task: str, attempt: int, number: int, loss: float = 1.0) -> plan_pb2.TaskResult:
    done = event_pb2.StepDone(step=number, loss=loss, effective_tokens=10, padding_tokens=2, device_seconds=0.5)
    return plan_pb2.TaskResult(task=task, attempt=attempt, step_done=done)


def evaluated(task: str, attempt: int, number: int, loss: float = 2.0) -> plan_pb2.TaskResult:
    return plan_pb2.TaskResult(task=task, attempt=attempt, evaluated=event_pb2.Evaluated(step=number, loss=loss))


def checkpoint(task: str, attempt: int, number: int) -> plan_pb2.TaskResult:
    committed = event_pb2.CheckpointCommitted(step=number, manifest_key=f"{task}/checkpoints/{number:08d}-{attempt}")
    return plan_pb2.TaskResult(task=task, attempt=attempt, checkpoint_committed=committed)


def finished(task: str, attempt: int, adapter_key: str = "", *, cancelled: bool = False) -> plan_pb2.TaskResult:
    done = plan_pb2.TaskFinished(step=4, adapter_key=adapter_key, adapter_bytes=10, cancelled=cancelled)
    return plan_pb2.TaskResult(task=task, attempt=attempt, finished=done)
