"""The RPCs of adapters. What each promises stands in protos/muxtune/v1/admission.proto."""

import asyncio
import logging
from collections.abc import AsyncIterator
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
    """Part of AdmissionServicer."""

    _database: Database
    _artifacts: ArtifactStore
    _admitter: AdmissionController
    _max_upload_bytes: int

    async def UploadAdapter(self, request_iterator: Any, context: Any) -> pb.UploadAdapterResponse:
        receipt, header = AdapterUpload(self._max_upload_bytes), None
        async for request in request_iterator:
            part = request.WhichOneof("part")
            if part == "header" and header is None:
                header = request.header
                tenant = authorize_parent(current_principal(), header.parent)
                await asyncio.to_thread(self._check_room, tenant, header)
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
            try:
                data = await asyncio.to_thread(self._artifacts.read_file, manifest, name)
            except ArtifactCorruptError:
                await asyncio.to_thread(self._adapter_manifest, request.name)  # it was deleted meanwhile: it says so
                raise
            yield pb.DownloadAdapterResponse(
                file=artifact_pb2.FileHeader(file_name=name, size_bytes=entry.size_bytes, sha256=entry.sha256)
            )
            for offset in range(0, len(data), _CHUNK_BYTES):
                chunk = artifact_pb2.FileChunk(offset=offset, data=data[offset : offset + _CHUNK_BYTES])
                yield pb.DownloadAdapterResponse(chunk=chunk)

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Any) -> pb.ListAdaptersResponse:
        tenant = authorize_parent(current_principal(), request.parent)
        size, query = page_tokens.size(request.page_size), ["adapters", tenant]
        rows = await asyncio.to_thread(
            self._adapter_page, tenant, page_tokens.start(query, request.page_token), size + 1
        )
        shown = rows[:size]
        more = page_tokens.token(query, shown[-1].created, shown[-1].name) if len(rows) > size else ""
        return pb.ListAdaptersResponse(
            adapters=[datasets_and_adapters.adapter_to_proto(row) for row in shown], next_page_token=more
        )

    async def DeleteAdapter(self, request: pb.DeleteAdapterRequest, context: Any) -> pb.DeleteAdapterResponse:
        name = authorize(current_principal(), request.name, "adapters")
        folder = await asyncio.to_thread(self._delete_adapter, name)
        try:
            await asyncio.to_thread(self._artifacts.delete_folder, folder)
        except UnavailableError as error:  # the tenant's adapter is gone; its files go with a later sweep
            _log.warning("files of %s stay for now: %s", name, error)
        return pb.DeleteAdapterResponse()

    def _check_room(self, tenant: str, header: artifact_pb2.UploadHeader) -> None:
        """Before anything is taken in; what may be there already is looked at when it is all here. Raises
        QuotaExceededError."""
        name = str(ResourceName(tenant, "adapters", header.id))
        with self._database.read() as connection:
            is_known = idempotency.is_known(connection, tenant, header.request_id)
            if not is_known and not datasets_and_adapters.has_adapter(connection, name):
                self._admitter.check_adapters(connection, tenant, 1)

    def _store_adapter(
        self, tenant: str, header: artifact_pb2.UploadHeader, files: dict[str, bytes]
    ) -> artifact_pb2.Adapter:
        digest = idempotency.body_hash(*(data for _, data in sorted(files.items())))
        body = idempotency.body_hash(header.id.encode(), digest.encode())
        with self._database.read() as connection:
            if made := idempotency.find(connection, tenant, header.request_id, "UploadAdapter", body):
                return datasets_and_adapters.adapter_to_proto(datasets_and_adapters.adapter_row(connection, made))
            name = new_name(tenant, "adapters", header.id, "header.id")
            datasets_and_adapters.existing_adapter(connection, name, digest)
        folder = datasets_and_adapters.new_upload(name, digest)
        manifest = self._artifacts.commit_folder(folder, files, {})
        try:
            row = self._record_adapter(tenant, name, header.request_id, body, digest, manifest)
        except (AlreadyExistsError, QuotaExceededError, RequestIdReusedError):
            self._artifacts.delete_folder(folder)
            raise
        if row.manifest_key != manifest.key:  # it is there already, under this name or of the same request
            self._artifacts.delete_folder(folder)
        return datasets_and_adapters.adapter_to_proto(row)

    def _record_adapter(
        self, tenant: str, name: str, request_id: str, body: str, digest: str, manifest: Manifest
    ) -> Any:
        """The row that stands for it."""
        with self._database.write() as connection:
            made = idempotency.find(connection, tenant, request_id, "UploadAdapter", body)
            if made is None:
                if datasets_and_adapters.existing_adapter(connection, name, digest) is None:
                    self._admitter.check_adapters(connection, tenant, manifest.size_bytes)
                    datasets_and_adapters.insert_adapter(connection, name, manifest.key, manifest.size_bytes)
                idempotency.remember(connection, tenant, request_id, "UploadAdapter", body, name)
            return datasets_and_adapters.adapter_row(connection, made or name)

    def _adapter_page(self, tenant: str, before: tuple[int, str] | None, limit: int) -> Any:
        with self._database.read() as connection:
            return datasets_and_adapters.page(connection, adapters, tenant, before, limit)

    def _delete_adapter(self, name: str) -> str:
        with self._database.write() as connection:
            return datasets_and_adapters.delete_adapter(connection, name)

    def _adapter_manifest(self, name: str) -> Manifest:
        principal = current_principal()
        with self._database.read() as connection:
            if is_task(name):
                row = tasks.row_of(connection, authorize(principal, name, "tasks"))
                if not row.adapter:
                    raise IllegalTransitionError(
                        f"{name} has no adapter, or not any more: it is {row.state}", task=name, state=row.state
                    )
                name = row.adapter
            key = datasets_and_adapters.adapter_row(connection, authorize(principal, name, "adapters")).manifest_key
        return self._artifacts.read_manifest(key)
