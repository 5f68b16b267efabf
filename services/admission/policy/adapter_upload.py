"""Receives the files of an uploaded PEFT adapter and checks them against what their headers announce. Pure."""

import hashlib

from engine.errors import ChecksumMismatchError, InvalidInputError, QuotaExceededError
from engine.methods import METHODS
from engine.strict_json import parse_strict_json
from muxtune.v1 import artifact_pb2
from services.admission.policy.safetensors_check import check_safetensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PEFT_FILES = (CONFIG_FILE, WEIGHTS_FILE)
_METHOD_OF = {kind: method for method in METHODS.values() for kind in (method.peft_type, *method.other_peft_types)}
_MAX_CONFIG_BYTES = 256 << 10


class AdapterUpload:
    """Collects an adapter's files in memory, at most `max_bytes` in all."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._announced: dict[str, artifact_pb2.FileHeader] = {}
        self._files: dict[str, bytearray] = {}

    def start_file(self, header: artifact_pb2.FileHeader) -> None:
        """Begin the next file. Raises InvalidInputError for an unexpected or repeated file, QuotaExceededError for too
        many bytes."""
        if header.file_name not in _PEFT_FILES or header.file_name in self._files:
            raise InvalidInputError.of_field(
                "file.file_name", f'"{header.file_name}" must be one of {", ".join(_PEFT_FILES)}, each once'
            )
        if header.size_bytes < 0:
            raise InvalidInputError.of_field("file.size_bytes", f"{header.size_bytes} must not be negative")
        if sum(f.size_bytes for f in self._announced.values()) + header.size_bytes > self._max_bytes:
            raise QuotaExceededError(
                f"the adapter has more than {self._max_bytes} bytes: reduce its rank or target modules",
                subject="adapter",
            )
        self._announced[header.file_name] = header
        self._files[header.file_name] = bytearray()

    def add_chunk(self, chunk: artifact_pb2.FileChunk) -> None:
        """Append a chunk to the file that began last. Raises ChecksumMismatchError for a wrong offset or length."""
        if not self._files:
            raise InvalidInputError.of_field("chunk", "must follow a file header")
        name = next(reversed(self._files))
        file = self._files[name]
        if chunk.offset != len(file) or len(file) + len(chunk.data) > self._announced[name].size_bytes:
            raise ChecksumMismatchError(
                f"{name}: the chunk at offset {chunk.offset} does not continue the file at {len(file)}: upload again"
            )
        file.extend(chunk.data)

    def finish(self) -> dict[str, bytes]:
        """Return the files. Raises ChecksumMismatchError or InvalidInputError unless they are a valid adapter."""
        files = {name: bytes(data) for name, data in self._files.items()}
        for name, data in files.items():
            header = self._announced[name]
            if len(data) != header.size_bytes or hashlib.sha256(data).hexdigest() != header.sha256.lower():
                raise ChecksumMismatchError(
                    f"{name}: the {len(data)} bytes received do not match the header's size and SHA-256: upload again"
                )
        if missing := [name for name in _PEFT_FILES if name not in files]:
            raise InvalidInputError.of_field("file", f"{', '.join(missing)} must be sent, too")
        _check_config(files[CONFIG_FILE])
        check_safetensors(files[WEIGHTS_FILE], WEIGHTS_FILE)
        return files


def _check_config(data: bytes) -> None:
    """Refuse a configuration that is not of a known method or that names code to import. Source: peft.PeftConfig."""
    if len(data) > _MAX_CONFIG_BYTES:
        raise InvalidInputError.of_field(CONFIG_FILE, f"must have at most {_MAX_CONFIG_BYTES} bytes, has {len(data)}")
    try:
        config = parse_strict_json(data)
        method = _METHOD_OF[config["peft_type"]]
    except (ValueError, KeyError, TypeError):
        description = f"must be JSON with a peft_type of {', '.join(_METHOD_OF)}"
        raise InvalidInputError.of_field(CONFIG_FILE, description) from None
    if error := method.config_error(config):
        raise InvalidInputError.of_field(CONFIG_FILE, error)
    if config.get("auto_map"):
        raise InvalidInputError.of_field(f"{CONFIG_FILE}.auto_map", "names code to import: remove it or set it to null")
