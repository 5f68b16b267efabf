"""One process uses an SQLite database, whatever the file is called; tests/test_up.py has it with whole admissions."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from engine.errors import UnavailableError
from services.admission.store.database import Database

ROOT = Path(__file__).parents[4]
HOLDER = """
import sys
from services.admission.store.database import Database
Database(sys.argv[1]).claim()
print("claimed", flush=True)
sys.stdin.read()
"""


def url(path: Path | str) -> str:
    return f"sqlite:///{quote(str(path))}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / "admission.db"


@pytest.fixture
def holder(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that uses the database."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, url(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "claimed\n"
    yield process
    process.kill()
    process.communicate()


def names_of(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return URLs of the database under different names."""
    (tmp_path / "link-to-folder").symlink_to(path.parent)
    (tmp_path / "link-to-file.db").symlink_to(path)
    monkeypatch.chdir(path.parent)
    return [
        url(path),
        url(tmp_path / "link-to-folder" / path.name),
        url(tmp_path / "link-to-file.db"),
        url(f"../data/./{path.name}"),
        f"sqlite:///file:{quote(str(path))}?uri=true",
    ]


def test_another_process_is_refused_by_any_name_until_the_first_has_ended(
    holder: "subprocess.Popen[str]", path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    databases = [Database(name) for name in names_of(path, tmp_path, monkeypatch)]
    for database in databases:
        with pytest.raises(UnavailableError) as refused:
            database.claim()
        assert f"{path} is in use by another admission, process {holder.pid}" in str(refused.value)
    holder.kill()
    holder.wait()
    for database in databases:
        database.claim()
        database.claim()  # again: nothing changes
        database.close()


def test_a_hard_link_is_refused(path: Path, tmp_path: Path) -> None:
    """SQLite keeps its journals beside one of the names only: changes would be lost under the other."""
    Database(url(path)).migrate()
    os.link(path, tmp_path / "second.db")
    for name in (path, tmp_path / "second.db"):
        with pytest.raises(UnavailableError, match="hard links"):
            Database(url(name)).claim()
    (tmp_path / "second.db").unlink()
    Database(url(path)).claim()


def test_a_process_whose_lock_was_deleted_has_the_database_again_when_another_has_ended(
    holder: "subprocess.Popen[str]", path: Path
) -> None:
    lock = path.with_name("admission.db.lock")
    lock.unlink()
    first = Database(url(path))
    first.claim()
    lock.unlink()
    second = Database(url(path))
    second.claim()
    with pytest.raises(UnavailableError, match="in use by another admission"):
        first.claim()
    second.close()
    first.claim()
    first.close()


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("missing/admission.db", "its folder must exist"),
        ("f" * 200 + "/" + "f" * 200 + "/" + "f" * 200 + "/admission.db", "its path has .* bytes, SQLite takes 504"),
        ("data", "unable to open"),
    ],
    ids=["no folder", "long path", "a folder"],
)
def test_a_file_that_cannot_be_opened_is_named(path: Path, tmp_path: Path, name: str, cause: str) -> None:
    if not name.startswith("missing"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    with pytest.raises(UnavailableError, match=cause) as refused:
        Database(url(tmp_path / name)).claim()
    assert str(tmp_path / name) in str(refused.value)
