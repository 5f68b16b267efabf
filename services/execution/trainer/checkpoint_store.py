"""Stores checkpoints and adapters of tasks in the artifact store; writing the manifest commits them.

services/storage/artifact_layout.py has their keys.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from engine.errors import ArtifactCorruptError, NotFoundError, UnavailableError
from engine.runtime.checkpoint import CheckpointState
from muxtune.v1 import event_pb2
from services.storage.artifact_layout import (
    CheckpointFolder,
    TrainedAdapterFolder,
    checkpoints_of,
    is_manifest,
    manifest_key,
)
from services.storage.artifact_store import ArtifactStore, Manifest
from services.storage.scratch_folder import ScratchFolder

_log = logging.getLogger(__name__)


class CheckpointStore:
    """Reads and writes synchronously. Only the trainer uses it, on any of its threads."""

    def __init__(self, store: ArtifactStore, scratch: ScratchFolder) -> None:
        self._store, self._scratch = store, scratch

    def put_checkpoint(
        self, task: str, attempt: int, state: CheckpointState, extra: dict[str, Any]
    ) -> event_pb2.CheckpointCommitted:
        """Commits a checkpoint. Earlier ones stay: admission knows which one is recorded, and deletes the others."""
        folder = CheckpointFolder(task, state.step, attempt)
        metadata = {**state.metadata, **extra, "attempt": attempt}
        manifest = self._store.commit_folder(folder.key, state.files(), metadata)
        return event_pb2.CheckpointCommitted(step=state.step, manifest_key=manifest.key, size_bytes=manifest.size_bytes)

    def get_checkpoint(
        self, task: str, recorded: event_pb2.CheckpointCommitted
    ) -> tuple[CheckpointState, event_pb2.CheckpointCommitted]:
        """Returns the recorded checkpoint, or the newest readable one before it, and which one that is.

        A later checkpoint is never used: its steps were not recorded. Raises ArtifactCorruptError, UnavailableError.
        """
        earlier = [folder for folder in reversed(self._committed(task)) if folder.step < recorded.step]
        for key in [recorded.manifest_key, *(manifest_key(folder.key) for folder in earlier)]:
            try:
                manifest, files = self._store.read_folder(key)
                state = CheckpointState.from_files(files, dict(manifest.metadata))
                size = manifest.size_bytes
                return state, event_pb2.CheckpointCommitted(step=state.step, manifest_key=key, size_bytes=size)
            except (NotFoundError, ArtifactCorruptError) as error:
                _log.error("Checkpoint %s of %s cannot be used: %s", key, task, error)
        raise ArtifactCorruptError(f"no checkpoint of {task} can be read", task=task)

    def put_adapter(self, task: str, attempt: int, step: int, files: dict[str, bytes], is_final: bool) -> Manifest:
        """Commits the adapter's files. An adapter that is not final gets a key of its own: the task goes on."""
        folder = TrainedAdapterFolder(task, attempt, None if is_final else step)
        return self._store.commit_folder(folder.key, files, {"task": task, "step": step})

    def get_adapter(self, manifest_key: str) -> dict[str, bytes]:
        return self._store.read_folder(manifest_key)[1]

    @contextmanager
    def folder_of(self, files: Mapping[str, bytes]) -> Iterator[Path]:
        """Writes the files into a temporary folder, which is removed with all its content at the end.

        Raises UnavailableError if the disk is full.
        """
        try:
            with self._scratch.new_folder() as folder:
                for name, data in files.items():
                    (folder / name).write_bytes(data)
                yield folder
        except (OSError, SafetensorError) as error:
            raise UnavailableError(f"the executor cannot write temporary files: {error}") from error

    def _committed(self, task: str) -> list[CheckpointFolder]:
        """Returns the task's committed checkpoints, oldest step first."""
        keys = filter(is_manifest, self._store.list(checkpoints_of(task)))
        return sorted(filter(None, map(CheckpointFolder.parse, keys)))
