"""The bytes of datasets, in the artifact store by (tenant, SHA-256): there as long as a row of the database holds them.

An upload must not find bytes that a deletion or a sweep is about to remove, here or in another process. So who removes
them is alone with them in the database; who writes a row makes sure, in the same transaction, that nobody is and that
they are there.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakValueDictionary

import sqlalchemy as sa

from engine.errors import UnavailableError
from muxtune.v1 import alignment_pb2, alignment_pb2_grpc
from services.admission.store import datasets_and_adapters
from services.admission.store.database import Database
from services.storage.artifact_layout import ROOT, DatasetObject
from services.storage.artifact_store import ArtifactStore

_REMOVE_SECONDS = 5.0  # less than the database lets a transaction be silent


class DatasetObjects:
    """Alignment writes and removes them; admission says when."""

    def __init__(
        self,
        database: Database,
        artifacts: ArtifactStore,
        alignment: "alignment_pb2_grpc.AlignmentServiceAsyncStub",
    ) -> None:
        self._database, self._artifacts, self._alignment = database, artifacts, alignment
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # Threads of its own: they wait for alignment, and no other call may wait for them.
        self._removals = ThreadPoolExecutor(4, "removal")

    def lock(self, tenant: str, sha256: str) -> asyncio.Lock:
        """Held in this process while bytes are stored and their row is written, or the other way round."""
        return self._locks.setdefault(f"{tenant} {sha256}", asyncio.Lock())

    def check_kept(self, connection: sa.Connection, tenant: str, sha256: str) -> None:
        """In the transaction that writes their row. Raises UnavailableError where another process removes them."""
        if not self._database.is_shared:
            return  # their lock is enough
        key = DatasetObject(tenant, sha256).key
        if not self._database.try_lock_shared(connection, key) or not self._artifacts.exists(key):
            raise UnavailableError("these bytes were removed just now, with the last dataset that had them: send again")

    async def remove_unreferenced(self, tenant: str, sha256: str) -> None:
        """If no dataset holds them. Call with their lock held. Raises UnavailableError."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._removals, self._remove_unreferenced, tenant, sha256, loop)

    async def sweep(self) -> None:
        """Removes what no dataset holds: an upload or a deletion was cut short. Raises UnavailableError."""
        keys = await asyncio.to_thread(self._artifacts.list, ROOT)
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
