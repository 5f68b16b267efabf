"""RPCs of datasets and backbones. protos/muxtune/v1/admission.proto specifies each RPC."""

import logging
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from engine.errors import ChecksumMismatchError, InvalidInputError, UnavailableError
from engine.target_modules import suffixes
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import alignment_pb2, alignment_pb2_grpc, artifact_pb2, dataset_pb2, plan_pb2
from services.admission.api import page_tokens
from services.admission.cleanup.dataset_objects import DatasetObjects, ObjectHold
from services.admission.ledger.ledger import live_executors
from services.admission.policy.admission_controller import AdmissionController
from services.admission.policy.task_estimator import INSPECT_SECONDS
from services.admission.store import datasets_and_adapters, idempotency
from services.admission.store.database import Database
from services.admission.store.tables import datasets
from services.admission.threads import AdmissionThreads
from services.concurrency.byte_budget import ByteBudget
from services.failpoints import failpoint
from services.message_limits import unknown_fields
from services.resource_names import new_name, tenant_of
from services.rpc.authentication import current_principal
from services.rpc.authorization import authorize, authorize_parent
from services.storage.artifact_layout import DatasetObject
from services.storage.artifact_store import ArtifactStore

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_log = logging.getLogger(__name__)


class DatasetRpcs:
    """Methods of AdmissionServicer on datasets and backbones."""

    _database: Database
    _artifacts: ArtifactStore
    _alignment: "alignment_pb2_grpc.AlignmentServiceAsyncStub"
    _controller: AdmissionController
    dataset_objects: DatasetObjects
    _threads: AdmissionThreads
    _uploads: ByteBudget

    async def UploadDataset(self, request_iterator: Any, context: Any) -> pb.UploadDatasetResponse:
        header, file, chunks = await _receive_headers(request_iterator)
        tenant, sha256 = authorize_parent(current_principal(), header.parent), file.sha256.lower()
        body = idempotency.hash_parts(header.id.encode(), file.sha256.encode())
        run = partial(self._threads.clients.run, tenant)
        name = await run(self._choose_dataset_name, tenant, header, body)
        dataset = await run(self._find_same_dataset, name, header.request_id, body, sha256)
        if dataset is not None and await self._has_bytes(tenant, sha256):
            return pb.UploadDatasetResponse(dataset=dataset)
        async with AsyncExitStack() as stack:
            stack.enter_context(self._uploads.take(tenant, "datasets", max(0, file.size_bytes)))
            unfinished = self._uploads.taken(tenant, "datasets")
            await run(self._controller.check_unfinished, datasets, tenant, unfinished, dataset is not None)
            hold = await stack.enter_async_context(self.dataset_objects.hold(tenant, sha256))
            stored = await self._alignment.StoreDataset(_to_store_requests(tenant, file, chunks, hold))
            failpoint("dataset.stored")
            dataset = await run(self._store_dataset, tenant, name, header.request_id, body, stored)
        return pb.UploadDatasetResponse(dataset=dataset)

    async def GetDataset(self, request: pb.GetDatasetRequest, context: Any) -> pb.GetDatasetResponse:
        name = authorize(current_principal(), request.name, "datasets")
        return pb.GetDatasetResponse(dataset=await self._read_dataset(name))

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Any) -> pb.ListDatasetsResponse:
        tenant = authorize_parent(current_principal(), request.parent)
        read = partial(self._threads.clients.run, tenant, partial(self._dataset_page, tenant))
        rows, token = await page_tokens.read_page(request, ["datasets", tenant], read)
        datasets = [datasets_and_adapters.dataset_to_proto(row) for row in rows]
        return pb.ListDatasetsResponse(datasets=datasets, next_page_token=token)

    async def PreflightDataset(self, request: pb.PreflightDatasetRequest, context: Any) -> pb.PreflightDatasetResponse:
        principal = current_principal()
        dataset = await self._read_dataset(authorize(principal, request.name, "datasets"))
        if unknown := list(unknown_fields(request.options, "options")):
            raise InvalidInputError.of_fields(unknown)
        answer = await self._alignment.InspectDataset(
            alignment_pb2.InspectDatasetRequest(
                tenant=str(principal.tenant), sha256=dataset.sha256, options=request.options
            ),
            timeout=INSPECT_SECONDS,
        )
        return pb.PreflightDatasetResponse(report=answer.report)

    async def DeleteDataset(self, request: pb.DeleteDatasetRequest, context: Any) -> pb.DeleteDatasetResponse:
        principal = current_principal()
        name = authorize(principal, request.name, "datasets")
        tenant, dataset = str(principal.tenant), await self._read_dataset(name)
        await self._threads.clients.run(tenant, self._delete_dataset, name)
        try:
            await self.dataset_objects.remove_unreferenced(tenant, dataset.sha256)
        except UnavailableError as error:  # the dataset is deleted; garbage collection deletes its bytes later
            _log.warning("bytes of %s not deleted yet: %s", name, error)
        return pb.DeleteDatasetResponse()

    async def ListBackbones(self, request: pb.ListBackbonesRequest, context: Any) -> pb.ListBackbonesResponse:
        executors = await self._threads.clients.run(str(current_principal().tenant), self._executors)
        return pb.ListBackbonesResponse(backbones=_summarize(executors))

    async def _has_bytes(self, tenant: str, sha256: str) -> bool:
        """Return whether the store still holds these bytes; it may have lost or changed them."""
        key = DatasetObject(tenant, sha256).key
        return await self._threads.compute(tenant, partial(self._artifacts.has_sha256, key, sha256))

    def _choose_dataset_name(self, tenant: str, header: artifact_pb2.UploadHeader, body: str) -> str:
        with self._database.read() as connection:
            existing = idempotency.find_resource(connection, tenant, header.request_id, "UploadDataset", body)
        return existing or new_name(tenant, "datasets", header.id, "header.id")

    def _find_same_dataset(self, name: str, request_id: str, body: str, sha256: str) -> dataset_pb2.Dataset | None:
        with self._database.read() as connection:
            if datasets_and_adapters.find_same_dataset(connection, name, sha256) is None:
                return None
        tenant = tenant_of(name)
        with self._database.write() as connection:
            if idempotency.find_resource(connection, tenant, request_id, "UploadDataset", body) is None:
                idempotency.record_request(connection, tenant, request_id, "UploadDataset", body, name)
            row = datasets_and_adapters.find_same_dataset(connection, name, sha256)
            return None if row is None else datasets_and_adapters.dataset_to_proto(row)

    def _store_dataset(
        self, tenant: str, name: str, request_id: str, body: str, stored: alignment_pb2.StoreDatasetResponse
    ) -> dataset_pb2.Dataset:
        with self._database.write() as connection:
            existing = idempotency.find_resource(connection, tenant, request_id, "UploadDataset", body)
            name = existing or name
            if datasets_and_adapters.find_same_dataset(connection, name, stored.sha256) is None:
                self.dataset_objects.check_stored(connection, tenant, stored.sha256)
                self._controller.check_dataset_bytes(connection, tenant, stored.size_bytes)
                shapes = dict(stored.num_rows_by_shape)
                datasets_and_adapters.insert_dataset(
                    connection, name, stored.sha256, stored.size_bytes, stored.num_rows, shapes
                )
            if not existing:
                idempotency.record_request(connection, tenant, request_id, "UploadDataset", body, name)
            return datasets_and_adapters.dataset_to_proto(datasets_and_adapters.get_dataset_row(connection, name))

    async def _read_dataset(self, name: str) -> dataset_pb2.Dataset:
        row = await self._database.query(partial(datasets_and_adapters.get_dataset_row, name=name))
        return datasets_and_adapters.dataset_to_proto(row)

    def _dataset_page(self, tenant: str, before: tuple[int, str] | None, limit: int) -> Any:
        with self._database.read() as connection:
            return datasets_and_adapters.list_page(connection, datasets, tenant, before, limit)

    def _delete_dataset(self, name: str) -> None:
        with self._database.write() as connection:
            datasets_and_adapters.delete_dataset(connection, name)

    def _executors(self) -> list[plan_pb2.Executor]:
        with self._database.read() as connection:
            return live_executors(connection)


async def _receive_headers(request_iterator: Any) -> tuple[artifact_pb2.UploadHeader, artifact_pb2.FileHeader, Any]:
    """Return the upload's header, the file's header and the stream of chunks. Raises InvalidInputError if the order is
    wrong, ChecksumMismatchError for a SHA-256 that is none."""
    parts = aiter(request_iterator)
    header = await anext(parts, None)
    if header is None or header.WhichOneof("part") != "header":
        raise InvalidInputError.of_field("header", "must come first")
    authorize_parent(current_principal(), header.header.parent)
    file = await anext(parts, None)
    if file is None or file.WhichOneof("part") != "file":
        raise InvalidInputError.of_field("file", "must follow the header, with the size and SHA-256 of the dataset")
    if not _SHA256.fullmatch(file.file.sha256):
        raise ChecksumMismatchError("file.sha256 must be the SHA-256 of the dataset's bytes: 64 hexadecimal digits")
    return header.header, file.file, parts


async def _to_store_requests(
    tenant: str, file: artifact_pb2.FileHeader, chunks: Any, hold: ObjectHold
) -> AsyncIterator[alignment_pb2.StoreDatasetRequest]:
    """Yield the requests to alignment, which stores the bytes after the last one. They are held from then on, and not
    before: a client may take hours to send them."""
    yield alignment_pb2.StoreDatasetRequest(tenant=tenant)
    yield alignment_pb2.StoreDatasetRequest(file=file)
    async for request in chunks:
        if request.WhichOneof("part") != "chunk":
            # Alignment refuses an empty part. An error raised here would be lost: gRPC swallows it.
            yield alignment_pb2.StoreDatasetRequest()
            return
        yield alignment_pb2.StoreDatasetRequest(chunk=request.chunk)
    await hold.start()


def _summarize(executors: list[plan_pb2.Executor]) -> list[pb.BackboneSummary]:
    by_name: dict[str, list[plan_pb2.Executor]] = {}
    for executor in executors:
        by_name.setdefault(executor.backbone.name, []).append(executor)
    return [
        pb.BackboneSummary(
            name=name,
            architecture=hosts[0].backbone.architecture,
            num_parameters=hosts[0].backbone.num_parameters,
            max_sequence_tokens=hosts[0].backbone.max_sequence_tokens,
            target_modules=suffixes(
                module.name
                for module in hosts[0].backbone.adaptable_modules
                if module.kind in (plan_pb2.MODULE_KIND_UNSPECIFIED, plan_pb2.MODULE_KIND_LINEAR)
            ),
            num_executors=len(hosts),
        )
        for name, hosts in sorted(by_name.items())
    ]
