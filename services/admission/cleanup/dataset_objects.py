"""Bytes of datasets in the artifact store, by tenant and SHA-256; they remain while a row refers to them.

An upload must not rely on bytes that a deletion or the garbage collector is about to remove. In this process an upload
holds them from the moment in which all bytes have arrived until their row is written, and no removal waits for it: it
leaves the bytes to the upload. Between processes a removal locks their key exclusively in the database; an upload locks
it shared in the transaction that writes its row, and checks there that the bytes exist.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

import sqlalchemy as sa

from engine.errors import MuxtuneError, UnavailableError
from muxtune.v1 import alignment_pb2, alignment_pb2_grpc
from services.admission.store import datasets_and_adapters
from services.admission.store.database import Database
from services.admission.threads import AdmissionThreads
from services.storage.artifact_layout import ROOT, DatasetObject
from services.storage.artifact_store import ArtifactStore

_REMOVE_SECONDS = 5.0  # less than the database's limit of idle transactions
_log = logging.getLogger(__name__)


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
        self._removing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.num_holds = Counter[str]()

    @asynccontextmanager
    async def hold(self, tenant: str, sha256: str) -> "AsyncIterator[ObjectHold]":
        """Yield a hold of the bytes, which lasts from its `start` to the end of the block. If the block raises, the
        bytes are removed unless a dataset refers to them."""
        hold = ObjectHold(self.num_holds, f"{tenant} {sha256}", self._removal_lock(tenant, sha256))
        try:
            yield hold
        except BaseException:
            if hold.end():
                await asyncio.shield(asyncio.create_task(self._remove_or_log(tenant, sha256)))
            raise
        finally:
            hold.end()

    def check_stored(self, connection: sa.Connection, tenant: str, sha256: str) -> None:
        """Check, in the transaction that writes the row, that the bytes exist and will remain. Raises UnavailableError
        if another process removes them."""
        if not self._database.is_shared:
            return  # the hold suffices
        key = DatasetObject(tenant, sha256).key
        if not self._database.try_lock_shared(connection, key) or not self._artifacts.exists(key):
            raise UnavailableError("the last dataset with these bytes was deleted during the upload: upload again")

    async def remove_unreferenced(self, tenant: str, sha256: str) -> None:
        """Remove the bytes unless a dataset refers to them or an upload holds them. Raises UnavailableError."""
        async with self._removal_lock(tenant, sha256):
            if not self.num_holds[f"{tenant} {sha256}"]:
                loop = asyncio.get_running_loop()
                await self._threads.removals.run(tenant, self._remove_unreferenced, tenant, sha256, loop)

    async def remove_all_unreferenced(self) -> None:
        """Remove all bytes that no dataset refers to, after uploads or deletions that were cut short.

        Raises UnavailableError at the end if some could not be removed; they do not keep the others from it.
        """
        datasets = await self._threads.cleanup.run(self._list_unreferenced)
        errors = [error for dataset in datasets if (error := await self._remove_or_log(dataset.tenant, dataset.sha256))]
        if errors:
            raise UnavailableError(f"{len(errors)} of {len(datasets)} datasets not removed; the first: {errors[0]}")

    async def _remove_or_log(self, tenant: str, sha256: str) -> Exception | None:
        """Call `remove_unreferenced`. Return its error, which is logged."""
        try:
            await self.remove_unreferenced(tenant, sha256)
        except MuxtuneError as error:
            _log.warning("bytes %s of %s not removed yet: %s", sha256, tenant, error)
            return error
        except Exception as error:
            _log.exception("bytes %s of %s not removed", sha256, tenant)
            return error
        return None

    def _removal_lock(self, tenant: str, sha256: str) -> asyncio.Lock:
        return self._removing.setdefault(f"{tenant} {sha256}", asyncio.Lock())

    def _list_unreferenced(self) -> list[DatasetObject]:
        # List the rows after the bytes: most bytes that are listed have their row by then.
        stored = list(filter(None, map(DatasetObject.parse, self._artifacts.list(ROOT))))
        with self._database.read() as connection:
            referenced = datasets_and_adapters.list_referenced(connection)
        return [dataset for dataset in stored if (dataset.tenant, dataset.sha256) not in referenced]

    def _remove_unreferenced(self, tenant: str, sha256: str, loop: asyncio.AbstractEventLoop) -> None:
        with self._database.lock_exclusively(DatasetObject(tenant, sha256).key) as connection:
            if not datasets_and_adapters.is_referenced(connection, tenant, sha256):
                asyncio.run_coroutine_threadsafe(self._remove(tenant, sha256), loop).result()

    async def _remove(self, tenant: str, sha256: str) -> None:
        request = alignment_pb2.RemoveDatasetRequest(tenant=tenant, sha256=sha256)
        await self._alignment.RemoveDataset(request, timeout=_REMOVE_SECONDS)


class ObjectHold:
    """Keeps removals of this process away from the bytes of one upload."""

    def __init__(self, num_holds: Counter[str], key: str, removing: asyncio.Lock) -> None:
        self._num_holds, self._key, self._removing = num_holds, key, removing
        self._is_held = self._has_ended = False

    async def start(self) -> None:
        """Begin to hold, after a removal that is in progress. Does nothing if the upload has ended meanwhile."""
        async with self._removing:
            if not self._has_ended:
                self._num_holds[self._key] += 1
                self._is_held = True

    def end(self) -> bool:
        """End the hold, if it has not ended before. Return whether it ended now."""
        was_held, self._is_held, self._has_ended = self._is_held, False, True
        if was_held:
            self._num_holds[self._key] -= 1
            if not self._num_holds[self._key]:
                del self._num_holds[self._key]
        return was_held
