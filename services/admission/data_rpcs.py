"""The RPCs of datasets, adapters and backbones. What each promises stands in protos/muxtune/v1/admission.proto."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from typing import Any
from weakref import WeakValueDictionary

from engine.errors import AlreadyExistsError, IllegalTransitionError, InvalidInputError, MuxtuneError, UnavailableError
from engine.target_modules import suffixes
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import alignment_pb2, alignment_pb2_grpc, artifact_pb2, dataset_pb2, plan_pb2
from services.admission import catalog, pages, requests, tasks
from services.admission.admit import Admitter
from services.admission.appraisal import INSPECT_SECONDS
from services.admission.database import Database
from services.admission.ledger import known_executors
from services.admission.names import authorize, new_name, parent_of
from services.admission.receipt import FolderReceipt
from services.artifacts import ArtifactStore, Manifest
from services.auth import current_principal
from services.failpoints import failpoint

_CHUNK_BYTES = 1 << 20
_DATASET = re.compile(r"(tenants/[^/]+)/datasets/([0-9a-f]{64})\.jsonl")
_log = logging.getLogger(__name__)


class DataRpcs:
    """Part of AdmissionServicer."""

    _database: Database
    _artifacts: ArtifactStore
    _alignment: "alignment_pb2_grpc.AlignmentServiceAsyncStub"
    _admitter: Admitter
    _max_adapter_bytes: int
    _bytes_locks: WeakValueDictionary[str, asyncio.Lock]

    async def UploadDataset(self, request_iterator: Any, context: Any) -> pb.UploadDatasetResponse:
        header, file, chunks = await _opening(request_iterator)
        tenant = parent_of(current_principal(), header.parent)
        body = requests.body_hash(header.id.encode(), file.sha256.encode())
        name = await asyncio.to_thread(self._dataset_name, tenant, header, body)
        known = await asyncio.to_thread(self._existing_dataset, name, header.request_id, body, file.sha256.lower())
        if known is None:
            await asyncio.to_thread(self._admitter.check_bytes, tenant, file.size_bytes)
            async with self._bytes_lock(tenant, file.sha256.lower()):
                stored = await self._alignment.StoreDataset(_forwarded(tenant, file, chunks))
                failpoint("dataset.stored")
                try:
                    known = await asyncio.to_thread(self._store_dataset, tenant, name, header.request_id, body, stored)
                except MuxtuneError:
                    await self._remove_unreferenced(tenant, stored.sha256)
                    raise
        return pb.UploadDatasetResponse(dataset=known)

    async def GetDataset(self, request: pb.GetDatasetRequest, context: Any) -> pb.GetDatasetResponse:
        name = authorize(current_principal(), request.name, "datasets")
        return pb.GetDatasetResponse(dataset=await asyncio.to_thread(self._read_dataset, name))

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Any) -> pb.ListDatasetsResponse:
        tenant = parent_of(current_principal(), request.parent)
        size, query = pages.size(request.page_size), ["datasets", tenant]
        rows = await asyncio.to_thread(self._dataset_page, tenant, pages.start(query, request.page_token), size + 1)
        shown = rows[:size]
        more = pages.token(query, shown[-1].created, shown[-1].name) if len(rows) > size else ""
        return pb.ListDatasetsResponse(datasets=[catalog.dataset_to_proto(row) for row in shown], next_page_token=more)

    async def PreflightDataset(self, request: pb.PreflightDatasetRequest, context: Any) -> pb.PreflightDatasetResponse:
        principal = current_principal()
        dataset = await asyncio.to_thread(self._read_dataset, authorize(principal, request.name, "datasets"))
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
        dataset = await asyncio.to_thread(self._read_dataset, name)
        async with self._bytes_lock(str(principal.tenant), dataset.sha256):
            await asyncio.to_thread(self._delete_dataset, name)
            try:
                await self._remove_unreferenced(str(principal.tenant), dataset.sha256)
            except UnavailableError as error:  # the tenant's dataset is gone; its bytes go with the next sweep
                _log.warning("bytes of %s stay for now: %s", name, error)
        return pb.DeleteDatasetResponse()

    async def UploadAdapter(self, request_iterator: Any, context: Any) -> pb.UploadAdapterResponse:
        receipt, header = FolderReceipt(self._max_adapter_bytes), None
        async for request in request_iterator:
            part = request.WhichOneof("part")
            if part == "header" and header is None:
                header = request.header
                tenant = parent_of(current_principal(), header.parent)
            elif part == "file" and header is not None:
                receipt.open(request.file)
            elif part == "chunk" and header is not None:
                receipt.add(request.chunk)
            else:
                raise InvalidInputError.of_field("part", f"{part} is out of order: header, then each file and chunks")
        if header is None:
            raise InvalidInputError.of_field("header", "is missing: nothing was sent")
        return pb.UploadAdapterResponse(
            adapter=await asyncio.to_thread(self._store_adapter, tenant, header, receipt.close())
        )

    async def DownloadAdapter(
        self, request: pb.DownloadAdapterRequest, context: Any
    ) -> AsyncIterator[pb.DownloadAdapterResponse]:
        manifest = await asyncio.to_thread(self._adapter_manifest, request.name)
        for name, entry in sorted(manifest.files.items()):
            data = await asyncio.to_thread(self._artifacts.read_file, manifest, name)
            yield pb.DownloadAdapterResponse(
                file=artifact_pb2.FileHeader(file_name=name, size_bytes=entry.size_bytes, sha256=entry.sha256)
            )
            for offset in range(0, len(data), _CHUNK_BYTES):
                chunk = artifact_pb2.FileChunk(offset=offset, data=data[offset : offset + _CHUNK_BYTES])
                yield pb.DownloadAdapterResponse(chunk=chunk)

    async def ListBackbones(self, request: pb.ListBackbonesRequest, context: Any) -> pb.ListBackbonesResponse:
        executors = await asyncio.to_thread(self._executors)
        return pb.ListBackbonesResponse(backbones=_summaries(executors))

    async def sweep_datasets(self) -> None:
        """Removes bytes that no dataset holds: an upload or a deletion was cut short. Raises UnavailableError."""
        keys = await asyncio.to_thread(self._artifacts.list, "tenants")
        for found in filter(None, map(_DATASET.fullmatch, keys)):
            async with self._bytes_lock(found[1], found[2]):
                await self._remove_unreferenced(found[1], found[2])

    def _bytes_lock(self, tenant: str, sha256: str) -> asyncio.Lock:
        """Held while bytes are stored and their row is written, or the other way round: an upload must not find the
        bytes that a deletion is about to remove."""
        return self._bytes_locks.setdefault(f"{tenant} {sha256}", asyncio.Lock())

    async def _remove_unreferenced(self, tenant: str, sha256: str) -> None:
        """The bytes, if no dataset holds them. Call with their lock held."""
        if not await asyncio.to_thread(self._is_referenced, tenant, sha256):
            await self._alignment.RemoveDataset(alignment_pb2.RemoveDatasetRequest(tenant=tenant, sha256=sha256))

    def _dataset_name(self, tenant: str, header: artifact_pb2.UploadHeader, body: str) -> str:
        with self._database.read() as connection:
            made = requests.find(connection, tenant, header.request_id, "UploadDataset", body)
        return made or new_name(tenant, "datasets", header.id, "header.id")

    def _existing_dataset(self, name: str, request_id: str, body: str, sha256: str) -> dataset_pb2.Dataset | None:
        with self._database.read() as connection:
            if catalog.existing_dataset(connection, name, sha256) is None:
                return None
        tenant = name.rpartition("/datasets/")[0]
        with self._database.write() as connection:
            if requests.find(connection, tenant, request_id, "UploadDataset", body) is None:
                requests.remember(connection, tenant, request_id, "UploadDataset", body, name)
            row = catalog.existing_dataset(connection, name, sha256)
            return None if row is None else catalog.dataset_to_proto(row)

    def _store_dataset(
        self, tenant: str, name: str, request_id: str, body: str, stored: alignment_pb2.StoreDatasetResponse
    ) -> dataset_pb2.Dataset:
        with self._database.write() as connection:
            made = requests.find(connection, tenant, request_id, "UploadDataset", body)
            name = made or name
            if catalog.existing_dataset(connection, name, stored.sha256) is None:
                self._admitter.check_bytes_again(connection, tenant, stored.size_bytes)
                shapes = dict(stored.num_rows_by_shape)
                catalog.insert_dataset(connection, name, stored.sha256, stored.size_bytes, stored.num_rows, shapes)
            if not made:
                requests.remember(connection, tenant, request_id, "UploadDataset", body, name)
            return catalog.dataset_to_proto(catalog.dataset_row(connection, name))

    def _read_dataset(self, name: str) -> dataset_pb2.Dataset:
        with self._database.read() as connection:
            return catalog.dataset_to_proto(catalog.dataset_row(connection, name))

    def _dataset_page(self, tenant: str, before: tuple[int, str] | None, limit: int) -> Any:
        with self._database.read() as connection:
            return catalog.dataset_page(connection, tenant, before, limit)

    def _delete_dataset(self, name: str) -> None:
        with self._database.write() as connection:
            catalog.delete_dataset(connection, name)

    def _is_referenced(self, tenant: str, sha256: str) -> bool:
        with self._database.read() as connection:
            return catalog.is_referenced(connection, tenant, sha256)

    def _store_adapter(
        self, tenant: str, header: artifact_pb2.UploadHeader, files: dict[str, bytes]
    ) -> artifact_pb2.Adapter:
        digest = requests.body_hash(*(data for _, data in sorted(files.items())))
        body = requests.body_hash(header.id.encode(), digest.encode())
        with self._database.read() as connection:
            if made := requests.find(connection, tenant, header.request_id, "UploadAdapter", body):
                return catalog.adapter_to_proto(catalog.adapter_row(connection, made))
            name = new_name(tenant, "adapters", header.id, "header.id")
            folder = f"{name}/uploaded-{digest[:16]}"
            catalog.existing_adapter(connection, name, folder)
        manifest = self._artifacts.commit_folder(folder, files, {})
        try:
            with self._database.write() as connection:
                made = requests.find(connection, tenant, header.request_id, "UploadAdapter", body)
                if made is None and catalog.existing_adapter(connection, name, folder) is None:
                    catalog.insert_adapter(connection, name, manifest.key, manifest.size_bytes)
                if made is None:
                    requests.remember(connection, tenant, header.request_id, "UploadAdapter", body, name)
                row = catalog.adapter_row(connection, made or name)
        except AlreadyExistsError:
            self._artifacts.delete_folder(folder)
            raise
        if row.name != name:  # the same request came twice at once, and named its adapter itself
            self._artifacts.delete_folder(folder)
        return catalog.adapter_to_proto(row)

    def _adapter_manifest(self, name: str) -> Manifest:
        principal = current_principal()
        with self._database.read() as connection:
            if "/tasks/" in name:
                row = tasks.row_of(connection, authorize(principal, name, "tasks"))
                if not row.adapter:
                    raise IllegalTransitionError(
                        f"{name} has no adapter: it is {row.state}", task=name, state=row.state
                    )
                name = row.adapter
            key = catalog.adapter_row(connection, authorize(principal, name, "adapters")).manifest_key
        return self._artifacts.read_manifest(key)

    def _executors(self) -> list[plan_pb2.Executor]:
        with self._database.read() as connection:
            return known_executors(connection, only_live=True)


async def _opening(request_iterator: Any) -> tuple[artifact_pb2.UploadHeader, artifact_pb2.FileHeader, Any]:
    """The header and the file announced, and what follows. Raises InvalidInputError for another order."""
    parts = aiter(request_iterator)
    header = await anext(parts, None)
    if header is None or header.WhichOneof("part") != "header":
        raise InvalidInputError.of_field("header", "must come first")
    parent_of(current_principal(), header.header.parent)
    file = await anext(parts, None)
    if file is None or file.WhichOneof("part") != "file":
        raise InvalidInputError.of_field("file", "must follow the header: size and SHA-256 of what comes")
    return header.header, file.file, parts


async def _forwarded(
    tenant: str, file: artifact_pb2.FileHeader, chunks: Any
) -> AsyncIterator[alignment_pb2.StoreDatasetRequest]:
    yield alignment_pb2.StoreDatasetRequest(tenant=tenant)
    yield alignment_pb2.StoreDatasetRequest(file=file)
    async for request in chunks:
        if request.WhichOneof("part") != "chunk":
            # Alignment refuses this one: raised here, an error would reach nobody (gRPC swallows it).
            yield alignment_pb2.StoreDatasetRequest()
            return
        yield alignment_pb2.StoreDatasetRequest(chunk=request.chunk)


def _summaries(executors: list[plan_pb2.Executor]) -> list[pb.BackboneSummary]:
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
