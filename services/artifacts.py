"""The artifact store: datasets, checkpoints and adapters as objects, in a folder or in S3.

A folder of files counts once its manifest is there, and the manifest is put only if none is: that conditional put is
the commit. Synchronous; asyncio callers use `asyncio.to_thread`. Source: obstore (Apache arrow-rs object_store).
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import LocalStore, ObjectStore, from_url

from engine.errors import ArtifactCorruptError, InvalidInputError, UnavailableError
from engine.errors import NotFoundError as MissingError

MANIFEST = "manifest.json"
_KEY = re.compile(r"[A-Za-z0-9_.=-]+(/[A-Za-z0-9_.=-]+)*")


@dataclass(frozen=True)
class FileEntry:
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """A committed folder: its manifest's key, its files, and what the writer said of it."""

    key: str
    files: Mapping[str, FileEntry]
    metadata: Mapping[str, Any]

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files.values())


class ArtifactStore:
    """Raises UnavailableError where the store is away or full, NotFoundError where a key is not there."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @classmethod
    def open(cls, url: str) -> "ArtifactStore":
        """A path or file:// URL is a folder (made if missing); s3://bucket/prefix takes the AWS environment."""
        if "://" not in url or url.startswith("file://"):
            folder = Path(url.removeprefix("file://"))
            folder.mkdir(parents=True, exist_ok=True)
            return cls(LocalStore(folder))
        return cls(from_url(url))

    def put_new(self, key: str, data: bytes | Path) -> bool:
        """Whole or not at all, and only if the key is free; False if it is taken."""
        try:
            obstore.put(self._store, _checked(key), data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        except (BaseError, OSError) as error:
            raise UnavailableError(f"artifact store cannot write {key}: {type(error).__name__}") from error
        return True

    def put(self, key: str, data: bytes | Path) -> None:
        """Replaces what is there. Only for content that no manifest names yet."""
        try:
            obstore.put(self._store, _checked(key), data, use_multipart=False)
        except (BaseError, OSError) as error:
            raise UnavailableError(f"artifact store cannot write {key}: {type(error).__name__}") from error

    def get(self, key: str) -> bytes:
        return b"".join(self.stream(key, 1 << 20))

    def stream(self, key: str, chunk_bytes: int) -> Iterator[bytes]:
        try:
            for chunk in obstore.get(self._store, _checked(key)).stream(min_chunk_size=chunk_bytes):
                yield bytes(chunk)
        except (NotFoundError, FileNotFoundError) as error:
            raise MissingError(f"{key} is not in the artifact store") from error
        except BaseError as error:
            raise UnavailableError(f"artifact store cannot read {key}: {type(error).__name__}") from error

    def exists(self, key: str) -> bool:
        try:
            obstore.head(self._store, _checked(key))
        except (NotFoundError, FileNotFoundError):
            return False
        return True

    def delete(self, key: str) -> None:
        """Deleting what is not there is no error."""
        try:
            obstore.delete(self._store, _checked(key))
        except (NotFoundError, FileNotFoundError):
            return
        except BaseError as error:
            raise UnavailableError(f"artifact store cannot delete {key}: {type(error).__name__}") from error

    def list(self, prefix: str) -> list[str]:
        return sorted(str(item["path"]) for page in obstore.list(self._store, _checked(prefix)) for item in page)

    def commit_folder(self, prefix: str, files: Mapping[str, bytes], metadata: Mapping[str, Any]) -> Manifest:
        """Puts the files, then the manifest. If the folder is committed already, that one stands and is answered."""
        key = f"{prefix}/{MANIFEST}"
        if self.exists(key):
            return self.read_manifest(key)
        for name, data in files.items():
            self.put(f"{prefix}/{name}", data)
        entries = {n: {"sha256": hashlib.sha256(d).hexdigest(), "size_bytes": len(d)} for n, d in files.items()}
        self.put_new(key, json.dumps({"files": entries, "metadata": dict(metadata)}, sort_keys=True).encode())
        return self.read_manifest(key)

    def read_manifest(self, key: str) -> Manifest:
        """Raises ArtifactCorruptError if it does not read."""
        try:
            content = json.loads(self.get(key))
            files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
            return Manifest(key, files, content["metadata"])
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactCorruptError(f"{key} is not a manifest: {error}", key=key) from error

    def read_file(self, manifest: Manifest, name: str) -> bytes:
        """Raises ArtifactCorruptError unless the bytes are the ones committed."""
        key = f"{manifest.key.removesuffix(MANIFEST)}{name}"
        try:
            data = self.get(key)
        except MissingError as error:
            raise ArtifactCorruptError(f"{key} is missing", key=key) from error
        if hashlib.sha256(data).hexdigest() != manifest.files[name].sha256:
            raise ArtifactCorruptError(f"{key} is not what was committed ({len(data)} bytes)", key=key)
        return data

    def read_folder(self, manifest_key: str) -> tuple[Manifest, dict[str, bytes]]:
        manifest = self.read_manifest(manifest_key)
        return manifest, {name: self.read_file(manifest, name) for name in manifest.files}

    def delete_folder(self, prefix: str) -> None:
        """The manifest first: from then on the folder is not committed."""
        self.delete(f"{prefix}/{MANIFEST}")
        for key in self.list(prefix):
            self.delete(key)


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key) or ".." in key.split("/") or "." in key.split("/"):
        raise InvalidInputError.of_field("key", f'"{key}" is no key of the artifact store')
    return key
