"""Checkpoints and adapters that nobody will read again, so they go. Synchronous, no gRPC.

Only admission deletes them: it alone knows which are recorded. Of an unfinished task's checkpoints the recorded one is
kept, the one before it, and what the current attempt wrote since. An attempt that lost its lease may write at any time;
what it wrote goes at the latest in the next sweep of everything.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from engine.task import TaskState
from muxtune.v1 import task_pb2
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
_UPLOAD_MICROSECONDS = 86_400_000_000  # what has no row after a day gets none any more, though clocks jump


class GarbageCollector:
    """Deletes folders of the artifact store; a key that artifact_layout does not parse is left alone.

    Killed midway, the next sweep goes on. Raises UnavailableError."""

    def __init__(self, database: Database, artifacts: ArtifactStore) -> None:
        self._database, self._artifacts = database, artifacts

    def sweep(self, names: Iterable[str]) -> int:
        """Deletes what these tasks need no more; returns the number of folders deleted."""
        return sum(self._sweep_task(name, self._folders(name)) for name in names)

    def sweep_all(self) -> int:
        """As `sweep`, for every task that has files, and for uploads that were cut short or deleted."""
        by_task: defaultdict[str, set[TaskFolder]] = defaultdict(set)
        uploads: set[UploadedAdapterFolder] = set()
        for key in self._artifacts.list(ROOT):
            folder = parse_folder(key)
            if isinstance(folder, TaskFolder):
                by_task[folder.task].add(folder)
            elif folder is not None and folder.created_microseconds < now() - _UPLOAD_MICROSECONDS:
                uploads.add(folder)
        return sum(self._sweep_task(name, folders) for name, folders in by_task.items()) + self._sweep_uploads(uploads)

    def _sweep_uploads(self, uploads: set[UploadedAdapterFolder]) -> int:
        with self._database.read() as connection:
            recorded = set(map(UploadedAdapterFolder.parse, connection.scalars(sa.select(adapters.c.manifest_key))))
        return self._delete(uploads - recorded)

    def _folders(self, task: str) -> set[TaskFolder]:
        keys = self._artifacts.list(checkpoints_of(task)) + self._artifacts.list(adapter_of_task(task))
        folders = {CheckpointFolder.parse(key) or TrainedAdapterFolder.parse(key) for key in keys}
        return {folder for folder in folders if folder is not None}

    def _sweep_task(self, name: str, folders: set[TaskFolder]) -> int:
        # Read after the folders were listed: an attempt that began since then has none among them.
        with self._database.read() as connection:
            row = connection.execute(sa.select(tasks).where(tasks.c.name == name)).one_or_none()
            query = sa.select(adapters.c.manifest_key).where(adapters.c.name == adapter_of_task(name))
            adapter_key = connection.execute(query).scalar_one_or_none() or ""
        if row is None:
            return 0
        checkpoints = {folder for folder in folders if isinstance(folder, CheckpointFolder)}
        trained = {folder for folder in folders if isinstance(folder, TrainedAdapterFolder)}
        return self._delete(_idle_checkpoints(row, checkpoints) | _idle_adapters(row, trained, adapter_key))

    def _delete(self, folders: Iterable[Folder]) -> int:
        keys = sorted(folder.key for folder in folders)
        for key in keys:
            self._artifacts.delete_folder(key)
        return len(keys)


def _idle_checkpoints(row: Any, folders: set[CheckpointFolder]) -> set[CheckpointFolder]:
    if TaskState[row.state].is_final:
        return folders
    recorded = task_pb2.CheckpointCommitted.FromString(row.checkpoint or b"")
    earlier = sorted(folder for folder in folders if row.checkpoint and folder.step < recorded.step)
    kept = {CheckpointFolder.parse(recorded.manifest_key), *earlier[-1:]}  # the last: if the recorded cannot be read
    return {folder for folder in folders - kept if folder in earlier or folder.attempt < row.attempt}


def _idle_adapters(row: Any, folders: set[TrainedAdapterFolder], manifest_key: str) -> set[TrainedAdapterFolder]:
    """Adapters that were exported while their task trained are not deleted."""
    is_final = TaskState[row.state].is_final
    others = {folder for folder in folders if folder.step is None} - {TrainedAdapterFolder.parse(manifest_key)}
    return {folder for folder in others if is_final or folder.attempt < row.attempt}
