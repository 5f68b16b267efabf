"""AlignmentService: turns rows into microbatches. See protos/muxtune/v1/alignment.proto for what each RPC promises."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

from engine.alignment.dataset import num_steps, split
from engine.alignment.microbatch import Microbatch
from engine.alignment.packing import Member, rounds
from engine.errors import InvalidInputError
from muxtune.v1 import alignment_pb2 as pb
from muxtune.v1 import alignment_pb2_grpc, dataset_pb2
from services.alignment.catalog import Catalog, Receipt
from services.convert import microbatch_to_proto, preflight_to_proto, training_to_domain

_MAX_SAMPLES = 100


class AlignmentServicer(alignment_pb2_grpc.AlignmentServiceServicer):
    """Tokenizing and packing run in threads, so that the event loop stays alive."""

    def __init__(self, catalog: Catalog, max_dataset_bytes: int) -> None:
        self._catalog = catalog
        self._max_dataset_bytes = max_dataset_bytes

    async def StoreDataset(self, request_iterator: Any, context: Any) -> pb.StoreDatasetResponse:
        tenant, receipt = "", None
        async for request in request_iterator:
            part = request.WhichOneof("part")
            if part == "tenant" and not tenant:
                tenant = request.tenant
            elif part == "file" and tenant and receipt is None:
                receipt = Receipt(request.file.size_bytes, request.file.sha256, self._max_dataset_bytes)
            elif part == "chunk" and receipt is not None:
                receipt.add(request.chunk.offset, request.chunk.data)
            else:
                raise InvalidInputError.of_field("part", f"{part} is out of order: tenant, file, then chunks")
        if receipt is None:
            raise InvalidInputError.of_field("file", "is missing: nothing was sent")
        stored = await asyncio.to_thread(self._catalog.store, tenant, receipt)
        return pb.StoreDatasetResponse(
            sha256=stored.sha256,
            size_bytes=stored.size_bytes,
            num_rows=stored.num_rows,
            num_rows_by_shape=stored.num_rows_by_shape,
        )

    async def InspectDataset(self, request: pb.InspectDatasetRequest, context: Any) -> pb.InspectDatasetResponse:
        options: dataset_pb2.PreflightOptions = request.options
        training = training_to_domain(options.training, "options.training")
        samples = min(options.num_samples or 3, _MAX_SAMPLES)
        report = await asyncio.to_thread(
            self._catalog.inspect, request.tenant, request.sha256, options.backbone, training, samples
        )
        return pb.InspectDatasetResponse(report=preflight_to_proto(report))

    async def RemoveDataset(self, request: pb.RemoveDatasetRequest, context: Any) -> pb.RemoveDatasetResponse:
        await asyncio.to_thread(self._catalog.remove, request.tenant, request.sha256)
        return pb.RemoveDatasetResponse()

    async def StreamMicrobatches(
        self, request: pb.StreamMicrobatchesRequest, context: Any
    ) -> AsyncIterator[pb.StreamMicrobatchesResponse]:
        _check_layout(request)
        members = [await asyncio.to_thread(self._member, request.backbone, member) for member in request.members]
        stream = rounds(members, request.token_budget, request.chunk_tokens)
        # One microbatch is made ahead of the one being sent; gRPC's flow control holds back the rest.
        ahead = asyncio.create_task(asyncio.to_thread(_next_message, stream))
        try:
            while (message := await ahead) is not None:
                ahead = asyncio.create_task(asyncio.to_thread(_next_message, stream))
                yield message
        finally:
            ahead.cancel()

    def _member(self, backbone: str, member: pb.Member) -> Member:
        training = training_to_domain(member.training, f"members[{member.task}].training")
        tenant = member.task.rpartition("/tasks/")[0]
        dataset = self._catalog.tokenized(tenant, member.dataset_version, backbone, training)
        steps = num_steps(training, len(split(dataset.num_rows, training).train))
        if steps != member.num_steps or not 0 <= member.cursor_step <= steps:
            raise InvalidInputError.of_field(
                "members.num_steps",
                f"{member.task} has {steps} steps, not {member.num_steps} (at {member.cursor_step})",
            )
        return Member(member.task, dataset, training, steps, member.cursor_step)


def _next_message(stream: Iterator[Microbatch]) -> pb.StreamMicrobatchesResponse | None:
    microbatch = next(stream, None)
    return None if microbatch is None else pb.StreamMicrobatchesResponse(microbatch=microbatch_to_proto(microbatch))


def _check_layout(request: pb.StreamMicrobatchesRequest) -> None:
    names = [member.task for member in request.members]
    if not names or len(set(names)) != len(names):
        raise InvalidInputError.of_field("members", f"{len(names)} members: name each task once")
    if request.chunk_tokens < 1 or request.chunk_tokens & (request.chunk_tokens - 1):
        raise InvalidInputError.of_field("chunk_tokens", f"{request.chunk_tokens} is no power of two")
    if request.token_budget < 1:
        raise InvalidInputError.of_field("token_budget", f"{request.token_budget} must be positive")
