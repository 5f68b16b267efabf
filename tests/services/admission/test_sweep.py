"""Checkpoints go when their task has ended, and not before."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from engine.errors import UnavailableError
from engine.task import TaskState
from services.admission.database import Database
from services.admission.sweep import sweep_checkpoints
from services.admission.tables import tasks
from services.artifacts import ArtifactStore


@pytest.fixture
def database(tmp_path: Path) -> Database:
    made = Database(f"sqlite:///{tmp_path / 'a.db'}")
    made.migrate()
    return made


def put_task(database: Database, artifacts: ArtifactStore, name: str, state: TaskState) -> None:
    for step in (1, 2):
        artifacts.commit_folder(f"{name}/checkpoints/{step:08d}-1", {"state": b"x"}, {"step": step})
    row = {"name": name, "tenant": "tenants/a", "created": 0, "state": state.name, "dataset": "d", "checkpoint": b"c"}
    with database.write() as connection:
        connection.execute(sa.insert(tasks).values(**row, spec=b"", estimate=b"", progress=b""))


def test_only_ended_tasks_lose_their_checkpoints(database: Database, tmp_path: Path) -> None:
    artifacts = ArtifactStore.open(str(tmp_path / "store"))
    for state in TaskState:
        put_task(database, artifacts, f"tenants/a/tasks/{state.value}", state)
    artifacts.put("tenants/a/adapters/succeeded/1/manifest.json", b"{}")
    assert sweep_checkpoints(database, artifacts) == 3
    left = {key.split("/")[3] for key in artifacts.list("tenants/a/tasks")}
    assert left == {"queued", "running", "cancelling"}
    assert artifacts.exists("tenants/a/adapters/succeeded/1/manifest.json")
    assert sweep_checkpoints(database, artifacts) == 0


def test_a_sweep_cut_short_is_done_by_the_next(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = ArtifactStore.open(str(tmp_path / "store"))
    name = "tenants/a/tasks/t"
    put_task(database, artifacts, name, TaskState.FAILED)

    def away(prefix: str) -> None:
        artifacts.delete(f"{prefix}/00000001-1/manifest.json")
        raise UnavailableError("the store is away")

    with monkeypatch.context() as patched:
        patched.setattr(artifacts, "delete_folder", away)
        with pytest.raises(UnavailableError):
            sweep_checkpoints(database, artifacts)
    assert sweep_checkpoints(database, artifacts) == 1
    assert artifacts.list(f"{name}/checkpoints") == []
