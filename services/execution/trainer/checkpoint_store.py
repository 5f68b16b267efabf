"""Checkpoints and adapters of tasks in the artifact store, committed by their manifest.

services/storage/artifact_layout.py has their keys.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from engine.errors import ArtifactCorruptError, NotFoundError, UnavailableError
from engine.runtime.checkpoint import CheckpointState
from muxtune.v1 import task_pb2
from services.storage.artifact_layout import (
    CheckpointFolder,
    TrainedAdapterFolder,
    checkpoints_of,
    is_manifest,
    manifest_key,
)
from services.storage.artifact_store import ArtifactStore, Manifest

_log = logging.getLogger(__name__)


class CheckpointStore:
    """Synchronous; used by the trainer only, on any of its threads."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def put_checkpoint(
        self, task: str, attempt: int, state: CheckpointState, extra: dict[str, Any]
    ) -> task_pb2.CheckpointCommitted:
        """Commits it. Those before it stay until admission, which knows what is recorded, deletes them."""
        folder = CheckpointFolder(task, state.step, attempt)
        metadata = {**state.metadata, **extra, "attempt": attempt}
        manifest = self._store.commit_folder(folder.key, state.files(), metadata)
        return task_pb2.CheckpointCommitted(step=state.step, manifest_key=manifest.key, size_bytes=manifest.size_bytes)

    def get_checkpoint(
        self, task: str, recorded: task_pb2.CheckpointCommitted
    ) -> tuple[CheckpointState, task_pb2.CheckpointCommitted]:
        """The recorded one; where it is gone or corrupt, the newest before it that reads: its steps are run again. And
        which that was.

        Never one after it, whose steps were not recorded. Raises ArtifactCorruptError, UnavailableError.
        """
        before = [folder for folder in reversed(self._committed(task)) if folder.step < recorded.step]
        for key in [recorded.manifest_key, *(manifest_key(folder.key) for folder in before)]:
            try:
                manifest, files = self._store.read_folder(key)
                state = CheckpointState.from_files(files, dict(manifest.metadata))
                size = manifest.size_bytes
                return state, task_pb2.CheckpointCommitted(step=state.step, manifest_key=key, size_bytes=size)
            except (NotFoundError, ArtifactCorruptError) as error:
                _log.error("checkpoint %s of %s cannot be used: %s", key, task, error)
        raise ArtifactCorruptError(f"no checkpoint of {task} can be read", task=task)

    def put_adapter(self, task: str, attempt: int, step: int, files: dict[str, bytes], is_final: bool) -> Manifest:
        """The PEFT folder, under the adapter's name; one that the task goes on from lies apart."""
        folder = TrainedAdapterFolder(task, attempt, None if is_final else step)
        return self._store.commit_folder(folder.key, files, {"task": task, "step": step})

    def get_adapter(self, manifest_key: str) -> dict[str, bytes]:
        return self._store.read_folder(manifest_key)[1]

    def _committed(self, task: str) -> list[CheckpointFolder]:
        """Return the task's committed checkpoints, oldest step first."""
        keys = filter(is_manifest, self._store.list(checkpoints_of(task)))
        return sorted(filter(None, map(CheckpointFolder.parse, keys)))


@contextmanager
def folder_of(files: Mapping[str, bytes]) -> Iterator[Path]:
    """The files in a temporary folder. What else is written there goes with it. Raises UnavailableError where this disk
    is full."""
    try:
        with tempfile.TemporaryDirectory(prefix="muxtune-adapter-") as folder:
            for name, data in files.items():
                (Path(folder) / name).write_bytes(data)
            yield Path(folder)
    except (OSError, SafetensorError) as error:
        raise UnavailableError(f"no temporary files can be written: {error}") from error
