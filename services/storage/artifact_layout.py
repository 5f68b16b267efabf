"""Keys of the artifact store: the only place that makes and parses them.

    {tenant}/datasets/{sha256}.jsonl                              bytes of a dataset
    {task}/checkpoints/{step:08d}-{attempt}                       folder of a checkpoint
    {adapter}/{attempt}                                           folder of the adapter that an attempt left at its end
    {adapter}/{attempt}-step-{step:08d}                           folder of an adapter exported while its task trains
    {adapter}/uploaded-{digest}-{created microseconds}-{nonce}    folder of an uploaded adapter
    {executor}/stopped                                            its process that was asked to stop last
    {folder}/manifest.json                                        commits the folder
    {folder}/{first 16 digits of the file's SHA-256}/{file}       file of a folder

Tenants, tasks, adapters and executors are written as in services/resource_names.py. `parse` is strict: it returns None
for a key that no object of the class contains, and the garbage collector never deletes such a key.
"""

import re
from dataclasses import dataclass

from engine.errors import InvalidInputError
from services.resource_names import ResourceName, adapter_of_task, is_tenant, task_of_adapter

ROOT = "tenants"  # everything of tenants lies below
MANIFEST = "manifest.json"

_KEY = re.compile(r"[A-Za-z0-9_.=-]+(/[A-Za-z0-9_.=-]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DATASET = re.compile(r"(tenants/[^/]+)/datasets/([0-9a-f]{64})\.jsonl")
# A folder's own key, and at its end a slash or nothing: the key of the folder or of something in it.
_CHECKPOINT = re.compile(r"(tenants/[^/]+/tasks/[^/]+)/checkpoints/([0-9]{1,18})-([0-9]{1,18})(?=/|\Z)")
_TRAINED = re.compile(r"(tenants/[^/]+/adapters/[^/]+)/([0-9]{1,18})(?:-step-([0-9]{1,18}))?(?=/|\Z)")
_UPLOADED = re.compile(
    r"(tenants/[^/]+/adapters/[^/]+)/uploaded-([0-9a-f]{16})(?:-([0-9]{1,18})-([0-9a-f]{8}))?(?=/|\Z)"
)


@dataclass(frozen=True)
class DatasetObject:
    """Bytes of a tenant's dataset, by their hash. Raises InvalidInputError for an invalid tenant or SHA-256."""

    tenant: str
    sha256: str

    def __post_init__(self) -> None:
        if not is_tenant(self.tenant) or not _SHA256.fullmatch(self.sha256):
            raise InvalidInputError.of_field("sha256", f'"{self.sha256}" of "{self.tenant}" is not a dataset')

    @property
    def key(self) -> str:
        return f"{self.tenant}/datasets/{self.sha256}.jsonl"

    @classmethod
    def parse(cls, key: str) -> "DatasetObject | None":
        match = _DATASET.fullmatch(key)
        return cls(match[1], match[2]) if match and is_tenant(match[1]) else None


@dataclass(frozen=True, order=True)
class CheckpointFolder:
    """Checkpoint of a task. Checkpoints of one task are ordered by step, then by attempt."""

    task: str
    step: int
    attempt: int

    @property
    def key(self) -> str:
        return f"{checkpoints_of(self.task)}/{self.step:08d}-{self.attempt}"

    @classmethod
    def parse(cls, key: str) -> "CheckpointFolder | None":
        """Return the checkpoint that `key` names or lies in, or None."""
        if (match := _CHECKPOINT.match(key)) is None or not ResourceName.parse(match[1]):
            return None
        folder = cls(match[1], int(match[2]), int(match[3]))
        return folder if folder.key == match[0] else None


@dataclass(frozen=True)
class TrainedAdapterFolder:
    """Adapter that an attempt at the task left at its end or, with a `step`, exported on the way."""

    task: str
    attempt: int
    step: int | None = None

    @property
    def key(self) -> str:
        suffix = "" if self.step is None else f"-step-{self.step:08d}"
        return f"{adapter_of_task(self.task)}/{self.attempt}{suffix}"

    @classmethod
    def parse(cls, key: str) -> "TrainedAdapterFolder | None":
        """Return the adapter that `key` names or lies in, or None."""
        if (match := _TRAINED.match(key)) is None or not ResourceName.parse(match[1]):
            return None
        folder = cls(task_of_adapter(match[1]), int(match[2]), None if match[3] is None else int(match[3]))
        return folder if folder.key == match[0] else None


@dataclass(frozen=True)
class UploadedAdapterFolder:
    """One upload of an adapter. `digest`: first 16 digits of the hash of its contents.

    Uploads of older versions have no creation time and no nonce.
    """

    adapter: str
    digest: str
    created_microseconds: int = 0
    nonce: str = ""

    @property
    def key(self) -> str:
        suffix = f"-{self.created_microseconds}-{self.nonce}" if self.nonce else ""
        return f"{self.adapter}/uploaded-{self.digest}{suffix}"

    @classmethod
    def parse(cls, key: str) -> "UploadedAdapterFolder | None":
        """Return the upload that `key` names or lies in, or None."""
        if (match := _UPLOADED.match(key)) is None or not ResourceName.parse(match[1]):
            return None
        folder = cls(match[1], match[2], int(match[3] or 0), match[4] or "")
        return folder if folder.key == match[0] else None


Folder = CheckpointFolder | TrainedAdapterFolder | UploadedAdapterFolder


def parse_folder(key: str) -> Folder | None:
    """Return the folder that `key` names or lies in, or None."""
    return CheckpointFolder.parse(key) or TrainedAdapterFolder.parse(key) or UploadedAdapterFolder.parse(key)


def checkpoints_of(task: str) -> str:
    """Return the prefix of the task's checkpoints."""
    return f"{task}/checkpoints"


def stop_record_of(executor: str) -> str:
    """Return the key of the executor's record of its last stop."""
    return f"{executor}/stopped"


def manifest_key(folder: str) -> str:
    return f"{folder}/{MANIFEST}"


def is_manifest(key: str) -> bool:
    return key.endswith(f"/{MANIFEST}")


def folder_of_manifest(key: str) -> str:
    """Return the key of the folder that the manifest commits. Raises ValueError for a key that is not a manifest's."""
    if not is_manifest(key):
        raise ValueError(f'"{key}" is not the key of a manifest')
    return key.removesuffix(f"/{MANIFEST}")


def file_key(folder: str, name: str, sha256: str) -> str:
    """Return the key of the folder's file. It holds the file's hash: two writers never touch each other's bytes."""
    return f"{folder}/{sha256[:16]}/{name}"


def check_key(key: str) -> None:
    """Raises InvalidInputError for an absolute path, "." or "..", and an invalid character."""
    if not _KEY.fullmatch(key) or ".." in key.split("/") or "." in key.split("/"):
        raise InvalidInputError.of_field("key", f'"{key}" is not a key of the artifact store')
