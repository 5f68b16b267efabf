"""Reads a task's spec from a YAML file, from flags, or from both, by the proto's field names (protobuf's JSON)."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from google.protobuf.json_format import ParseDict, ParseError

from muxtune.errors import InvalidInputError
from muxtune.v1 import task_pb2


class _Loader(yaml.SafeLoader):
    """Reads dates as text, quoted or not: protobuf reads a deadline, and a label is never a date."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_spec(file: Path | None, flags: Mapping[str, Any] | None = None) -> task_pb2.TaskSpec:
    """Return the spec in `file`, overridden by `flags`, which are named by path ("training.num_steps").

    Raises InvalidInputError, which names the field.
    """
    fields = _fields(file) if file else {}
    for path, value in (flags or {}).items():
        _put(fields, path, value)
    if isinstance(fields.get("deadline"), str):
        fields["deadline"] = _add_utc(fields["deadline"])
    try:
        return ParseDict(fields, task_pb2.TaskSpec())
    except ParseError as error:
        raise InvalidInputError(f"{file or 'flags'}: {error}") from error


def read_training(file: Path) -> task_pb2.Training:
    """Return the training of the spec in a file."""
    return read_spec(file).training


def read_settings(texts: list[str]) -> dict[str, Any]:
    """Return values by path from texts like `PATH=VALUE`, whose values are YAML. Raises InvalidInputError."""
    settings = {}
    for text in texts:
        path, separator, value = text.partition("=")
        if not (path and separator):
            raise InvalidInputError(f'--set "{text}": write PATH=VALUE, as in training.warmup_steps=10')
        try:
            settings[path] = yaml.load(value, _Loader)
        except (yaml.YAMLError, RecursionError) as error:
            raise InvalidInputError(f'--set "{text}": the value is not YAML') from error
    return settings


def _add_utc(text: str) -> str:
    """Return a time as protobuf's JSON writes it; without a zone it is UTC, as in YAML.

    A text that is not a time is returned unchanged; protobuf refuses it.
    """
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        return text
    if len(text) <= len("2026-01-31"):
        return text  # a date without a time
    zoned = parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
    return zoned.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _put(fields: dict[str, Any], path: str, value: Any) -> None:
    *folders, last = path.split(".")
    for name in folders:
        fields = fields.setdefault(name, {})
        if not isinstance(fields, dict):
            raise InvalidInputError(f"{path}: {name} is not a mapping of fields")
    other = {"num_steps": "num_epochs", "num_epochs": "num_steps"}.get(last, "")
    fields.pop(other, None)  # fields of one oneof: the flag's field replaces the file's
    fields[last] = value


def _fields(file: Path) -> dict[str, Any]:
    try:
        fields = yaml.load(file.read_text(), _Loader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInputError(f"{file}: cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidInputError(f"{file}: is not a mapping of a task's fields")
    return fields
