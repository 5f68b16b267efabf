"""A task's spec from a YAML file, from flags, or both: the proto's own field names, read by protobuf's JSON mapping."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from google.protobuf.json_format import ParseDict, ParseError

from muxtune.errors import InvalidInputError
from muxtune.v1 import task_pb2


class _Loader(yaml.SafeLoader):
    """What looks like a date stays text: a deadline is read by protobuf, a label is none. Quotes make no difference."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_spec(file: Path | None, flags: Mapping[str, Any] | None = None) -> task_pb2.TaskSpec:
    """`flags` override the file, by path ("training.num_steps"). Raises InvalidInputError naming what is wrong."""
    fields = _fields(file) if file else {}
    for path, value in (flags or {}).items():
        _put(fields, path, value)
    if isinstance(fields.get("deadline"), str):
        fields["deadline"] = _in_utc(fields["deadline"])
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
            found[path] = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise InvalidInputError(f'--set "{text}": the value is not YAML') from error
    return found


def _in_utc(text: str) -> str:
    """A moment as protobuf's JSON has it; one without a zone is UTC, as in YAML. Anything else stays for protobuf to
    refuse."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    if len(text) <= len("2026-01-31"):
        return text  # a day is no moment
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return aware.astimezone(UTC).isoformat().replace("+00:00", "Z")


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
        fields = yaml.load(file.read_text(), _Loader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{file}: cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidInputError(f"{file}: is not a mapping of a task's fields")
    return fields
