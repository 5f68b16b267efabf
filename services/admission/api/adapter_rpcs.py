"""RPCs of adapters. protos/muxtune/v1/admission.proto specifies each RPC."""

import io
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine.errors import (
    AlreadyExistsError,
    ArtifactCorruptError,
    IllegalTransitionError,
    InvalidInputError,
    NotFoundError,
    QuotaExceededError,
    RequestIdReusedError,
    UnavailableError,
)
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import artifact_pb2
from services.admission.api import page_tokens
from services.admission.policy.adapter_upload import AdapterUpload, ReceivedAdapter
from services.admission.policy.admission_controller import AdmissionController
from services.admission.store import datasets_and_adapters, idempotency, tables, tasks
from services.admission.store.database import Database
from services.admission.threads import AdmissionThreads
from services.concurrency.byte_budget import ByteBudget
from services.resource_names import ResourceName, adapter_of_task, is_task, new_name, tenant_of
from services.rpc.authentication import current_principal
from services.rpc.authorization import authorize, authorize_parent
from services.storage.artifact_layout import folder_of_manifest
from services.storage.artifact_store import READ_BYTES, ArtifactStore, Manifest
from services.storage.scratch_folder import ScratchFolder

_CHUNK_BYTES = 1 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Upload:
    """An upload in progress. `may_exist`: it may repeat an earlier one, which counts in the quota already."""

    adapter: AdapterUpload
    may_exist: bool


class AdapterRpcs:
    """Methods of AdmissionServicer on adapters."""

    _database: Database
    _artifacts: ArtifactStore
    _controller: AdmissionController
    _max_upload_bytes: int
    _threads: AdmissionThreads
    _scratch: ScratchFolder
    _uploads: ByteBudget

    async def UploadAdapter(self, request_iterator: Any, context: Any) -> pb.UploadAdapterResponse:
        upload, header = None, None
        async with AsyncExitStack() as stack:
            async for request in request_iterator:
                part = request.WhichOneof("part")
                if part == "header" and upload is None:
                    header = request.header
                    tenant = authorize_parent(current_principal(), header.parent)
                    upload = await self._start_upload(tenant, header, stack)
                elif part == "file" and upload is not None:
                    await self._start_file(tenant, upload, request.file, stack)
                elif part == "chunk" and upload is not None:
                    if upload.adapter.add_chunk(request.chunk):
                        await self._threads.transfers.run(tenant, upload.adapter.write)
                else:
                    raise InvalidInputError.of_field(
                        "part", f"{part} is out of order: send the header, then each file's header and its chunks"
                    )
            if header is None or upload is None:
                raise InvalidInputError.of_field("header", "must come first, but nothing was sent")
            received = await self._threads.compute(tenant, upload.adapter.finish)
            return pb.UploadAdapterResponse(adapter=await self._store_adapter(tenant, header, received))

    async def DownloadAdapter(
        self, request: pb.DownloadAdapterRequest, context: Any
    ) -> AsyncIterator[pb.DownloadAdapterResponse]:
        tenant = str(current_principal().tenant)
        run = partial(self._threads.transfers.run, tenant)
        manifest = await self._read_manifest(tenant, request.name)
        for name, entry in sorted(manifest.files.items()):
            try:
                reader = await run(self._artifacts.file_reader, manifest, name)
                file = io.BufferedReader(reader, READ_BYTES)
                yield pb.DownloadAdapterResponse(
                    file=artifact_pb2.FileHeader(file_name=name, size_bytes=entry.size_bytes, sha256=entry.sha256)
                )
                offset = 0
                while data := await run(file.read, _CHUNK_BYTES):
                    yield pb.DownloadAdapterResponse(chunk=artifact_pb2.FileChunk(offset=offset, data=data))
                    offset += len(data)
                await run(reader.check, entry.sha256)
            except (ArtifactCorruptError, NotFoundError):
                await self._read_manifest(tenant, request.name)  # raises if the adapter was deleted meanwhile
                raise

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

    async def _start_upload(self, tenant: str, header: artifact_pb2.UploadHeader, stack: AsyncExitStack) -> "_Upload":
        """Make the folder of an upload, which the stack removes. Raises QuotaExceededError if the quota is full."""
        name = str(ResourceName(tenant, "adapters", header.id))

        def examine() -> tuple[bool, int]:
            with self._database.read() as connection:
                is_repeated = idempotency.has_request(connection, tenant, header.request_id)
                may_exist = is_repeated or datasets_and_adapters.has_adapter(connection, name)
                if not may_exist:
                    self._controller.check_adapter_bytes(connection, tenant, 1)
                return may_exist, self._controller.max_adapter_tensors(connection)

        may_exist, max_tensors = await self._threads.clients.run(tenant, examine)
        run = partial(self._threads.transfers.run, tenant)
        folder = await stack.enter_async_context(self._scratch.new_folder_of_call(run))
        return _Upload(AdapterUpload(folder, self._max_upload_bytes, max_tensors), may_exist)

    async def _start_file(
        self, tenant: str, upload: "_Upload", header: artifact_pb2.FileHeader, stack: AsyncExitStack
    ) -> None:
        """Take the disk space of a file, which the stack gives back, and check it against the quota. Raises
        InvalidInputError, QuotaExceededError or OverloadedError."""
        upload.adapter.start_file(header)
        stack.enter_context(self._uploads.take(tenant, "adapters", header.size_bytes))
        unfinished = self._uploads.taken(tenant, "adapters")
        check = partial(self._controller.check_unfinished, tables.adapters, tenant, unfinished, upload.may_exist)
        await self._threads.clients.run(tenant, check)

    async def _store_adapter(
        self, tenant: str, header: artifact_pb2.UploadHeader, received: ReceivedAdapter
    ) -> artifact_pb2.Adapter:
        digest, files = received.digest, received.files
        body = idempotency.hash_parts(header.id.encode(), digest.encode())
        database, store = self._threads.clients, self._threads.transfers
        existing = await database.run(tenant, self._find_uploaded_adapter, tenant, header.request_id, body)
        name = existing.name if existing is not None else new_name(tenant, "adapters", header.id, "header.id")
        same = existing or await database.run(tenant, self._find_same_adapter, name, digest)
        if same is not None:  # the store may have lost its files
            folder = folder_of_manifest(same.manifest_key)
            await store.run(tenant, self._artifacts.restore_folder, folder, files, {})
            if not await database.run(tenant, self._is_recorded, same.manifest_key):  # it was deleted meanwhile
                await store.run(tenant, self._artifacts.delete_folder, folder)
        if existing is not None:
            return datasets_and_adapters.adapter_to_proto(existing)
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

    def _is_recorded(self, manifest_key: str) -> bool:
        with self._database.read() as connection:
            return datasets_and_adapters.is_recorded(connection, manifest_key)

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
            return datasets_and_adapters.list_page(connection, tables.adapters, tenant, before, limit)

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
                task, name = name, adapter_of_task(authorize(principal, name, "tasks"))
                if not datasets_and_adapters.has_adapter(connection, name):  # it may outlive its task
                    state = tasks.get_row(connection, task).state
                    raise IllegalTransitionError(
                        f"{task} has no adapter: it is {state}, or its adapter was deleted", task=task, state=state
                    )
            row = datasets_and_adapters.get_adapter_row(connection, authorize(principal, name, "adapters"))
            return str(row.manifest_key)
