"""The data folder of `muxtune up` is closed to other users, and its logs are bounded however much services write."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from muxtune.local import data_folder
from muxtune.local.data_folder import make_private, open_log, rotate_logs


def open_to_others(folder: Path) -> set[str]:
    """Return what other users can reach in the folder: they cannot pass a folder that they may not search."""
    reached = set()
    for path in folder.iterdir():
        mode = path.stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            reached.add(path.name)
    return reached


def test_a_new_folder_is_for_its_owner_only(tmp_path: Path) -> None:
    make_private(tmp_path / "new" / "data")
    assert stat.S_IMODE((tmp_path / "new" / "data").stat().st_mode) == 0o700


def test_a_folder_of_an_earlier_version_is_closed_and_foreign_files_stay_as_they_are(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for name in ("artifacts/tenants/a", "logs", "backbones", "traces", "photos"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("admission.db", "admission.db-wal", "lock", "mesh.json", "notes.txt", "artifacts/rows.jsonl"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o644)
    for name in ("artifacts", "logs", "backbones", "traces", "photos"):
        (tmp_path / name).chmod(0o755)
    make_private(tmp_path)
    assert open_to_others(tmp_path) == {"photos", "notes.txt"}
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_a_folder_that_all_users_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="can be written by every user"):
        make_private(tmp_path)


WRITER = """
import sys
for number in range(20_000):
    print(f"line {number:06} " + "x" * 50, file=sys.stderr)
    if number % 1000 == 999:
        print("written", flush=True)
        input()
"""


def test_a_log_is_bounded_and_its_lines_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service holds its log open the whole time, as a trainer does that it started."""
    monkeypatch.setattr(data_folder, "_MAX_LOG_BYTES", 100_000)
    log = tmp_path / "logs" / "service.log"
    with open_log(log) as file:
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
        )
    assert writer.stdin is not None and writer.stdout is not None
    for _ in writer.stdout:
        rotate_logs(log.parent)
        writer.stdin.write("go on\n")
        writer.stdin.flush()
    assert writer.wait() == 0
    names = ["service.log.3", "service.log.2", "service.log.1", "service.log"]  # the oldest first
    assert {path.name for path in log.parent.iterdir()} == set(names) and not open_to_others(log.parent)
    assert all((log.parent / name).stat().st_size <= 170_000 for name in names)
    lines = "".join((log.parent / name).read_text() for name in names).splitlines()
    last = 19_999
    assert lines == [f"line {number:06} " + "x" * 50 for number in range(last + 1 - len(lines), last + 1)]


def test_a_log_that_cannot_be_copied_stays_and_so_do_its_older_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk once would have ended `muxtune up`."""
    monkeypatch.setattr(data_folder, "_MAX_LOG_BYTES", 100)
    for name, text in (("a.log", "x" * 101), ("a.log.1", "one"), ("a.log.2", "two")):
        (tmp_path / name).write_text(text)

    def full(source: object, copy: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(data_folder.shutil, "copyfileobj", full)
        for _ in range(5):
            rotate_logs(tmp_path)
    assert (tmp_path / "a.log.2").read_text() == "two" and (tmp_path / "a.log").stat().st_size == 101
    rotate_logs(tmp_path)
    assert {path.name: path.read_text()[:3] for path in tmp_path.iterdir()} == {
        "a.log": "", "a.log.1": "xxx", "a.log.2": "one", "a.log.3": "two"
    }  # fmt: skip
