"""Converts a task's method between protobuf and its dataclass: fields and enum members correspond by name.

A field that a request leaves 0, empty or UNSPECIFIED gets the dataclass's default.
"""

import dataclasses
import enum
import re
from functools import cache
from typing import Any, get_type_hints

from google.protobuf.descriptor import FieldDescriptor

from engine.errors import FieldViolation
from engine.methods import METHODS
from engine.methods.base import Method
from muxtune.v1 import task_pb2


def method_to_domain(spec: task_pb2.TaskSpec, path: str, violations: list[FieldViolation]) -> Method | None:
    """Return the method; None, and append to `violations`, if it is missing or has an unknown enum value."""
    name = spec.WhichOneof("method")
    if name is None or name not in METHODS:
        violations.append(FieldViolation(f"{path}.method", f"is missing; set one of {', '.join(METHODS)}"))
        return None
    message, hints, optional = getattr(spec, name), _hints(METHODS[name]), _fields_with_default(METHODS[name])
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if not value and field.name in optional:
            continue
        if field.enum_type is not None:
            value = _enum_to_domain(field, value, hints[field.name], f"{path}.{name}.{field.name}", violations)
        elif _is_map(field):
            value = dict(value)
        elif field.is_repeated:
            value = tuple(value)
        values[field.name] = value
    return METHODS[name](**values)


def method_to_proto(method: Method) -> Any:
    """Return the message that `method_to_domain` converts back to `method`."""
    holder = task_pb2.TaskSpec()
    message = getattr(holder, method.name)
    message.SetInParent()
    for field in message.DESCRIPTOR.fields:
        value = getattr(method, field.name)
        if isinstance(value, enum.Enum):
            value = field.enum_type.values_by_name[_prefix(field) + value.name].number
        if field.is_repeated:
            (getattr(message, field.name).update if _is_map(field) else getattr(message, field.name).extend)(value)
        else:
            setattr(message, field.name, value)
    return message


def _enum_to_domain(
    field: FieldDescriptor, number: int, choices: type[enum.Enum], path: str, violations: list[FieldViolation]
) -> enum.Enum | None:
    assert field.enum_type is not None
    names = {value.number: value.name.removeprefix(_prefix(field)) for value in field.enum_type.values if value.number}
    if number not in names:
        choices_text = ", ".join(f"{n} ({name})" for n, name in names.items())
        violations.append(FieldViolation(path, f"{number} is unknown; use one of {choices_text}"))
        return None
    return choices[names[number]]


def _prefix(field: FieldDescriptor) -> str:
    """Return the prefix of the enum's value names: "LORA_BIAS_" for LoraBias."""
    assert field.enum_type is not None
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", field.enum_type.name).upper() + "_"


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


@cache
def _hints(method: type[Method]) -> dict[str, Any]:
    return get_type_hints(method)


@cache
def _fields_with_default(method: type[Method]) -> frozenset[str]:
    """Return the names of the fields with a default."""
    missing = (dataclasses.MISSING, dataclasses.MISSING)
    fields = dataclasses.fields(method)  # type: ignore[arg-type]
    return frozenset(f.name for f in fields if (f.default, f.default_factory) != missing)
