"""Checkpoints and adapters that nobody will read again, so they go. Synchronous, no gRPC.

Only admission deletes them: it alone knows which are recorded. Of an unfinished task's checkpoints the recorded one is
kept, the one before it, and what the current attempt wrote since. An attempt that lost its lease may write at any time;
what it wrote goes at the latest in the next sweep of everything.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from engine.task import TaskState
from muxtune.v1 import task_pb2
from services.admission.store.clock import now
from services.admission.store.database import Database
from services.admission.store.tables import adapters, tasks
from services.storage.artifact_store import ArtifactStore

_CHECKPOINT = re.compile(r"(tenants/[^/]+)/tasks/([^/]+)/checkpoints/(\d+)-(\d+)(?=/|$)")
_ADAPTER = re.compile(r"(tenants/[^/]+)/adapters/([^/]+)/(\d+)(?=/|$)")  # one that a task left, by its attempt
_UPLOAD = re.compile(r"tenants/[^/]+/adapters/[^/]+/uploaded-[0-9a-f]{16}(?:-(\d+)-[0-9a-f]{8})?(?=/|$)")
_UPLOAD_MICROSECONDS = 86_400_000_000  # what has no row after a day gets none any more, though clocks jump


class GarbageCollector:
    """Killed midway, the next sweep goes on. Raises UnavailableError."""

    def __init__(self, database: Database, artifacts: ArtifactStore) -> None:
        self._database, self._artifacts = database, artifacts

    def sweep(self, names: Iterable[str]) -> int:
        """Of these tasks; how many folders went."""
        return sum(self._sweep_task(name, self._folders(name)) for name in names)

    def sweep_all(self) -> int:
        """Of every task that has files, and of adapters whose upload was cut short, or their deletion."""
        by_task: defaultdict[str, set[str]] = defaultdict(set)
        uploads: set[str] = set()
        for key in self._artifacts.list("tenants"):
            if found := _CHECKPOINT.match(key) or _ADAPTER.match(key):
                by_task[f"{found[1]}/tasks/{found[2]}"].add(found[0])
            elif (found := _UPLOAD.match(key)) and int(found[1] or 0) < now() - _UPLOAD_MICROSECONDS:
                uploads.add(found[0])
        return sum(self._sweep_task(name, folders) for name, folders in by_task.items()) + self._sweep_uploads(uploads)

    def _sweep_uploads(self, folders: set[str]) -> int:
        with self._database.read() as connection:
            recorded = {key.rpartition("/")[0] for key in connection.scalars(sa.select(adapters.c.manifest_key))}
        for folder in sorted(folders - recorded):
            self._artifacts.delete_folder(folder)
        return len(folders - recorded)

    def _folders(self, name: str) -> set[str]:
        keys = self._artifacts.list(f"{name}/checkpoints") + self._artifacts.list(_adapter_of(name))
        return {found[0] for key in keys if (found := _CHECKPOINT.match(key) or _ADAPTER.match(key))}

    def _sweep_task(self, name: str, folders: set[str]) -> int:
        # Read after the folders were listed: an attempt that began since then has none among them.
        with self._database.read() as connection:
            row = connection.execute(sa.select(tasks).where(tasks.c.name == name)).one_or_none()
            query = sa.select(adapters.c.manifest_key).where(adapters.c.name == _adapter_of(name))
            adapter_key = connection.execute(query).scalar_one_or_none() or ""
        if row is None:
            return 0
        checkpoints = {folder for folder in folders if _CHECKPOINT.fullmatch(folder)}
        done = _idle_checkpoints(row, checkpoints) | _idle_adapters(row, folders - checkpoints, adapter_key)
        for folder in sorted(done):
            self._artifacts.delete_folder(folder)
        return len(done)


def _idle_checkpoints(row: Any, folders: set[str]) -> set[str]:
    if TaskState[row.state].is_final:
        return folders
    recorded = task_pb2.CheckpointCommitted.FromString(row.checkpoint or b"")
    kept = {recorded.manifest_key.rpartition("/")[0]}
    earlier = sorted(folder for folder in folders if row.checkpoint and _step(folder) < recorded.step)
    kept |= set(earlier[-1:])  # where the recorded one cannot be read
    return {folder for folder in folders - kept if folder in earlier or _attempt(folder) < row.attempt}


def _idle_adapters(row: Any, folders: set[str], manifest_key: str) -> set[str]:
    is_final = TaskState[row.state].is_final
    others = folders - {manifest_key.rpartition("/")[0]}
    return {folder for folder in others if is_final or _attempt(folder) < row.attempt}


def _step(folder: str) -> int:
    return int(folder.rpartition("/")[2].partition("-")[0])


def _attempt(folder: str) -> int:
    return int(folder.rpartition("/")[2].rpartition("-")[2])


def _adapter_of(task: str) -> str:
    return task.replace("/tasks/", "/adapters/")
