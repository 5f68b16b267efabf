"""Temporary files of a process that was killed are removed by the next start, and those of a living one never."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.errors import UnavailableError
from services.settings import SettingsError
from services.storage.scratch_folder import ScratchFolder, scratch_errors

HOLD = """
import os, sys, time
from pathlib import Path
from services.storage.scratch_folder import ScratchFolder
scratch = ScratchFolder.open(Path(sys.argv[1]), sys.argv[2])
with scratch.new_folder() as folder:
    (folder / "rows.jsonl").write_bytes(b"rows of a tenant")
    print(scratch.path, flush=True)
    sys.stdin.read()
"""


@contextmanager
def process(root: Path, service: str = "alignment") -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """Start a process that has a temporary file; yield it and its folder."""
    arguments = [sys.executable, "-c", HOLD, root, service]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        try:
            yield started, Path(started.stdout.readline().decode().strip())
        finally:
            started.kill()


def files(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.rglob("*") if path.is_file()]


def test_a_start_removes_what_killed_processes_left_and_nothing_else(tmp_path: Path) -> None:
    with process(tmp_path) as (living, folder_of_living), process(tmp_path, "admission") as (_, folder_of_other):
        left = []
        for _ in range(2):
            with process(tmp_path) as (killed, folder):
                killed.send_signal(signal.SIGKILL)
                killed.wait()
                left.append(folder)
        assert files(left[-1]) == [b"rows of a tenant"]
        living.send_signal(signal.SIGSTOP)  # it lives, whether it runs or not
        scratch = ScratchFolder.open(tmp_path, "alignment")
        living.send_signal(signal.SIGCONT)
        assert not any(folder.exists() for folder in left)
        for folder in (folder_of_living, folder_of_other):
            assert files(folder) == [b"rows of a tenant"]
        assert {path.parent.name for path in (scratch.path, folder_of_living)} == {"alignment"}
        assert living.stdin is not None
        living.stdin.close()
        assert living.wait() == 0
        assert not folder_of_living.exists(), "a process that ends by itself leaves nothing"


def test_starts_at_once_never_remove_each_others_folders(tmp_path: Path) -> None:
    with process(tmp_path) as one, process(tmp_path) as two, process(tmp_path) as three:
        assert [files(folder) for _, folder in (one, two, three)] == [[b"rows of a tenant"]] * 3


def test_only_the_owner_can_read_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    previous = os.umask(0)
    try:
        scratch = ScratchFolder.open(None, "alignment")
        with scratch.new_folder() as folder:
            made = [path for path in (folder, *folder.parents) if path.is_relative_to(tmp_path) and path != tmp_path]
            assert made[-1] == tmp_path / f"muxtune-{os.getuid()}" and len(made) == 4
            assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o700}
    finally:
        os.umask(previous)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"MUXTUNE_SCRATCH: .*/file"):
        ScratchFolder.open(tmp_path / "file", "alignment")


def test_a_full_disk_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match="No space left"), scratch_errors(), open("/dev/full", "wb") as file:
        file.write(b"x")
