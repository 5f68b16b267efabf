"""A file that a client is sending: its bytes go to the disk and are compared with the announced size and hash."""

import hashlib
from pathlib import Path

from engine.errors import ChecksumMismatchError
from services.storage.artifact_store import FileEntry, LocalFile
from services.storage.scratch_folder import scratch_errors

_BUFFER_BYTES = 1 << 20


class UploadedFile:
    """`add` keeps a chunk in memory; `write` writes what came since the last `write`, and is called on a thread.

    `label`: what errors call the file.
    """

    def __init__(self, path: Path, size_bytes: int, sha256: str, label: str) -> None:
        self.size_bytes, self._sha256, self._label = size_bytes, sha256.lower(), label
        self._path, self._num_received, self._digest, self._buffer = path, 0, hashlib.sha256(), bytearray()

    def add(self, offset: int, data: bytes) -> bool:
        """Append a chunk; return whether `write` is due. Raises ChecksumMismatchError if the chunk does not follow the
        previous one."""
        if offset != self._num_received:
            raise self._mismatch(f"a chunk has offset {offset}, not {self._num_received}")
        if self._num_received + len(data) > self.size_bytes:
            raise self._mismatch(f"more bytes arrived than the announced {self.size_bytes}")
        self._num_received += len(data)
        self._buffer += data
        return len(self._buffer) >= _BUFFER_BYTES

    def write(self) -> None:
        """Raises UnavailableError if the disk is full."""
        with scratch_errors(), self._path.open("ab") as file:
            file.write(self._buffer)
        self._digest.update(self._buffer)
        self._buffer.clear()

    def finish(self) -> LocalFile:
        """Write the rest; return the file. Raises ChecksumMismatchError unless size and hash are as announced."""
        self.write()
        received = FileEntry(self._digest.hexdigest(), self._num_received)
        if received != FileEntry(self._sha256, self.size_bytes):
            raise self._mismatch(
                f"received {received.size_bytes} bytes with SHA-256 {received.sha256}, announced were "
                f"{self.size_bytes} with {self._sha256}"
            )
        return LocalFile(self._path, received)

    def _mismatch(self, reason: str) -> ChecksumMismatchError:
        return ChecksumMismatchError(f"{self._label}: {reason}. Upload it again.")
