"""The data folder of a local mesh: only its owner reads what is in it, and its logs are bounded."""

import os
import shutil
import stat
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import IO

PRIVATE_UMASK = 0o077  # of the services
_CONTENTS = ("artifacts", "backbones", "certs", "logs", "traces", "lock", "mesh.json")
_DATABASE = "admission.db*"
_MAX_LOG_BYTES, _NUM_LOG_FILES = 16 << 20, 4


def make_private(data: Path) -> None:
    """Create the folder if there is none. Close to other users what a mesh has in it, also from earlier versions.

    A folder that exists keeps its own mode: it may hold other things. Raises OSError, also if all users may write to
    it, and so could replace what is in it.
    """
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    if data.stat().st_mode & stat.S_IWOTH:
        raise PermissionError(f"{data} can be written by every user of this machine: chmod o-w {data}")
    for path in (*(data / name for name in _CONTENTS), *data.glob(_DATABASE)):
        if path.exists():
            path.chmod(0o700 if path.is_dir() else 0o600)


def open_log(path: Path) -> IO[bytes]:
    """Open a log to append to it; create it for its owner only."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600))


def rotate_logs(logs: Path) -> None:
    """Move what is in logs of more than 16 MiB to NAME.log.1; older parts become .2 and .3, and the oldest is deleted.

    The log is copied and truncated, because services and their children hold it open. A line that is written between
    both is lost. A log that cannot be copied, to a full disk, stays as it is until a later call.
    """
    for log in logs.glob("*.log"):
        with suppress(OSError):
            if log.stat().st_size > _MAX_LOG_BYTES:
                _rotate(log)


def _rotate(log: Path) -> None:
    copied, *parts = [log.with_name(f"{log.name}.{part}") for part in ("partial", *range(1, _NUM_LOG_FILES))]
    copied.unlink(missing_ok=True)
    with log.open("rb+") as source, open_log(copied) as copy:
        shutil.copyfileobj(source, copy)
        copy.flush()
        for younger, older in reversed(list(pairwise(parts))):
            if younger.exists():
                younger.replace(older)
        copied.replace(parts[0])
        source.truncate(0)
