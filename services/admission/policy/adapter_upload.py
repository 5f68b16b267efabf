"""Receives the files of an uploaded PEFT adapter on the disk and checks them. Pure but for the disk."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import InvalidInputError, QuotaExceededError
from engine.methods import METHODS
from engine.strict_json import parse_strict_json
from muxtune.v1 import artifact_pb2
from services.admission.policy.safetensors_check import check_header_size, check_safetensors
from services.storage.artifact_store import LocalFile
from services.storage.scratch_folder import scratch_errors
from services.storage.uploaded_file import UploadedFile

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PEFT_FILES = (CONFIG_FILE, WEIGHTS_FILE)  # in the order of their names
_METHOD_OF = {kind: method for method in METHODS.values() for kind in (method.peft_type, *method.other_peft_types)}
_MAX_CONFIG_BYTES = 256 << 10
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class ReceivedAdapter:
    """Files that are a valid adapter. `digest`: the hash of their contents."""

    files: Mapping[str, LocalFile]
    digest: str


class AdapterUpload:
    """One upload in progress. Its bytes go to the files in `folder`; memory holds about a mebibyte of them.

    `max_bytes`: of all files; `max_tensors`: that the weights may have.
    """

    def __init__(self, folder: Path, max_bytes: int, max_tensors: int) -> None:
        self._folder, self._max_bytes, self._max_tensors = folder, max_bytes, max_tensors
        self._files: dict[str, UploadedFile] = {}
        self._weights_start = b""

    @property
    def announced_bytes(self) -> int:
        return sum(file.size_bytes for file in self._files.values())

    def start_file(self, header: artifact_pb2.FileHeader) -> None:
        """Begin the next file. Raises InvalidInputError for an unexpected or repeated file, QuotaExceededError for too
        many bytes."""
        if header.file_name not in _PEFT_FILES or header.file_name in self._files:
            raise InvalidInputError.of_field(
                "file.file_name", f'"{header.file_name}" must be one of {", ".join(_PEFT_FILES)}, each once'
            )
        if header.size_bytes < 0:
            raise InvalidInputError.of_field("file.size_bytes", f"{header.size_bytes} must not be negative")
        if self.announced_bytes + header.size_bytes > self._max_bytes:
            raise QuotaExceededError(
                f"the adapter has more than {self._max_bytes} bytes: reduce its rank or target modules",
                subject="adapter",
            )
        path = self._folder / header.file_name
        self._files[header.file_name] = UploadedFile(path, header.size_bytes, header.sha256, header.file_name)

    def add_chunk(self, chunk: artifact_pb2.FileChunk) -> bool:
        """Append a chunk to the file that began last; return whether `write` is due. Raises ChecksumMismatchError for a
        wrong offset or length, InvalidInputError for weights of too many tensors."""
        if not self._files:
            raise InvalidInputError.of_field("chunk", "must follow a file header")
        name = next(reversed(self._files))
        is_due = self._files[name].add(chunk.offset, chunk.data)
        if name == WEIGHTS_FILE and len(self._weights_start) < 8:
            self._weights_start += chunk.data[: 8 - len(self._weights_start)]
            if len(self._weights_start) == 8:  # before hundreds of mebibytes are sent
                check_header_size(int.from_bytes(self._weights_start, "little"), self._max_tensors, name)
        return is_due

    def write(self) -> None:
        """Write to the disk what has come of the file that began last. Raises UnavailableError."""
        self._files[next(reversed(self._files))].write()

    def finish(self, yield_turn: Callable[[], object]) -> ReceivedAdapter:
        """Check the files. Raises ChecksumMismatchError or InvalidInputError unless they are a valid adapter.

        `yield_turn` is called between pieces of the work.
        """
        received = {name: file.finish() for name, file in self._files.items()}
        if missing := [name for name in _PEFT_FILES if name not in received]:
            raise InvalidInputError.of_field("file", f"{', '.join(missing)} must be sent, too")
        files = {name: received[name] for name in _PEFT_FILES}
        with scratch_errors():
            _check_config(files[CONFIG_FILE])
            with files[WEIGHTS_FILE].path.open("rb") as weights:
                size = files[WEIGHTS_FILE].entry.size_bytes
                check_safetensors(weights, size, WEIGHTS_FILE, self._max_tensors, yield_turn)
            return ReceivedAdapter(files, _hash_contents(files, yield_turn))


def _hash_contents(files: Mapping[str, LocalFile], yield_turn: Callable[[], object]) -> str:
    """Return `idempotency.hash_parts` of the files' contents, read piece by piece."""
    digest = hashlib.sha256()
    for local_file in files.values():
        digest.update(local_file.entry.size_bytes.to_bytes(8, "little"))
        with local_file.path.open("rb") as file:
            while data := file.read(_READ_BYTES):
                yield_turn()
                digest.update(data)
    return digest.hexdigest()


def _check_config(file: LocalFile) -> None:
    """Refuse a configuration that is not of a known method or that names code to import. Source: peft.PeftConfig."""
    if (size := file.entry.size_bytes) > _MAX_CONFIG_BYTES:
        raise InvalidInputError.of_field(CONFIG_FILE, f"must have at most {_MAX_CONFIG_BYTES} bytes, has {size}")
    try:
        config = parse_strict_json(file.path.read_bytes())
        method = _METHOD_OF[config["peft_type"]]
    except (ValueError, KeyError, TypeError):
        description = f"must be JSON with a peft_type of {', '.join(_METHOD_OF)}"
        raise InvalidInputError.of_field(CONFIG_FILE, description) from None
    if error := method.config_error(config):
        raise InvalidInputError.of_field(CONFIG_FILE, error)
    if config.get("auto_map"):
        raise InvalidInputError.of_field(f"{CONFIG_FILE}.auto_map", "names code to import: remove it or set it to null")
