"""Deletes checkpoints and adapters that nothing will read again. Synchronous, no gRPC.

Only admission deletes them, because its database says which are recorded. An unfinished task keeps the recorded
checkpoint, the one before it, and what the current attempt has written since. An attempt that lost its lease may still
write: tasks that did not simply succeed are collected again a minute after their end, and everything every hour.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any

import sqlalchemy as sa

from engine.errors import UnavailableError
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
_log = logging.getLogger(__name__)
_UPLOAD_MICROSECONDS = 86_400_000_000  # a day: an upload without a row is dead by then, even if clocks jump


class GarbageCollector:
    """Deletes folders of the artifact store; leaves keys alone that artifact_layout does not parse.

    A collection that is killed midway is completed by the next one. A folder that cannot be deleted is logged, and the
    others are deleted.
    """

    def __init__(self, database: Database, artifacts: ArtifactStore) -> None:
        self._database, self._artifacts = database, artifacts

    def collect(self, names: Iterable[str]) -> list[str]:
        """Delete what these tasks no longer need. Return the tasks that are to be collected again, because the store or
        the database was away."""
        failed = []
        for name in names:
            try:
                self._collect_task(name, self._list_folders(name))
            except UnavailableError as error:
                _log.warning("files of %s not deleted, will be retried: %s", name, error)
                failed.append(name)
            except Exception:
                _log.exception("files of %s not deleted", name)
        return failed

    def list_ended(self, since: int, until: int) -> list[str]:
        """Return the tasks that ended in this time (microseconds) while an executor may still have been writing a
        checkpoint: all but those that succeeded in their first attempt."""
        ended = (tasks.c.ended > since) & (tasks.c.ended <= until)
        is_suspect = (tasks.c.state != TaskState.SUCCEEDED.name) | (tasks.c.attempt > 1)
        with self._database.read() as connection:
            return list(connection.scalars(sa.select(tasks.c.name).where(ended & is_suspect)))

    def collect_all(self) -> int:
        """Collect every task that has files, and uploads that were cut short or deleted. Return the number of deleted
        folders. Raises UnavailableError at the end if some are to be collected again."""
        by_task: defaultdict[str, set[TaskFolder]] = defaultdict(set)
        uploads: set[UploadedAdapterFolder] = set()
        for key in self._artifacts.list(ROOT):
            folder = parse_folder(key)
            if isinstance(folder, TaskFolder):
                by_task[folder.task].add(folder)
            elif folder is not None and folder.created_microseconds < now() - _UPLOAD_MICROSECONDS:
                uploads.add(folder)
        self._artifacts.remove_partial_writes(_UPLOAD_MICROSECONDS / 1e6)
        num_deleted, errors = 0, list[UnavailableError]()
        parts = [partial(self._collect_task, *item) for item in by_task.items()]
        for collect in (partial(self._collect_uploads, uploads), *parts):
            try:
                num_deleted += collect()
            except UnavailableError as error:
                errors.append(error)
            except Exception:
                _log.exception("garbage collection failed in part")
        if errors:
            raise errors[0]
        return num_deleted

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
        """Delete the folders and return the number of deleted ones. Raises UnavailableError at the end if the store was
        away for some; another error is a fault of ours that a repetition would meet again, and is only logged."""
        errors, num_deleted = list[UnavailableError](), 0
        for key in sorted(folder.key for folder in folders):
            try:
                self._artifacts.delete_folder(key)
                num_deleted += 1
            except UnavailableError as error:
                errors.append(error)
            except Exception:
                _log.exception("%s not deleted", key)
        if errors:
            raise errors[0]
        return num_deleted


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
