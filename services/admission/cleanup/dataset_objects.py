"""Bytes of datasets in the artifact store, by tenant and SHA-256; they remain while a row refers to them.

An upload must not rely on bytes that a deletion or the garbage collector is about to remove, in this process or in
another. A removal therefore locks their key exclusively in the database; an upload locks it shared in the transaction
that writes its row, and checks there that the bytes exist.
"""

import asyncio
from weakref import WeakValueDictionary

import sqlalchemy as sa

from engine.errors import UnavailableError
from muxtune.v1 import alignment_pb2, alignment_pb2_grpc
from services.admission.store import datasets_and_adapters
from services.admission.store.database import Database
from services.admission.threads import AdmissionThreads
from services.storage.artifact_layout import ROOT, DatasetObject
from services.storage.artifact_store import ArtifactStore

_REMOVE_SECONDS = 5.0  # less than the database's limit of idle transactions


class DatasetObjects:
    """Decides when alignment removes bytes; alignment writes and removes them."""

    def __init__(
        self,
        database: Database,
        artifacts: ArtifactStore,
        alignment: "alignment_pb2_grpc.AlignmentServiceAsyncStub",
        threads: AdmissionThreads,
    ) -> None:
        self._database, self._artifacts, self._alignment, self._threads = database, artifacts, alignment, threads
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def lock(self, tenant: str, sha256: str) -> asyncio.Lock:
        """Return the lock that this process holds while it stores bytes and writes their row, or deletes both."""
        return self._locks.setdefault(f"{tenant} {sha256}", asyncio.Lock())

    def check_stored(self, connection: sa.Connection, tenant: str, sha256: str) -> None:
        """Check, in the transaction that writes the row, that the bytes exist and will remain. Raises UnavailableError
        if another process removes them."""
        if not self._database.is_shared:
            return  # the lock of this process suffices
        key = DatasetObject(tenant, sha256).key
        if not self._database.try_lock_shared(connection, key) or not self._artifacts.exists(key):
            raise UnavailableError("the last dataset with these bytes was deleted during the upload: upload again")

    async def remove_unreferenced(self, tenant: str, sha256: str) -> None:
        """Remove the bytes unless a dataset refers to them. The caller holds `lock`. Raises UnavailableError."""
        loop = asyncio.get_running_loop()
        await self._threads.removals.run(tenant, self._remove_unreferenced, tenant, sha256, loop)

    async def remove_all_unreferenced(self) -> None:
        """Remove all bytes that no dataset refers to, after uploads or deletions that were cut short. Raises
        UnavailableError."""
        keys = await self._threads.cleanup.run(self._artifacts.list, ROOT)
        for dataset in filter(None, map(DatasetObject.parse, keys)):
            async with self.lock(dataset.tenant, dataset.sha256):
                await self.remove_unreferenced(dataset.tenant, dataset.sha256)

    def _remove_unreferenced(self, tenant: str, sha256: str, loop: asyncio.AbstractEventLoop) -> None:
        with self._database.lock_exclusively(DatasetObject(tenant, sha256).key) as connection:
            if not datasets_and_adapters.is_referenced(connection, tenant, sha256):
                asyncio.run_coroutine_threadsafe(self._remove(tenant, sha256), loop).result()

    async def _remove(self, tenant: str, sha256: str) -> None:
        request = alignment_pb2.RemoveDatasetRequest(tenant=tenant, sha256=sha256)
        await self._alignment.RemoveDataset(request, timeout=_REMOVE_SECONDS)
