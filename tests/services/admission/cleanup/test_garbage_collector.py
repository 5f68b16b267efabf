"""The garbage collector deletes files when nothing will read them again, and not before."""

import contextlib
import random
import re
from pathlib import Path

import obstore
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore

from engine.errors import UnavailableError
from engine.task import TaskState
from muxtune.v1 import event_pb2
from services.admission.cleanup.garbage_collector import GarbageCollector
from services.admission.store.database import Database
from services.admission.store.tables import adapters, tasks
from services.storage.artifact_layout import (
    ROOT,
    CheckpointFolder,
    TrainedAdapterFolder,
    UploadedAdapterFolder,
    parse_folder,
)
from services.storage.artifact_store import ArtifactStore
from tests.thoroughness import seeds


@pytest.fixture
def database(tmp_path: Path) -> Database:
    migrated = Database(f"sqlite:///{tmp_path / 'a.db'}")
    migrated.migrate()
    return migrated


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore.open(str(tmp_path / "store"))


def put_task(database: Database, name: str, state: TaskState, attempt: int, recorded: tuple[int, int] | None) -> None:
    """Store a task; `recorded` are the step and the attempt of its checkpoint."""
    checkpoint = None
    if recorded:
        key = f"{name}/checkpoints/{recorded[0]:08d}-{recorded[1]}/manifest.json"
        checkpoint = event_pb2.CheckpointCommitted(step=recorded[0], manifest_key=key).SerializeToString()
    row = {"name": name, "tenant": "tenants/a", "created": 0, "state": state.name, "dataset": "d"}
    row |= {"checkpoint": checkpoint, "attempt": attempt, "spec": b"", "estimate": b"", "progress": b""}
    with database.write() as connection:
        connection.execute(sa.insert(tasks).values(**row))


def put_checkpoint(artifacts: ArtifactStore, name: str, step: int, attempt: int) -> None:
    artifacts.commit_folder(f"{name}/checkpoints/{step:08d}-{attempt}", {"state": b"x"}, {"step": step})


def checkpoints(artifacts: ArtifactStore, name: str) -> set[tuple[int, int]]:
    """Return (step, attempt) of the readable checkpoints."""
    keys = [key for key in artifacts.list(f"{name}/checkpoints") if key.endswith("/manifest.json")]
    for key in keys:
        artifacts.read_folder(key)
    return {tuple(map(int, key.split("/")[-2].split("-"))) for key in keys}  # type: ignore[misc]


@pytest.mark.parametrize("seed", seeds(30, 10))
def test_checkpoints_that_a_resumed_task_may_read_are_kept_and_others_deleted(
    database: Database, artifacts: ArtifactStore, seed: int
) -> None:
    """Attempts write checkpoints at rising steps, of which some are recorded; earlier attempts may still write."""
    draw, written, recorded = random.Random(seed), set[tuple[int, int]](), None
    name, step, last_attempt = "tenants/a/tasks/t", 0, draw.randint(1, 4)
    for attempt in range(1, last_attempt + 1):
        step = recorded[0] if recorded else 0
        for _ in range(draw.randint(0, 4)):
            step += draw.randint(1, 5)
            written.add((step, attempt))
            if draw.random() < 0.5:
                recorded = (step, attempt)
    for checkpoint in written:
        put_checkpoint(artifacts, name, *checkpoint)
    put_task(database, name, TaskState.RUNNING, last_attempt, recorded)
    GarbageCollector(database, artifacts).collect_all()
    left = checkpoints(artifacts, name)
    before = [checkpoint for checkpoint in written if recorded and checkpoint[0] < recorded[0]]
    since = {checkpoint for checkpoint in written if checkpoint[1] == last_attempt and checkpoint not in before}
    needed = since | ({recorded} if recorded else set()) | ({max(before)} if before else set())
    assert left == needed


def test_only_the_recorded_adapter_of_an_ended_task_is_kept(database: Database, artifacts: ArtifactStore) -> None:
    for state in TaskState:
        name = f"tenants/a/tasks/{state.value}"
        put_task(database, name, state, 3, (2, 3))
        put_checkpoint(artifacts, name, 2, 3)
        for folder in ("2", "3", "3-step-00000002", "uploaded-ab"):
            artifacts.commit_folder(f"tenants/a/adapters/{state.value}/{folder}", {"x": b"x"}, {})
    with database.write() as connection:
        key = "tenants/a/adapters/succeeded/3/manifest.json"
        row = {"name": "tenants/a/adapters/succeeded", "tenant": "tenants/a", "manifest_key": key}
        connection.execute(sa.insert(adapters).values(**row, size_bytes=1, created=0))
    collector = GarbageCollector(database, artifacts)
    collector.collect([f"tenants/a/tasks/{state.value}" for state in TaskState])
    going_on = {"queued", "running", "cancelling"}
    assert {key.split("/")[3] for key in artifacts.list("tenants/a/tasks")} == going_on
    manifests = {key for key in artifacts.list("tenants/a/adapters") if key.endswith("/manifest.json")}
    left = {(parts[3], parts[4]) for parts in (key.split("/") for key in manifests)}
    others = {(state.value, other) for state in TaskState for other in ("3-step-00000002", "uploaded-ab")}
    assert left == others | {(task, "3") for task in (*going_on, "succeeded")}
    assert collector.collect_all() == 0


def test_files_of_a_lost_attempt_are_deleted_by_the_next_sweep(database: Database, artifacts: ArtifactStore) -> None:
    name = "tenants/a/tasks/t"
    put_task(database, name, TaskState.SUCCEEDED, 2, None)
    collector = GarbageCollector(database, artifacts)
    assert collector.collect_all() == 0
    put_checkpoint(artifacts, name, 7, 1)
    artifacts.put(f"{name}/checkpoints/00000009-1/ab12/state.safetensors", b"its writer was killed before the manifest")
    artifacts.put("tenants/a/datasets/of-another-kind", b"stays")
    assert collector.collect_all() == 2
    assert artifacts.list("tenants") == ["tenants/a/datasets/of-another-kind"]


def test_a_sweep_cut_short_is_done_by_the_next(
    database: Database, artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tenants/a/tasks/t"
    put_task(database, name, TaskState.FAILED, 1, (1, 1))
    put_checkpoint(artifacts, name, 1, 1)

    def away(prefix: str) -> None:
        artifacts.delete(f"{prefix}/manifest.json")
        raise UnavailableError("the store is away")

    collector = GarbageCollector(database, artifacts)
    with monkeypatch.context() as patched:
        patched.setattr(artifacts, "delete_folder", away)
        with pytest.raises(UnavailableError):
            collector.collect_all()
    assert collector.collect_all() == 1
    assert artifacts.list(f"{name}/checkpoints") == []


def test_a_folder_that_cannot_be_deleted_keeps_no_other_from_it(
    database: Database, artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tenant's folders fail in several ways, at a sweep of everything and of these tasks; another's all go."""
    folders = [f"tenants/{tenant}/tasks/t{i}" for tenant in "abc" for i in range(2)]
    for name in folders:
        put_task(database, name, TaskState.FAILED, 1, None)
    delete_folder = artifacts.delete_folder
    errors = {"tenants/a/tasks/t0": UnavailableError("away"), "tenants/b/tasks/t1": ValueError("odd")}

    def delete(prefix: str) -> None:
        if error := errors.get("/".join(prefix.split("/")[:4])):
            raise error
        delete_folder(prefix)

    monkeypatch.setattr(artifacts, "delete_folder", delete)
    collector = GarbageCollector(database, artifacts)
    for _ in range(2):
        for name in folders:
            put_checkpoint(artifacts, name, 1, 1)
        with pytest.raises(UnavailableError):
            collector.collect_all()
        assert {name for name in folders if checkpoints(artifacts, name)} == set(errors)
        for name in folders:
            put_checkpoint(artifacts, name, 1, 1)
        assert collector.collect(folders) == ["tenants/a/tasks/t0"]
        assert {name for name in folders if checkpoints(artifacts, name)} == set(errors)


@pytest.mark.parametrize("odd", ["a b", "ä", "x (copy)", "~", "+", "a;b"])
def test_a_file_of_another_program_stays_and_keeps_nothing_from_deletion(
    database: Database, artifacts: ArtifactStore, tmp_path: Path, odd: str
) -> None:
    for name in ("tenants/a/tasks/t", "tenants/b/tasks/t"):
        put_task(database, name, TaskState.FAILED, 1, None)
        put_checkpoint(artifacts, name, 1, 1)
    foreign = tmp_path / "store/tenants/a/tasks/t/checkpoints/00000001-1" / odd
    foreign.write_bytes(b"x")
    for _ in range(2):
        GarbageCollector(database, artifacts).collect_all()
        left = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
        assert left == [foreign]


def test_tasks_that_may_have_had_a_second_writer_are_collected_again(database: Database) -> None:
    for number, (state, attempt) in enumerate([
        (TaskState.SUCCEEDED, 1), (TaskState.SUCCEEDED, 2), (TaskState.FAILED, 1), (TaskState.CANCELLED, 1),
        (TaskState.RUNNING, 3),
    ]):  # fmt: skip
        put_task(database, f"tenants/a/tasks/t{number}", state, attempt, None)
    with database.write() as connection:
        connection.execute(sa.update(tasks).where(tasks.c.state != TaskState.RUNNING.name).values(ended=100))
    collector = GarbageCollector(database, ArtifactStore(MemoryStore()))
    assert sorted(collector.list_ended(99, 100)) == [f"tenants/a/tasks/t{number}" for number in (1, 2, 3)]
    assert collector.list_ended(100, 200) == [] == collector.list_ended(0, 99)


ENDED = "tenants/a/tasks/ended"
FOLDERS = [
    CheckpointFolder(ENDED, 7, 2).key,
    TrainedAdapterFolder(ENDED, 2).key,
    TrainedAdapterFolder(ENDED, 2, 7).key,
    UploadedAdapterFolder("tenants/a/adapters/x", "0" * 16, 1, "f" * 8).key,
    UploadedAdapterFolder("tenants/a/adapters/x", "0" * 16).key,
    CheckpointFolder("tenants/a/tasks/unknown", 7, 2).key,
    CheckpointFolder("tenants/a/tasks/unknown", 7, 2).key.replace("checkpoints", "notes"),
    f"{ENDED}/checkpoints/tenants/a/adapters/x",
]
ODD = [
    "/",
    "-",
    "0",
    "A",
    "\u00e4",
    "\u0667",
    "",
    " ",
    "%2F",
    "x/",
    "-step-1",
    "uploaded-",
    "tenants/",
    "manifest.json",
]
near_folders = st.builds(
    lambda key, place, odd, num_replaced: key[:place] + odd + key[place + num_replaced :],
    st.sampled_from(FOLDERS), st.integers(0, 80), st.sampled_from(ODD), st.integers(0, 2),
)  # fmt: skip
file_names = st.sampled_from(["manifest.json", "x"])
object_keys = st.builds("{}/{}".format, st.sampled_from(FOLDERS) | near_folders, file_names)
DELETABLE = re.compile(
    r"(tenants/a/tasks/ended/checkpoints/[0-9]{8,}-[0-9]+|tenants/a/adapters/ended/[0-9]+"
    r"|tenants/[a-z0-9-]+/adapters/[a-z0-9-]+/uploaded-[0-9a-f]{16}(-[0-9]+-[0-9a-f]{8})?)/.+"
)


@given(st.sets(object_keys, max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sweep_never_deletes_a_key_that_does_not_parse(database: Database, keys: set[str]) -> None:
    """Everything that parses may be deleted here: the task has ended and no adapter is recorded."""
    with database.write() as connection:
        connection.execute(sa.delete(tasks))
    put_task(database, ENDED, TaskState.FAILED, 2, None)
    memory = MemoryStore()
    for key in keys:
        with contextlib.suppress(ValueError):  # no store takes "a//b"
            obstore.put(memory, key, b"x")
    stored = ArtifactStore(memory).list(ROOT)
    num_deleted = GarbageCollector(database, ArtifactStore(memory)).collect_all()
    deleted = set(stored) - set(ArtifactStore(memory).list(ROOT))
    assert deleted == {key for key in stored if may_be_deleted(key)}
    assert [key for key in deleted if not DELETABLE.fullmatch(key)] == []
    assert num_deleted == len({parse_folder(key) for key in deleted})


def may_be_deleted(key: str) -> bool:
    folder = parse_folder(key)
    if isinstance(folder, TrainedAdapterFolder):
        return folder.task == ENDED and folder.step is None
    return isinstance(folder, UploadedAdapterFolder) or (folder is not None and folder.task == ENDED)
