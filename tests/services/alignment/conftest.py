"""AlignmentService with its interceptor on loopback, with a store in a folder and a tiny tokenizer."""

import hashlib
import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from muxtune.v1 import alignment_pb2 as pb
from muxtune.v1 import alignment_pb2_grpc, artifact_pb2, task_pb2
from services.alignment.dataset_store import DatasetStore
from services.alignment.servicer import AlignmentServicer
from services.concurrency.byte_budget import ByteBudget
from services.rpc.authentication import mesh_authenticator
from services.rpc.client_channel import open_channel
from services.rpc.interceptor import RpcInterceptor
from services.storage.artifact_store import ArtifactStore
from services.storage.scratch_folder import ScratchFolder
from tests.tiny_tokenizer import write_tokenizer

SECRET, TENANT, TASK = "mesh_secret", "tenants/acme", "tenants/acme/tasks/one"
MAX_DATASET_BYTES = 1 << 20


def lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


TEN_ROWS = lines(*({"text": "the quick brown fox " * (1 + i % 3)} for i in range(10)))


@dataclass
class Alignment:
    """The service under test and its parts."""

    address: str
    folder: Path
    datasets: DatasetStore
    servicer: AlignmentServicer
    stub: Any

    def scratch_files(self) -> list[Path]:
        """Return the folders and files of uploads in progress."""
        return sorted(self.servicer._scratch.path.rglob("*"))

    def stored(self) -> list[str]:
        """Return every file in the store, committed or not."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    async def store(self, data: bytes, **changes: Any) -> pb.StoreDatasetResponse:
        return await self.stub.StoreDataset(upload(data, **changes))


def upload(
    data: bytes, tenant: str = TENANT, size_bytes: int | None = None, sha256: str | None = None, chunk_bytes: int = 7000
) -> Iterable[pb.StoreDatasetRequest]:
    digest = hashlib.sha256(data).hexdigest() if sha256 is None else sha256
    size = len(data) if size_bytes is None else size_bytes
    yield pb.StoreDatasetRequest(tenant=tenant)
    yield pb.StoreDatasetRequest(file=artifact_pb2.FileHeader(size_bytes=size, sha256=digest))
    for offset in range(0, len(data), chunk_bytes):
        yield chunk(offset, data[offset : offset + chunk_bytes])


def chunk(offset: int, data: bytes) -> pb.StoreDatasetRequest:
    return pb.StoreDatasetRequest(chunk=artifact_pb2.FileChunk(offset=offset, data=data))


def training(**fields: Any) -> task_pb2.Training:
    return task_pb2.Training(**{"learning_rate": 1e-3, "num_epochs": 1, "global_batch_size": 4, **fields})


@pytest.fixture
async def alignment(tmp_path: Path) -> AsyncIterator[Alignment]:
    store = ArtifactStore.open(str(tmp_path / "store"))
    datasets = DatasetStore(store, {"tiny": write_tokenizer(tmp_path / "tiny")}, cache_bytes=1 << 20)
    scratch = ScratchFolder.open(tmp_path / "scratch", "alignment")
    servicer = AlignmentServicer(datasets, MAX_DATASET_BYTES, scratch, ByteBudget("uploads", 1 << 24, 1 << 23))
    server = grpc.aio.server(interceptors=[RpcInterceptor(mesh_authenticator(SECRET))])
    alignment_pb2_grpc.add_AlignmentServiceServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with open_channel(address, SECRET) as channel:
        stub = alignment_pb2_grpc.AlignmentServiceStub(channel)
        yield Alignment(address, tmp_path / "store", datasets, servicer, stub)
    await server.stop(None)
