"""Locks of a data folder, by flock: they end with the processes that hold them, however these end."""

import fcntl
import os
import time
from pathlib import Path
from typing import IO

from muxtune.local.errors import MeshError

LOCK, SERVICES_LOCK = "lock", "services.lock"
_WAIT_SECONDS, _POLL_SECONDS = 75.0, 0.1  # services stop within 60 s of their parent's end


class FolderLock:
    """Locks of one mesh on its data folder.

    `lock` is held by the process that runs the mesh; `services.lock` also by its services, which inherit the
    descriptor `for_services`. A mesh that starts after an earlier one was killed waits until those have ended, too.
    """

    def __init__(self, data: Path) -> None:
        """Acquire both. Raises MeshError if another mesh runs on the folder, or services of one do not end."""
        self._lock, self._services = _open(data / LOCK), _open(data / SERVICES_LOCK)
        try:
            if not _try_lock(self._lock):
                holder = self._lock.read().strip() or "unknown"
                raise MeshError(
                    f"{data} is in use by another mesh, process {holder}: stop it, or choose another --data"
                )
            _write(self._lock, str(os.getpid()))
            self._await_services(data)
            _write(self._services, "")
        except BaseException:
            self.close()
            raise

    @property
    def for_services(self) -> int:
        return self._services.fileno()

    def record_service(self, service: str, process: int) -> None:
        """Write down which process inherited the lock, for the error of a later start."""
        self._services.write(f"{service} {process}\n")
        self._services.flush()

    def close(self) -> None:
        """Release the locks. Services that still run keep theirs."""
        self._services.close()
        self._lock.close()

    def _await_services(self, data: Path) -> None:
        deadline = time.monotonic() + _WAIT_SECONDS
        while not _try_lock(self._services):
            if time.monotonic() > deadline:
                self._services.seek(0)
                started = ", ".join(self._services.read().splitlines()) or "unknown"
                raise MeshError(
                    f"Services of an earlier mesh on {data} still run. It started the processes {started}: "
                    "end those that are left, or choose another --data"
                )
            time.sleep(_POLL_SECONDS)


def _open(path: Path) -> IO[str]:
    path.touch(mode=0o600)
    file = path.open("a+")
    file.seek(0)
    return file


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(file: IO[str], text: str) -> None:
    """Replace what is in the file."""
    file.truncate(0)
    file.write(text)
    file.flush()
