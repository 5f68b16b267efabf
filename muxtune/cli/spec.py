"""A task's spec from a YAML file, from flags, or both: the proto's own field names, read by protobuf's JSON mapping."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from google.protobuf.json_format import ParseDict, ParseError

from muxtune.errors import InvalidInputError
from muxtune.v1 import task_pb2


def read_spec(file: Path | None, flags: Mapping[str, Any] | None = None) -> task_pb2.TaskSpec:
    """`flags` override the file, by path ("training.num_steps"). Raises InvalidInputError naming what is wrong."""
    fields = _fields(file) if file else {}
    for path, value in (flags or {}).items():
        _put(fields, path, value)
    try:
        return ParseDict(fields, task_pb2.TaskSpec())
    except ParseError as error:
        raise InvalidInputError(f"{file or 'flags'}: {error}") from error


def read_training(file: Path) -> task_pb2.Training:
    """The training of a task's spec."""
    return read_spec(file).training


def read_settings(texts: list[str]) -> dict[str, Any]:
    """`PATH=VALUE` texts, values as YAML writes them. Raises InvalidInputError."""
    found = {}
    for text in texts:
        path, separator, value = text.partition("=")
        if not (path and separator):
            raise InvalidInputError(f'--set "{text}": write PATH=VALUE, as in training.warmup_steps=10')
        try:
            found[path] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InvalidInputError(f'--set "{text}": the value is not YAML') from error
    return found


def _put(fields: dict[str, Any], path: str, value: Any) -> None:
    *folders, last = path.split(".")
    for name in folders:
        fields = fields.setdefault(name, {})
        if not isinstance(fields, dict):
            raise InvalidInputError(f"{path}: {name} is not a mapping of fields")
    other = {"num_steps": "num_epochs", "num_epochs": "num_steps"}.get(last, "")
    fields.pop(other, None)  # one of the two: what the flag says replaces what the file said
    fields[last] = value


def _fields(file: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{file}: cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidInputError(f"{file}: is not a mapping of a task's fields")
    return fields
