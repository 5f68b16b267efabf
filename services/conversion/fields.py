"""Converts dataclasses from and to messages whose fields and enum values have the same names."""

import dataclasses
import enum
import functools
from typing import Any, get_type_hints

from google.protobuf.message import Message

from engine.errors import FieldViolation


def fields_to_domain(message: Message, cls: Any, path: str, violations: list[FieldViolation]) -> dict[str, Any]:
    """Return the arguments from which `cls` is constructed.

    A field that is unset, or 0 where the proto cannot distinguish 0 from unset, is left to its default. An unknown enum
    value is a violation.
    """
    present = {descriptor.name for descriptor, _ in message.ListFields()}
    hints, arguments = _hints(cls), dict[str, Any]()
    for field in dataclasses.fields(cls):
        if field.name not in present and _has_default(field):
            continue
        value, descriptor = getattr(message, field.name), message.DESCRIPTOR.fields_by_name[field.name]
        if descriptor.enum_type is not None:
            value = _enum_member(hints[field.name], descriptor.enum_type, value, f"{path}.{field.name}", violations)
        elif descriptor.is_repeated:
            # A map's order differs from process to process, and the first key that matches a module counts.
            value = dict(sorted(value.items())) if _is_map(descriptor) else tuple(value)
        arguments[field.name] = value
    return arguments


def fields_to_proto(instance: Any, message: type[Message]) -> Any:
    """Return the message of all fields that are not None."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(instance):
        value, descriptor = getattr(instance, field.name), message.DESCRIPTOR.fields_by_name[field.name]
        if isinstance(value, enum.Enum):
            value = _numbers_by_name(descriptor.enum_type)[value.name]
        if value is not None:
            values[field.name] = value
    return message(**values)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _has_default(field: "dataclasses.Field[Any]") -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _enum_member(
    kind: type[enum.Enum], descriptor: Any, number: int, path: str, violations: list[FieldViolation]
) -> enum.Enum:
    """Return the enum member named like the proto's value; for an unknown value append a violation and return any."""
    members = {number: kind[name] for name, number in _numbers_by_name(descriptor).items()}
    if number not in members:
        choices = ", ".join(f"{number} ({member.name})" for number, member in members.items())
        violations.append(FieldViolation(path, f"{number} is unknown; use one of {choices}"))
    return members.get(number, next(iter(kind)))


def _numbers_by_name(descriptor: Any) -> dict[str, int]:
    """Return an enum's numbers by name, without the name's prefix and without the unspecified value."""
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return {value.name.removeprefix(prefix): value.number for value in descriptor.values if value.number}


def _is_map(field: Any) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)
