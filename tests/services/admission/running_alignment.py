"""Runs the real alignment service on loopback, behind admission."""

from dataclasses import dataclass
from pathlib import Path

import grpc

from muxtune.v1 import alignment_pb2_grpc
from services.alignment.dataset_store import DatasetStore
from services.alignment.servicer import AlignmentServicer
from services.concurrency.byte_budget import ByteBudget
from services.rpc.authentication import mesh_authenticator
from services.rpc.interceptor import RpcInterceptor
from services.storage.artifact_store import ArtifactStore
from services.storage.scratch_folder import ScratchFolder

SECRET, MAX_DATASET_BYTES = "mesh_of-the-tests", 1 << 20


@dataclass
class Alignment:
    """Runs the real alignment service."""

    servicer: AlignmentServicer
    server: grpc.aio.Server
    address: str

    @classmethod
    async def start(cls, artifacts: ArtifactStore, tokenizer: Path, scratch: Path) -> "Alignment":
        datasets = DatasetStore(artifacts, {"tiny": tokenizer}, cache_bytes=1 << 20)
        folder = ScratchFolder.open(scratch, "alignment")
        servicer = AlignmentServicer(datasets, MAX_DATASET_BYTES, folder, ByteBudget("uploads", 1 << 24, 1 << 23))
        server = grpc.aio.server(interceptors=[RpcInterceptor(mesh_authenticator(SECRET))])
        alignment_pb2_grpc.add_AlignmentServiceServicer_to_server(servicer, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        return cls(servicer, server, address)
