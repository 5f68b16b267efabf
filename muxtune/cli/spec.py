"""A task's spec from a YAML file: the same field names as the proto, read by protobuf's own JSON mapping."""

from pathlib import Path
from typing import Any

import yaml
from google.protobuf.json_format import ParseDict, ParseError

from muxtune.errors import InvalidInputError
from muxtune.v1 import task_pb2


def read_spec(file: Path) -> task_pb2.TaskSpec:
    """Raises InvalidInputError naming the file and what in it is wrong."""
    try:
        return ParseDict(_fields(file), task_pb2.TaskSpec())
    except ParseError as error:
        raise InvalidInputError(f"{file}: {error}") from error


def read_training(file: Path) -> task_pb2.Training:
    """The training of a task's spec."""
    return read_spec(file).training


def _fields(file: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{file}: cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidInputError(f"{file}: is not a mapping of a task's fields")
    return fields
