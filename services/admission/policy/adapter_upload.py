"""Files on their way in from a client, checked against what was announced, and a PEFT folder among them. Pure."""

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
    """Collects a PEFT folder's files in memory, at most `max_bytes` of them."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._announced: dict[str, artifact_pb2.FileHeader] = {}
        self._files: dict[str, bytearray] = {}

    def open(self, header: artifact_pb2.FileHeader) -> None:
        """The next file. Raises InvalidInputError for one that is not of a PEFT folder, or stands twice."""
        if header.file_name not in _PEFT_FILES or header.file_name in self._files:
            raise InvalidInputError.of_field("file.file_name", f'"{header.file_name}": send {", ".join(_PEFT_FILES)}')
        if header.size_bytes < 0:
            raise InvalidInputError.of_field("file.size_bytes", f"{header.size_bytes} must not be negative")
        if sum(f.size_bytes for f in self._announced.values()) + header.size_bytes > self._max_bytes:
            raise QuotaExceededError(f"the adapter is over {self._max_bytes} bytes", subject="adapter")
        self._announced[header.file_name] = header
        self._files[header.file_name] = bytearray()

    def add(self, chunk: artifact_pb2.FileChunk) -> None:
        """The next chunk of the file opened last. Raises ChecksumMismatchError if it does not follow."""
        if not self._files:
            raise InvalidInputError.of_field("chunk", "came before any file")
        name = next(reversed(self._files))
        file = self._files[name]
        if chunk.offset != len(file) or len(file) + len(chunk.data) > self._announced[name].size_bytes:
            raise ChecksumMismatchError(f"{name}: a chunk at {chunk.offset} where {len(file)} was due: send it again")
        file.extend(chunk.data)

    def close(self) -> dict[str, bytes]:
        """Raises ChecksumMismatchError or InvalidInputError unless it is a whole adapter folder."""
        files = {name: bytes(data) for name, data in self._files.items()}
        for name, data in files.items():
            header = self._announced[name]
            if len(data) != header.size_bytes or hashlib.sha256(data).hexdigest() != header.sha256.lower():
                raise ChecksumMismatchError(f"{name}: {len(data)} bytes came that are not the ones announced")
        if missing := [name for name in _PEFT_FILES if name not in files]:
            raise InvalidInputError.of_field("file", f"missing: {', '.join(missing)}")
        _check_config(files[CONFIG_FILE])
        check_safetensors(files[WEIGHTS_FILE], WEIGHTS_FILE)
        return files


def _check_config(data: bytes) -> None:
    """Refuse a configuration that is not of a known method or that names code to import. Source: peft.PeftConfig."""
    if len(data) > _MAX_CONFIG_BYTES:
        raise InvalidInputError.of_field(CONFIG_FILE, f"has {len(data)} bytes; at most {_MAX_CONFIG_BYTES}")
    try:
        config = parse_strict_json(data)
        method = _METHOD_OF[config["peft_type"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        description = f"must be JSON with a peft_type of {', '.join(_METHOD_OF)}"
        raise InvalidInputError.of_field(CONFIG_FILE, description) from None
    if error := method.config_error(config):
        raise InvalidInputError.of_field(CONFIG_FILE, error)
    if config.get("auto_map"):
        raise InvalidInputError.of_field(f"{CONFIG_FILE}.auto_map", "names code to import: remove it or set it to null")
