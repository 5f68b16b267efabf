"""RPCs of adapters. protos/muxtune/v1/admission.proto specifies each RPC."""

import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from engine.errors import (
    AlreadyExistsError,
    ArtifactCorruptError,
    IllegalTransitionError,
    InvalidInputError,
    QuotaExceededError,
    RequestIdReusedError,
    UnavailableError,
)
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import artifact_pb2
from services.admission.api import page_tokens
from services.admission.policy.adapter_upload import AdapterUpload
from services.admission.policy.admission_controller import AdmissionController
from services.admission.store import datasets_and_adapters, idempotency, tasks
from services.admission.store.database import Database
from services.admission.store.tables import adapters
from services.admission.threads import AdmissionThreads
from services.resource_names import ResourceName, is_task, new_name, tenant_of
from services.rpc.authentication import current_principal
from services.rpc.authorization import authorize, authorize_parent
from services.storage.artifact_store import ArtifactStore, Manifest

_CHUNK_BYTES = 1 << 20
_log = logging.getLogger(__name__)


class AdapterRpcs:
    """Methods of AdmissionServicer on adapters."""

    _database: Database
    _artifacts: ArtifactStore
    _controller: AdmissionController
    _max_upload_bytes: int
    _threads: AdmissionThreads

    async def UploadAdapter(self, request_iterator: Any, context: Any) -> pb.UploadAdapterResponse:
        upload, header = AdapterUpload(self._max_upload_bytes), None
        async for request in request_iterator:
            part = request.WhichOneof("part")
            if part == "header" and header is None:
                header = request.header
                tenant = authorize_parent(current_principal(), header.parent)
                await self._threads.clients.run(tenant, self._check_quota, tenant, header)
            elif part == "file" and header is not None:
                upload.start_file(request.file)
            elif part == "chunk" and header is not None:
                upload.add_chunk(request.chunk)
            else:
                raise InvalidInputError.of_field(
                    "part", f"{part} is out of order: send the header, then each file's header and its chunks"
                )
        if header is None:
            raise InvalidInputError.of_field("header", "must come first, but nothing was sent")
        files = await self._threads.transfers.run(tenant, upload.finish)
        return pb.UploadAdapterResponse(adapter=await self._store_adapter(tenant, header, files))

    async def DownloadAdapter(
        self, request: pb.DownloadAdapterRequest, context: Any
    ) -> AsyncIterator[pb.DownloadAdapterResponse]:
        tenant = str(current_principal().tenant)
        manifest = await self._read_manifest(tenant, request.name)
        for name, entry in sorted(manifest.files.items()):
            try:
                data = await self._threads.transfers.run(tenant, self._artifacts.read_file, manifest, name)
            except ArtifactCorruptError:
                await self._read_manifest(tenant, request.name)  # raises if the adapter was deleted meanwhile
                raise
            yield pb.DownloadAdapterResponse(
                file=artifact_pb2.FileHeader(file_name=name, size_bytes=entry.size_bytes, sha256=entry.sha256)
            )
            for offset in range(0, len(data), _CHUNK_BYTES):
                chunk = artifact_pb2.FileChunk(offset=offset, data=data[offset : offset + _CHUNK_BYTES])
                yield pb.DownloadAdapterResponse(chunk=chunk)

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Any) -> pb.ListAdaptersResponse:
        tenant = authorize_parent(current_principal(), request.parent)
        read = partial(self._threads.clients.run, tenant, partial(self._adapter_page, tenant))
        rows, token = await page_tokens.read_page(request, ["adapters", tenant], read)
        adapters = [datasets_and_adapters.adapter_to_proto(row) for row in rows]
        return pb.ListAdaptersResponse(adapters=adapters, next_page_token=token)

    async def DeleteAdapter(self, request: pb.DeleteAdapterRequest, context: Any) -> pb.DeleteAdapterResponse:
        name = authorize(current_principal(), request.name, "adapters")
        tenant = tenant_of(name)
        folder = await self._threads.clients.run(tenant, self._delete_adapter, name)
        try:
            await self._threads.transfers.run(tenant, self._artifacts.delete_folder, folder)
        except UnavailableError as error:  # the adapter is deleted; garbage collection deletes its files later
            _log.warning("files of %s not deleted yet: %s", name, error)
        return pb.DeleteAdapterResponse()

    def _check_quota(self, tenant: str, header: artifact_pb2.UploadHeader) -> None:
        """Check the quota before files are received. An upload that may repeat an earlier one is checked after its
        files are known. Raises QuotaExceededError."""
        name = str(ResourceName(tenant, "adapters", header.id))
        with self._database.read() as connection:
            is_repeated = idempotency.has_request(connection, tenant, header.request_id)
            if not is_repeated and not datasets_and_adapters.has_adapter(connection, name):
                self._controller.check_adapter_bytes(connection, tenant, 1)

    async def _store_adapter(
        self, tenant: str, header: artifact_pb2.UploadHeader, files: dict[str, bytes]
    ) -> artifact_pb2.Adapter:
        digest = idempotency.hash_parts(*(data for _, data in sorted(files.items())))
        body = idempotency.hash_parts(header.id.encode(), digest.encode())
        database, store = self._threads.clients, self._threads.transfers
        existing = await database.run(tenant, self._find_uploaded_adapter, tenant, header.request_id, body)
        if existing is not None:
            return datasets_and_adapters.adapter_to_proto(existing)
        name = new_name(tenant, "adapters", header.id, "header.id")
        await database.run(tenant, self._find_same_adapter, name, digest)
        folder = datasets_and_adapters.new_upload(name, digest)
        manifest = await store.run(tenant, self._artifacts.commit_folder, folder, files, {})
        try:
            record = partial(self._record_adapter, tenant, name, header.request_id, body, digest, manifest)
            row = await database.run(tenant, record)
        except (AlreadyExistsError, QuotaExceededError, RequestIdReusedError):
            await store.run(tenant, self._artifacts.delete_folder, folder)
            raise
        if row.manifest_key != manifest.key:  # the adapter exists already, by its name or by the same request
            await store.run(tenant, self._artifacts.delete_folder, folder)
        return datasets_and_adapters.adapter_to_proto(row)

    def _find_uploaded_adapter(self, tenant: str, request_id: str, body: str) -> Any | None:
        """Return the row of the adapter that the request created before, or None."""
        with self._database.read() as connection:
            name = idempotency.find_resource(connection, tenant, request_id, "UploadAdapter", body)
            return datasets_and_adapters.get_adapter_row(connection, name) if name else None

    def _find_same_adapter(self, name: str, digest: str) -> Any | None:
        with self._database.read() as connection:
            return datasets_and_adapters.find_same_adapter(connection, name, digest)

    def _record_adapter(
        self, tenant: str, name: str, request_id: str, body: str, digest: str, manifest: Manifest
    ) -> Any:
        """Store the adapter's row, unless the adapter exists already; return the row that is stored."""
        with self._database.write() as connection:
            existing = idempotency.find_resource(connection, tenant, request_id, "UploadAdapter", body)
            if existing is None:
                if datasets_and_adapters.find_same_adapter(connection, name, digest) is None:
                    self._controller.check_adapter_bytes(connection, tenant, manifest.size_bytes)
                    datasets_and_adapters.insert_adapter(connection, name, manifest.key, manifest.size_bytes)
                idempotency.record_request(connection, tenant, request_id, "UploadAdapter", body, name)
            return datasets_and_adapters.get_adapter_row(connection, existing or name)

    def _adapter_page(self, tenant: str, before: tuple[int, str] | None, limit: int) -> Any:
        with self._database.read() as connection:
            return datasets_and_adapters.list_page(connection, adapters, tenant, before, limit)

    def _delete_adapter(self, name: str) -> str:
        with self._database.write() as connection:
            return datasets_and_adapters.delete_adapter(connection, name)

    async def _read_manifest(self, tenant: str, name: str) -> Manifest:
        key = await self._threads.clients.run(tenant, self._read_manifest_key, name)
        return await self._threads.transfers.run(tenant, self._artifacts.read_manifest, key)

    def _read_manifest_key(self, name: str) -> str:
        principal = current_principal()
        with self._database.read() as connection:
            if is_task(name):
                row = tasks.get_row(connection, authorize(principal, name, "tasks"))
                if not row.adapter:
                    raise IllegalTransitionError(
                        f"{name} has no adapter: it is {row.state}, or its adapter was deleted",
                        task=name,
                        state=row.state,
                    )
                name = row.adapter
            row = datasets_and_adapters.get_adapter_row(connection, authorize(principal, name, "adapters"))
            return str(row.manifest_key)
