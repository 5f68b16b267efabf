"""AlignmentService turns rows into microbatches; protos/muxtune/v1/alignment.proto documents each RPC."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from engine.alignment.dataset import TokenizedDataset, num_steps, split
from engine.alignment.microbatch import Microbatch
from engine.alignment.packing import PackedTask, rounds
from engine.errors import InvalidInputError, QuotaExceededError, UnavailableError
from engine.task import Training
from muxtune.v1 import alignment_pb2 as pb
from muxtune.v1 import alignment_pb2_grpc, artifact_pb2, dataset_pb2
from services.alignment.dataset_store import DatasetStore, TokenizedKey
from services.alignment.request_validation import (
    check_layout,
    check_num_steps,
    check_slice,
    check_steps,
    check_training,
)
from services.alignment.thread_pools import ThreadPools
from services.concurrency.byte_budget import ByteBudget
from services.concurrency.shared_jobs import SharedJobs
from services.conversion.microbatch import microbatch_to_proto
from services.conversion.preflight import preflight_to_proto
from services.conversion.task import training_to_domain
from services.resource_names import tenant_of
from services.storage.scratch_folder import ScratchFolder
from services.storage.uploaded_file import UploadedFile

_DEFAULT_SAMPLES, _MAX_SAMPLES = 3, 100


class AlignmentServicer(alignment_pb2_grpc.AlignmentServiceServicer):
    """Runs all work in threads, so that the event loop stays responsive. `budget`: of unfinished uploads' bytes."""

    def __init__(
        self, datasets: DatasetStore, max_dataset_bytes: int, scratch: ScratchFolder, budget: ByteBudget
    ) -> None:
        self._datasets, self._scratch, self._budget = datasets, scratch, budget
        self._max_dataset_bytes = max_dataset_bytes
        self._is_closing = False
        self._threads, self._jobs = ThreadPools(), SharedJobs[TokenizedDataset]()

    def close(self) -> None:
        """End streams at their next microbatch, and other work soon, with UNAVAILABLE."""
        self._is_closing = True
        self._datasets.close()

    async def StoreDataset(self, request_iterator: Any, context: Any) -> pb.StoreDatasetResponse:
        tenant, upload = "", None
        async with AsyncExitStack() as stack:
            async for request in request_iterator:
                part = request.WhichOneof("part")
                if part == "tenant" and not tenant:
                    tenant = request.tenant
                elif part == "file" and tenant and upload is None:
                    upload = await self._start_upload(tenant, request.file, stack)
                elif part == "chunk" and upload is not None:
                    if upload.add(request.chunk.offset, request.chunk.data):
                        await self._threads.files.run(tenant, upload.write)
                else:
                    order = f"{part or 'an empty part'} is out of order; send the tenant, the file, then only chunks"
                    raise InvalidInputError.of_field("part", order)
            if upload is None:
                raise InvalidInputError.of_field("file", "is missing")
            stored = await self._threads.long.run(tenant, self._datasets.store, tenant, upload)
        return pb.StoreDatasetResponse(
            sha256=stored.sha256,
            size_bytes=stored.size_bytes,
            num_rows=stored.num_rows,
            num_rows_by_shape=stored.num_rows_by_shape,
        )

    async def _start_upload(self, tenant: str, file: artifact_pb2.FileHeader, stack: AsyncExitStack) -> UploadedFile:
        """Take the disk space of an upload, which the stack gives back. Raises QuotaExceededError, OverloadedError."""
        if file.size_bytes > self._max_dataset_bytes:
            raise QuotaExceededError(
                f"The dataset has {file.size_bytes} bytes, more than the {self._max_dataset_bytes} allowed.",
                subject="dataset",
            )
        stack.enter_context(self._budget.take(tenant, "datasets", max(0, file.size_bytes)))
        run = partial(self._threads.files.run, tenant)
        folder = await stack.enter_async_context(self._scratch.new_folder_of_call(run))
        return UploadedFile(folder / "dataset.jsonl", file.size_bytes, file.sha256, "The dataset")

    async def InspectDataset(self, request: pb.InspectDatasetRequest, context: Any) -> pb.InspectDatasetResponse:
        options: dataset_pb2.PreflightOptions = request.options
        training = training_to_domain(options.training, "options.training")
        check_training(training, "options.training")
        if options.num_samples < 0:
            raise InvalidInputError.of_field("options.num_samples", f"{options.num_samples} must not be negative")
        samples = min(options.num_samples or _DEFAULT_SAMPLES, _MAX_SAMPLES)
        tenant, backbone = request.tenant, options.backbone
        dataset = await self._tokenized(tenant, request.sha256, backbone, training)
        inspect = self._datasets.inspect
        report = await self._threads.long.run(tenant, inspect, tenant, backbone, dataset, training, samples)
        check_num_steps(report.num_steps)
        return pb.InspectDatasetResponse(report=preflight_to_proto(report))

    async def RemoveDataset(self, request: pb.RemoveDatasetRequest, context: Any) -> pb.RemoveDatasetResponse:
        await self._threads.removals.run(self._datasets.remove, request.tenant, request.sha256)
        return pb.RemoveDatasetResponse()

    async def StreamMicrobatches(
        self, request: pb.StreamMicrobatchesRequest, context: Any
    ) -> AsyncIterator[pb.StreamMicrobatchesResponse]:
        check_layout(request)
        members = [await self._member(request.backbone, member) for member in request.members]
        stream = rounds(members, request.token_budget, request.chunk_tokens)
        tenants = " ".join(sorted({tenant_of(member.task) for member in request.members}))
        # Make one microbatch ahead of the one being sent; gRPC's flow control delays the rest.
        ahead = asyncio.create_task(self._threads.packing.run(tenants, _next_message, stream))
        try:
            while (message := await ahead) is not None:
                if self._is_closing:
                    raise UnavailableError("Alignment is stopping. Open the stream again.")
                ahead = asyncio.create_task(self._threads.packing.run(tenants, _next_message, stream))
                yield message
        finally:
            ahead.cancel()

    async def _member(self, backbone: str, member: pb.Member) -> PackedTask:
        path = f"members[{member.task}].training"
        training = training_to_domain(member.training, path)
        check_training(training, path)
        tenant = tenant_of(member.task)
        dataset = await self._tokenized(tenant, member.dataset_version, backbone, training)
        return await self._threads.packing.run(tenant, _packed_task, member, dataset, training)

    async def _tokenized(self, tenant: str, sha256: str, backbone: str, training: Training) -> TokenizedDataset:
        """Return the tokenized dataset. Calls that want the same one share a job, which stops when all have left."""
        version = (tenant, sha256, backbone, training)
        dataset = self._datasets.cached(*version)
        if dataset is not None:
            return dataset
        work = partial(self._threads.long.run, tenant, self._datasets.tokenized, *version)
        return await self._jobs.run(TokenizedKey.of(*version), work)


def _packed_task(member: pb.Member, dataset: TokenizedDataset, training: Training) -> PackedTask:
    steps = num_steps(training, len(split(dataset.num_rows, training).train))
    check_steps(member, steps)
    check_slice(member, training)
    return PackedTask(
        member.task,
        dataset,
        training,
        steps,
        member.cursor_step,
        member.num_virtual_tokens,
        member.num_prefix_tokens,
        member.round_tokens,
        member.is_evaluated,
        tuple((interval.start, interval.end) for interval in member.done),
    )


def _next_message(stream: Iterator[Microbatch]) -> pb.StreamMicrobatchesResponse | None:
    microbatch = next(stream, None)
    return None if microbatch is None else pb.StreamMicrobatchesResponse(microbatch=microbatch_to_proto(microbatch))
