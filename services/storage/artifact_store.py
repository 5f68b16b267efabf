"""The artifact store: keeps datasets, checkpoints and adapters as objects, in a folder or in S3.

A folder is committed by a conditional put of its manifest, which succeeds only if there is none yet. Synchronous;
asyncio callers use a pool of threads. Source: obstore (Apache arrow-rs object_store).
"""

import hashlib
import io
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import LocalStore, ObjectStore, from_url

from engine.errors import ArtifactCorruptError, InvalidInputError, UnavailableError
from engine.errors import NotFoundError as MissingError
from services.failpoints import failpoint
from services.storage.artifact_layout import check_key, file_key, folder_of_manifest, manifest_key

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

READ_BYTES = 4 << 20  # of an object, at once
_NUM_PUTS = 5
_PART_BYTES = 8 << 20  # of a file that is written in parts
_PARTIAL = re.compile(r".+#[0-9]+")  # how obstore names a file until it is complete
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileEntry:
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class LocalFile:
    """A file on the local disk whose size and hash are known."""

    path: Path
    entry: FileEntry


@dataclass(frozen=True)
class Manifest:
    """A committed folder: its manifest's key, its files, and the writer's metadata."""

    key: str
    files: Mapping[str, FileEntry]
    metadata: Mapping[str, Any]

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files.values())


class ArtifactStore:
    """Reads and writes objects by key.

    Raises UnavailableError if the store cannot be reached or is full, NotFoundError for a key that does not exist,
    InvalidInputError for an invalid key ("..", an absolute path).
    """

    def __init__(self, store: ObjectStore, folder: Path | None = None) -> None:
        self._store, self._folder = store, folder

    @classmethod
    def open(cls, url: str) -> "ArtifactStore":
        """Open a folder (path or file:// URL, made if missing) or s3://bucket/prefix, set up by AWS variables."""
        if "://" not in url or url.startswith("file://"):
            folder = Path(url.removeprefix("file://")).absolute()
            return cls(LocalStore(folder, mkdir=True, automatic_cleanup=True), folder)
        if not url.startswith("s3://"):
            raise InvalidInputError.of_field("artifact_url", f'"{url}" is not a folder, a file:// or an s3:// URL')
        try:
            return cls(from_url(url))
        except (BaseError, ValueError) as error:
            raise InvalidInputError.of_field("artifact_url", f'"{url}" cannot be opened: {error}') from error

    def put_new(self, key: str, data: bytes) -> bool:
        """Write the object atomically if the key is free. Return False if it is not."""
        try:
            self._put(key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        return True

    def put(self, key: str, data: bytes | Path) -> None:
        """Write the object atomically, replacing any object at the key. A file is not read into memory as a whole."""
        options = (
            {"use_multipart": False} if isinstance(data, bytes) else {"chunk_size": _PART_BYTES, "max_concurrency": 2}
        )
        for _ in range(_NUM_PUTS):
            # A folder that another call has just emptied is removed, maybe while this one writes to it.
            with suppress(MissingError):
                return self._put(key, data, **options)
        raise UnavailableError(f"The artifact store cannot write {key}: its folder is removed again and again.")

    def get(self, key: str) -> bytes:
        return b"".join(self.stream(key, 1 << 20))

    def stream(self, key: str, chunk_bytes: int) -> Iterator[bytes]:
        with _translated_errors("read", key):
            for chunk in obstore.get(self._store, self._checked(key)).stream(min_chunk_size=chunk_bytes):
                yield bytes(chunk)

    def reader(self, key: str) -> "ObjectReader":
        """Open the object for reading in order. Raises NotFoundError."""
        with _translated_errors("read", key):
            size_bytes = int(obstore.head(self._store, self._checked(key))["size"])
        return ObjectReader(self._store, key, size_bytes)

    def exists(self, key: str) -> bool:
        try:
            with _translated_errors("read", key):
                obstore.head(self._store, self._checked(key))
        except MissingError:
            return False
        return True

    def has_sha256(self, key: str, sha256: str, yield_turn: Callable[[], object] = lambda: None) -> bool:
        """Return whether the object exists and its bytes have this hash. `yield_turn` is called between pieces."""
        try:
            reader = self.reader(key)
            while reader.read(READ_BYTES):
                yield_turn()
            reader.check(sha256)
        except (MissingError, ArtifactCorruptError):
            return False
        return True

    def delete(self, key: str) -> None:
        """Delete the object if it exists."""
        with suppress(MissingError), _translated_errors("delete", key):
            obstore.delete(self._store, self._checked(key))

    def list(self, prefix: str) -> list[str]:
        """Return every key below `prefix`/, sorted."""
        with _translated_errors("list", prefix):
            return sorted(
                str(item["path"]) for page in obstore.list(self._store, self._checked(prefix)) for item in page
            )

    def commit_folder(
        self, prefix: str, files: Mapping[str, bytes | LocalFile], metadata: Mapping[str, Any]
    ) -> Manifest:
        """Write the files, then the manifest, and return it. A folder that is committed already stays as it is.

        A file's key contains its hash, so that two writers of one folder never overwrite each other's bytes.
        """
        key = manifest_key(prefix)
        if not self.exists(key):
            manifest = self._put_files(prefix, files, metadata)
            failpoint("manifest.before")
            self.put_new(key, manifest)
            failpoint("manifest.after")
        return self.read_manifest(key)

    def restore_folder(self, prefix: str, files: Mapping[str, LocalFile], metadata: Mapping[str, Any]) -> None:
        """Write the same files and manifest again where the store lost or changed them."""
        try:
            manifest = self.read_manifest(manifest_key(prefix))
            is_intact = manifest.files == {name: file.entry for name, file in files.items()} and all(
                self.has_sha256(file_key(prefix, name, entry.sha256), entry.sha256)
                for name, entry in manifest.files.items()
            )
        except (MissingError, ArtifactCorruptError):
            is_intact = False
        if not is_intact:
            self.put(manifest_key(prefix), self._put_files(prefix, files, metadata))

    def _put_files(self, prefix: str, files: Mapping[str, bytes | LocalFile], metadata: Mapping[str, Any]) -> bytes:
        """Write the files of a folder; return its manifest."""
        entries = {}
        for name, data in files.items():
            entry = entries[name] = data.entry if isinstance(data, LocalFile) else _entry(data)
            self.put(file_key(prefix, name, entry.sha256), data.path if isinstance(data, LocalFile) else data)
        content = {"files": {name: asdict(entry) for name, entry in entries.items()}, "metadata": dict(metadata)}
        return json.dumps(content, sort_keys=True).encode()

    def file_reader(self, manifest: Manifest, name: str) -> "ObjectReader":
        """Open one file of a committed folder; `ObjectReader.check` tells whether its bytes are the committed ones.

        Raises ArtifactCorruptError if it is missing or has another size.
        """
        entry = manifest.files[name]
        key = file_key(folder_of_manifest(manifest.key), name, entry.sha256)
        try:
            reader = self.reader(key)
        except MissingError as error:
            raise ArtifactCorruptError(f"{key} is missing.", key=key) from error
        if reader.size_bytes != entry.size_bytes:
            raise ArtifactCorruptError(f"{key} does not match its manifest ({reader.size_bytes} bytes).", key=key)
        return reader

    def read_manifest(self, key: str) -> Manifest:
        """Return the manifest. Raises ArtifactCorruptError if it is malformed."""
        try:
            content = json.loads(self.get(key))
            files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
            return Manifest(key, files, content["metadata"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactCorruptError(f"{key} is not a manifest: {type(error).__name__}.", key=key) from error

    def read_file(self, manifest: Manifest, name: str) -> bytes:
        """Return the file's bytes. Raises ArtifactCorruptError unless they are the committed ones."""
        entry = manifest.files[name]
        key = file_key(folder_of_manifest(manifest.key), name, entry.sha256)
        try:
            data = self.get(key)
        except MissingError as error:
            raise ArtifactCorruptError(f"{key} is missing.", key=key) from error
        if len(data) != entry.size_bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ArtifactCorruptError(f"{key} does not match its manifest ({len(data)} bytes).", key=key)
        return data

    def read_folder(self, manifest_key: str) -> tuple[Manifest, dict[str, bytes]]:
        manifest = self.read_manifest(manifest_key)
        return manifest, {name: self.read_file(manifest, name) for name in manifest.files}

    def delete_folder(self, prefix: str) -> None:
        """Delete the manifest, which undoes the commit, and then the files. Leave alone what is not a key of ours."""
        self.delete(manifest_key(prefix))
        for key in self.list(prefix):
            try:
                self.delete(key)
            except InvalidInputError as error:
                _log.warning("%s holds a file that muxtune did not write, which is not deleted: %s", prefix, error)

    def _checked(self, key: str) -> str:
        """Return the key. Raises InvalidInputError if it is invalid or a symbolic link leads out of the folder."""
        check_key(key)
        if self._folder is not None and not (self._folder / key).resolve().is_relative_to(self._folder.resolve()):
            raise InvalidInputError.of_field("key", f'"{key}" leads out of the artifact store')
        return key

    def remove_partial_writes(self, older_than_seconds: float) -> None:
        """Remove what writers that were killed left in a folder. S3 needs a rule of the bucket for that
        (AbortIncompleteMultipartUpload)."""
        newest = time.time() - older_than_seconds
        for path in self._folder.rglob("*#*") if self._folder is not None else ():
            with suppress(OSError):
                if _PARTIAL.fullmatch(path.name) and path.lstat().st_mtime < newest and not path.is_dir():
                    path.unlink()

    def _put(self, key: str, data: bytes | Path, **options: Any) -> None:
        with _translated_errors("write", key):
            obstore.put(self._store, self._checked(key), data, **options)
            if self._folder is not None:
                _flush_to_disk(self._folder / key)


class ObjectReader(io.RawIOBase):
    """Reads an object from its start to its end and hashes it. Each read is a request to the store."""

    def __init__(self, store: ObjectStore, key: str, size_bytes: int) -> None:
        self._store, self._key, self.size_bytes = store, key, size_bytes
        self._position, self._digest = 0, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._position + len(view), self.size_bytes)
        if end == self._position:
            return 0
        with _translated_errors("read", self._key):
            data = obstore.get_range(self._store, self._key, start=self._position, end=end)
        view[: len(data)] = data
        self._digest.update(data)
        self._position += len(data)
        return len(data)

    def check(self, sha256: str) -> None:
        """Read the rest. Raises ArtifactCorruptError unless all bytes have this hash."""
        while self.read(READ_BYTES):
            pass
        if self._digest.hexdigest() != sha256:
            raise ArtifactCorruptError(f"{self._key} does not match its SHA-256.", key=self._key)


@contextmanager
def _translated_errors(action: str, key: str) -> Iterator[None]:
    """Raise the store's errors as domain errors, except AlreadyExistsError."""
    try:
        yield
    except AlreadyExistsError:
        raise
    except (NotFoundError, FileNotFoundError) as error:
        raise MissingError(f"{key} is not in the artifact store.") from error
    except (BaseError, OSError) as error:
        raise UnavailableError(f"The artifact store cannot {action} {key}: {type(error).__name__}.") from error


def _flush_to_disk(path: Path) -> None:
    """Flush the file and its folder's entry, so that they survive a power failure."""
    for target in (path, path.parent):
        number = os.open(target, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _entry(data: bytes) -> FileEntry:
    return FileEntry(hashlib.sha256(data).hexdigest(), len(data))
