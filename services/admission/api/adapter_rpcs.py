"""RPCs of adapters. protos/muxtune/v1/admission.proto specifies each RPC."""

import asyncio
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
from services.resource_names import ResourceName, is_task, new_name
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

    async def UploadAdapter(self, request_iterator: Any, context: Any) -> pb.UploadAdapterResponse:
        upload, header = AdapterUpload(self._max_upload_bytes), None
        async for request in request_iterator:
            part = request.WhichOneof("part")
            if part == "header" and header is None:
                header = request.header
                tenant = authorize_parent(current_principal(), header.parent)
                await asyncio.to_thread(self._check_quota, tenant, header)
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
        return pb.UploadAdapterResponse(
            adapter=await asyncio.to_thread(self._store_adapter, tenant, header, upload.finish())
        )

    async def DownloadAdapter(
        self, request: pb.DownloadAdapterRequest, context: Any
    ) -> AsyncIterator[pb.DownloadAdapterResponse]:
        manifest = await asyncio.to_thread(self._read_manifest, request.name)
        for name, entry in sorted(manifest.files.items()):
            try:
                data = await asyncio.to_thread(self._artifacts.read_file, manifest, name)
            except ArtifactCorruptError:
                await asyncio.to_thread(
                    self._read_manifest, request.name
                )  # raises if the adapter was deleted meanwhile
                raise
            yield pb.DownloadAdapterResponse(
                file=artifact_pb2.FileHeader(file_name=name, size_bytes=entry.size_bytes, sha256=entry.sha256)
            )
            for offset in range(0, len(data), _CHUNK_BYTES):
                chunk = artifact_pb2.FileChunk(offset=offset, data=data[offset : offset + _CHUNK_BYTES])
                yield pb.DownloadAdapterResponse(chunk=chunk)

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Any) -> pb.ListAdaptersResponse:
        tenant = authorize_parent(current_principal(), request.parent)
        rows, token = await page_tokens.read_page(request, ["adapters", tenant], partial(self._adapter_page, tenant))
        adapters = [datasets_and_adapters.adapter_to_proto(row) for row in rows]
        return pb.ListAdaptersResponse(adapters=adapters, next_page_token=token)

    async def DeleteAdapter(self, request: pb.DeleteAdapterRequest, context: Any) -> pb.DeleteAdapterResponse:
        name = authorize(current_principal(), request.name, "adapters")
        folder = await asyncio.to_thread(self._delete_adapter, name)
        try:
            await asyncio.to_thread(self._artifacts.delete_folder, folder)
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

    def _store_adapter(
        self, tenant: str, header: artifact_pb2.UploadHeader, files: dict[str, bytes]
    ) -> artifact_pb2.Adapter:
        digest = idempotency.hash_parts(*(data for _, data in sorted(files.items())))
        body = idempotency.hash_parts(header.id.encode(), digest.encode())
        with self._database.read() as connection:
            if existing := idempotency.find_resource(connection, tenant, header.request_id, "UploadAdapter", body):
                return datasets_and_adapters.adapter_to_proto(
                    datasets_and_adapters.get_adapter_row(connection, existing)
                )
            name = new_name(tenant, "adapters", header.id, "header.id")
            datasets_and_adapters.find_same_adapter(connection, name, digest)
        folder = datasets_and_adapters.new_upload(name, digest)
        manifest = self._artifacts.commit_folder(folder, files, {})
        try:
            row = self._record_adapter(tenant, name, header.request_id, body, digest, manifest)
        except (AlreadyExistsError, QuotaExceededError, RequestIdReusedError):
            self._artifacts.delete_folder(folder)
            raise
        if row.manifest_key != manifest.key:  # the adapter exists already, by its name or by the same request
            self._artifacts.delete_folder(folder)
        return datasets_and_adapters.adapter_to_proto(row)

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

    def _read_manifest(self, name: str) -> Manifest:
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
            key = datasets_and_adapters.get_adapter_row(connection, authorize(principal, name, "adapters")).manifest_key
        return self._artifacts.read_manifest(key)
