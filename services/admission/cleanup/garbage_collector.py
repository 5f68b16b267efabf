"""Deletes checkpoints and adapters that nothing will read again. Synchronous, no gRPC.

Only admission deletes them, because its database says which are recorded. An unfinished task keeps the recorded
checkpoint, the one before it, and what the current attempt has written since. An attempt that lost its lease may still
write; the next collection of everything deletes what it wrote.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from engine.task import TaskState
from muxtune.v1 import event_pb2
from services.admission.store.clock import now
from services.admission.store.database import Database
from services.admission.store.tables import adapters, tasks
from services.resource_names import adapter_of_task
from services.storage.artifact_layout import (
    ROOT,
    CheckpointFolder,
    Folder,
    TrainedAdapterFolder,
    UploadedAdapterFolder,
    checkpoints_of,
    parse_folder,
)
from services.storage.artifact_store import ArtifactStore

TaskFolder = CheckpointFolder | TrainedAdapterFolder
_UPLOAD_MICROSECONDS = 86_400_000_000  # a day: an upload without a row is dead by then, even if clocks jump


class GarbageCollector:
    """Deletes folders of the artifact store; leaves keys alone that artifact_layout does not parse.

    A collection that is killed midway is completed by the next one. Methods raise UnavailableError.
    """

    def __init__(self, database: Database, artifacts: ArtifactStore) -> None:
        self._database, self._artifacts = database, artifacts

    def collect(self, names: Iterable[str]) -> int:
        """Delete what these tasks no longer need; return the number of deleted folders."""
        return sum(self._collect_task(name, self._list_folders(name)) for name in names)

    def collect_all(self) -> int:
        """Collect every task that has files, and uploads that were cut short or deleted."""
        by_task: defaultdict[str, set[TaskFolder]] = defaultdict(set)
        uploads: set[UploadedAdapterFolder] = set()
        for key in self._artifacts.list(ROOT):
            folder = parse_folder(key)
            if isinstance(folder, TaskFolder):
                by_task[folder.task].add(folder)
            elif folder is not None and folder.created_microseconds < now() - _UPLOAD_MICROSECONDS:
                uploads.add(folder)
        num_deleted = sum(self._collect_task(name, folders) for name, folders in by_task.items())
        return num_deleted + self._collect_uploads(uploads)

    def _collect_uploads(self, uploads: set[UploadedAdapterFolder]) -> int:
        with self._database.read() as connection:
            recorded = set(map(UploadedAdapterFolder.parse, connection.scalars(sa.select(adapters.c.manifest_key))))
        return self._delete(uploads - recorded)

    def _list_folders(self, task: str) -> set[TaskFolder]:
        keys = self._artifacts.list(checkpoints_of(task)) + self._artifacts.list(adapter_of_task(task))
        folders = {CheckpointFolder.parse(key) or TrainedAdapterFolder.parse(key) for key in keys}
        return {folder for folder in folders if folder is not None}

    def _collect_task(self, name: str, folders: set[TaskFolder]) -> int:
        # Read the row after listing the folders, so that no listed folder belongs to a later attempt.
        with self._database.read() as connection:
            row = connection.execute(sa.select(tasks).where(tasks.c.name == name)).one_or_none()
            query = sa.select(adapters.c.manifest_key).where(adapters.c.name == adapter_of_task(name))
            adapter_key = connection.execute(query).scalar_one_or_none() or ""
        if row is None:
            return 0
        checkpoints = {folder for folder in folders if isinstance(folder, CheckpointFolder)}
        trained = {folder for folder in folders if isinstance(folder, TrainedAdapterFolder)}
        return self._delete(_unneeded_checkpoints(row, checkpoints) | _unneeded_adapters(row, trained, adapter_key))

    def _delete(self, folders: Iterable[Folder]) -> int:
        keys = sorted(folder.key for folder in folders)
        for key in keys:
            self._artifacts.delete_folder(key)
        return len(keys)


def _unneeded_checkpoints(row: Any, folders: set[CheckpointFolder]) -> set[CheckpointFolder]:
    if TaskState[row.state].is_final:
        return folders
    recorded = event_pb2.CheckpointCommitted.FromString(row.checkpoint or b"")
    earlier = sorted(folder for folder in folders if row.checkpoint and folder.step < recorded.step)
    # The one before it, too, because the recorded one may be corrupt.
    needed = {CheckpointFolder.parse(recorded.manifest_key), *earlier[-1:]}
    return {folder for folder in folders - needed if folder in earlier or folder.attempt < row.attempt}


def _unneeded_adapters(row: Any, folders: set[TrainedAdapterFolder], manifest_key: str) -> set[TrainedAdapterFolder]:
    """Return the adapters of attempts that ended; adapters exported during training remain."""
    is_final = TaskState[row.state].is_final
    others = {folder for folder in folders if folder.step is None} - {TrainedAdapterFolder.parse(manifest_key)}
    return {folder for folder in others if is_final or folder.attempt < row.attempt}
