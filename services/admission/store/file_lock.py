"""The lock of an SQLite database: one process uses the file. The lock ends with the process, however that ends."""

import fcntl
import os
import socket
from pathlib import Path

from engine.errors import UnavailableError

_SUFFIX = ".lock"


class FileLock:
    """Locks the file `<database>.lock` by flock, which locks of SQLite itself do not touch."""

    def __init__(self, database: Path) -> None:
        """`database`: all links resolved, so that a database has one lock, whatever it is called."""
        self._database, self._path = database, database.with_name(database.name + _SUFFIX)
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Acquire the lock, also again if its file was deleted. Raises UnavailableError if another process holds it."""
        if self._is_held():
            return
        self.release()
        descriptor = self._open()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "of unknown id"
            os.close(descriptor)
            raise UnavailableError(
                f"{self._database} is in use by another admission, process {holder}: stop it, or choose another "
                "database. Several admissions can share one on PostgreSQL"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise UnavailableError(
                f"{self._path} cannot be locked: {error.strerror}. Put the database on a local disk, or on PostgreSQL"
            ) from error
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _is_held(self) -> bool:
        """Return whether this process has locked the file that other processes would lock now."""
        try:
            return self._descriptor is not None and os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise UnavailableError(f"{self._path} cannot be opened: {error.strerror}") from error
