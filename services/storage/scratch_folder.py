"""Temporary files of a service: each process has a folder of its own, and a start removes those of processes that died.

    {root}/{service}/                  locked (flock) while a process looks for dead ones and makes its own folder
    {root}/{service}/process-{nonce}/  locked as long as its process lives, however that ends

All temporary files are there, readable by their owner only, so that none is left after a kill.
"""

import asyncio
import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from engine.errors import UnavailableError
from services.settings import SettingsError

_PREFIX = "process-"


class ScratchFolder:
    """The folder of this process. It is removed when the process ends, or by the next start of the service."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path, self._lock = path, lock
        atexit.register(shutil.rmtree, path, ignore_errors=True)

    @classmethod
    def open(cls, root: Path | None, service: str) -> "ScratchFolder":
        """Remove what dead processes of the service left, and make a folder for this one.

        `root`: by default a folder of this user in the system's folder of temporary files. It must be on a local disk.
        Raises SettingsError if the folder cannot be made or belongs to another user.
        """
        root = root or Path(tempfile.gettempdir()) / f"muxtune-{os.getuid()}"
        folder = root / service
        try:
            for made in (root, folder):
                made.mkdir(mode=0o700, parents=True, exist_ok=True)
                _check_owner(made)
            with _locked(folder):
                for path in folder.glob(f"{_PREFIX}*"):
                    _remove_if_dead(path)
                path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
                return cls(path, _lock(path, fcntl.LOCK_EX))
        except OSError as error:
            raise SettingsError(f"MUXTUNE_SCRATCH: {folder} cannot be used: {error.strerror}.") from error

    @contextmanager
    def new_folder(self) -> Iterator[Path]:
        """Make a folder in this one; remove it with its contents at the end. Raises UnavailableError."""
        with scratch_errors():
            path = Path(tempfile.mkdtemp(dir=self.path))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @asynccontextmanager
    async def new_folder_of_call(self, run: Callable[..., Awaitable[None]]) -> AsyncIterator[Path]:
        """Do as `new_folder`, for an RPC: `run` runs the removal, which may take long, on a thread."""
        with scratch_errors():
            path = Path(tempfile.mkdtemp(dir=self.path))
        try:
            yield path
        finally:
            await asyncio.shield(asyncio.ensure_future(run(shutil.rmtree, path, True)))


@contextmanager
def scratch_errors() -> Iterator[None]:
    """Raise UnavailableError for OSError."""
    try:
        yield
    except OSError as error:
        raise UnavailableError(f"The service cannot use its folder of temporary files: {error.strerror}.") from error


def _check_owner(folder: Path) -> None:
    """Raise SettingsError for a folder of another user, who could read or replace its files."""
    if folder.stat().st_uid not in (os.getuid(), 0):
        raise SettingsError(f"MUXTUNE_SCRATCH: {folder} belongs to another user. Set another folder.")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    number = _lock(folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(number)


def _lock(folder: Path, operation: int) -> int:
    """Lock a folder until the file descriptor that is returned is closed, at the latest by the process's end."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(number, operation)
    except BaseException:
        os.close(number)
        raise
    return number


def _remove_if_dead(folder: Path) -> None:
    try:
        number = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # its process lives, or it is none of ours
        return
    shutil.rmtree(folder, ignore_errors=True)
    os.close(number)
