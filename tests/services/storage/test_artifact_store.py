"""A folder and S3 behave alike (moto's server answers conditional puts as S3 does)."""

import hashlib
import io
import json
import random
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import boto3
import obstore
import pytest
from moto.server import ThreadedMotoServer

from engine.errors import ArtifactCorruptError, InvalidInputError, NotFoundError, UnavailableError
from services.storage.artifact_layout import MANIFEST
from services.storage.artifact_store import READ_BYTES, ArtifactStore, FileEntry, LocalFile

PREFIX = "tenants/a/tasks/b/checkpoints/00000010-1"
FILES = {"adapter.safetensors": bytes(range(256)) * 40, "state.json": b"{}", "empty": b""}


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    environment = {
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ALLOW_HTTP": "true",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/some/prefix"


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    url = str(tmp_path / "made" / "by open") if request.param == "folder" else request.getfixturevalue("s3_url")
    return ArtifactStore.open(url)


def test_put_new_is_conditional(store: ArtifactStore, tmp_path: Path) -> None:
    assert store.put_new("a/b.jsonl", b"first")
    assert not store.put_new("a/b.jsonl", b"second")
    assert store.get("a/b.jsonl") == b"first"
    source = tmp_path / "source"
    source.write_bytes(b"x" * 3_000_000)
    assert store.put_new("a/c.jsonl", source)
    chunks = list(store.stream("a/c.jsonl", 1 << 20))
    assert b"".join(chunks) == source.read_bytes() and len(chunks) > 1


def test_one_of_many_writers_wins(store: ArtifactStore) -> None:
    contents = [f"writer {i}".encode() for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda data: store.put_new("race", data), contents))
    assert won.count(True) == 1
    assert store.get("race") == contents[won.index(True)]


def test_missing_keys(store: ArtifactStore) -> None:
    assert not store.exists("not/there")
    store.delete("not/there")
    assert store.list("not") == []
    with pytest.raises(NotFoundError):
        store.get("not/there")
    with pytest.raises(NotFoundError):
        store.read_manifest("not/manifest.json")


def test_list_takes_whole_segments(store: ArtifactStore) -> None:
    for key in ("t/b/1", "t/b/2", "t/bc/3"):
        store.put(key, b"x")
    assert store.list("t/b") == ["t/b/1", "t/b/2"]
    store.delete("t/b/1")
    assert store.list("t") == ["t/b/2", "t/bc/3"]


def test_a_folder_is_read_as_it_was_committed(store: ArtifactStore, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"from disk")
    from_disk = LocalFile(path, FileEntry(hashlib.sha256(b"from disk").hexdigest(), 9))
    manifest = store.commit_folder(PREFIX, {**FILES, "sub/more": from_disk}, {"step": 10, "rng": [1, 2]})
    assert manifest.key == f"{PREFIX}/{MANIFEST}"
    assert manifest.size_bytes == sum(map(len, FILES.values())) + 9
    assert manifest.files["state.json"].sha256 == hashlib.sha256(b"{}").hexdigest()
    again, files = store.read_folder(manifest.key)
    assert again == manifest and again.metadata == {"step": 10, "rng": [1, 2]}
    assert files == {**FILES, "sub/more": b"from disk"}
    store.delete_folder(PREFIX)
    assert store.list("tenants") == []


def test_a_file_of_several_parts_is_written_and_read_piece_by_piece(store: ArtifactStore, tmp_path: Path) -> None:
    path, data = tmp_path / "file", random.Random(1).randbytes(21 << 20)
    path.write_bytes(data)
    entry = FileEntry(hashlib.sha256(data).hexdigest(), len(data))
    for _ in range(2):  # the second time it replaces the first
        store.put("some/key", path)
        assert store.has_sha256("some/key", entry.sha256)
    assert store.list("some") == ["some/key"]
    manifest = store.commit_folder(PREFIX, {"file": LocalFile(path, entry)}, {})
    reader = store.file_reader(manifest, "file")
    pieces = iter(partial(io.BufferedReader(reader, READ_BYTES).read, 1 << 20), b"")
    assert b"".join(pieces) == data
    reader.check(entry.sha256)


@pytest.mark.parametrize(
    "damage", ["nothing", "a file is missing", "a file changed", "the manifest is missing", "no folder"]
)
def test_a_folder_is_restored_from_the_same_files(store: ArtifactStore, tmp_path: Path, damage: str) -> None:
    files = {}
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
        files[name] = LocalFile(tmp_path / name, FileEntry(hashlib.sha256(data).hexdigest(), len(data)))
    manifest = store.commit_folder(PREFIX, files, {"a": 1})
    key = next(key for key in store.list(PREFIX) if key.endswith("state.json"))
    if damage == "a file is missing":
        store.delete(key)
    elif damage == "a file changed":
        store.put(key, b"[]")
    elif damage == "the manifest is missing":
        store.delete(manifest.key)
    elif damage == "no folder":
        store.delete_folder(PREFIX)
    store.restore_folder(PREFIX, files, {"a": 1})
    assert store.read_folder(manifest.key) == (manifest, FILES)


WRITE_FOR_EVER = """
import sys
from pathlib import Path
from services.storage.artifact_store import READ_BYTES, ArtifactStore, FileEntry, LocalFile
while True:
    ArtifactStore.open(sys.argv[1]).put("tenants/a/datasets/y.jsonl", Path(sys.argv[2]))
"""


def test_files_of_killed_writers_are_removed_when_they_are_old(tmp_path: Path) -> None:
    """A process is killed while it writes an object; a file of another program has a similar name."""
    (tmp_path / "file").write_bytes(bytes(20 << 20))
    folder = tmp_path / "store/tenants/a/datasets"
    store = ArtifactStore.open(str(tmp_path / "store"))
    store.put("tenants/a/datasets/x.jsonl", b"stays")
    (folder / "notes#").write_bytes(b"none of ours")
    while not (folder / "y.jsonl#1").exists():  # it may be killed between two objects
        arguments = [sys.executable, "-c", WRITE_FOR_EVER, tmp_path / "store", tmp_path / "file"]
        with subprocess.Popen(arguments) as writer:
            while writer.poll() is None and not (folder / "y.jsonl#1").exists():
                pass
            writer.kill()
    store.delete("tenants/a/datasets/y.jsonl")
    assert store.list("tenants") == ["tenants/a/datasets/notes#", "tenants/a/datasets/x.jsonl"]
    store.remove_partial_writes(3600)
    assert (folder / "y.jsonl#1").exists(), "its writer may still live"
    store.remove_partial_writes(-1)
    assert {path.name for path in folder.iterdir()} == {"x.jsonl", "notes#"}


def test_the_first_commit_stands(store: ArtifactStore) -> None:
    first = store.commit_folder(PREFIX, FILES, {"by": "first"})
    second = store.commit_folder(PREFIX, {"state.json": b"other"}, {"by": "second"})
    assert second == first
    assert store.read_folder(first.key)[1] == FILES


def test_a_writer_that_lost_the_race_changes_nothing(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writers find the folder free; the other commits between this one's files and its manifest."""
    put_new = ArtifactStore.put_new

    def be_overtaken(self: ArtifactStore, key: str, data: bytes) -> bool:
        monkeypatch.setattr(ArtifactStore, "put_new", put_new)
        monkeypatch.setattr(ArtifactStore, "exists", lambda self, key: False)
        store.commit_folder(PREFIX, FILES, {"by": "the other"})
        return put_new(self, key, data)

    monkeypatch.setattr(ArtifactStore, "put_new", be_overtaken)
    answer = store.commit_folder(PREFIX, {name: b"mine" for name in FILES}, {"by": "me"})
    assert answer.metadata == {"by": "the other"}
    assert store.read_folder(answer.key)[1] == FILES


def test_a_crash_before_the_manifest_leaves_nothing_visible(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: ArtifactStore, key: str, data: bytes) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ArtifactStore, "put_new", die)
        store.commit_folder(PREFIX, FILES, {})
    with pytest.raises(NotFoundError):
        store.read_manifest(f"{PREFIX}/{MANIFEST}")
    assert store.read_folder(store.commit_folder(PREFIX, {"state.json": b"later"}, {}).key)[1] == {
        "state.json": b"later"
    }


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: b"", lambda d: d[:5] + b"?" + d[6:]])
def test_damage_is_detected(store: ArtifactStore, damage) -> None:
    manifest = store.commit_folder(PREFIX, FILES, {})
    [key] = [key for key in store.list(PREFIX) if key.endswith("/adapter.safetensors")]
    store.put(key, damage(FILES["adapter.safetensors"]))
    with pytest.raises(ArtifactCorruptError) as caught:
        store.read_folder(manifest.key)
    assert caught.value.metadata["key"] == key
    store.delete(key)
    with pytest.raises(ArtifactCorruptError, match="missing"):
        store.read_folder(manifest.key)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"files": {"a": 1}, "metadata": {}}', b"\xff"])
def test_a_broken_manifest_is_corrupt(store: ArtifactStore, content: bytes) -> None:
    store.put(f"{PREFIX}/{MANIFEST}", content)
    with pytest.raises(ArtifactCorruptError):
        store.read_manifest(f"{PREFIX}/{MANIFEST}")


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../../x", "a/./b", "a//b", "a/", "a\\b", "a b", "ä", "a\n"]
)
def test_keys_stay_inside(store: ArtifactStore, tmp_path: Path, key: str) -> None:
    for call in (store.get, store.exists, store.delete, store.list, lambda k: store.put_new(k, b"x")):
        with pytest.raises(InvalidInputError):
            call(key)
    with pytest.raises(InvalidInputError):
        store.commit_folder("tenants/a", {f"../{key}/../../x": b"x"}, {})
    assert not (tmp_path / "x").exists()


def test_a_forged_manifest_reads_nothing_outside(store: ArtifactStore) -> None:
    entry = {"sha256": "0" * 64, "size_bytes": 1}
    store.put(f"{PREFIX}/{MANIFEST}", json.dumps({"files": {"../../../secret": entry}, "metadata": {}}).encode())
    with pytest.raises(InvalidInputError):
        store.read_folder(f"{PREFIX}/{MANIFEST}")


def test_an_unreachable_store_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore.open(f"file://{tmp_path}/store")

    def fail(*args: object, **kwargs: object) -> None:
        raise obstore.exceptions.GenericError("connection refused")

    for name in ("put", "get", "head", "delete", "list"):
        monkeypatch.setattr(obstore, name, fail)
    for call in (store.get, store.exists, store.delete, store.list, lambda k: store.put_new(k, b"x")):
        with pytest.raises(UnavailableError):
            call("a/b")


def test_an_unknown_scheme_is_named() -> None:
    for url in ("gopher://somewhere/x", "http://169.254.169.254/latest", "https://somewhere/x", "memory:///x", "://"):
        with pytest.raises(InvalidInputError, match="artifact_url"):
            ArtifactStore.open(url)
