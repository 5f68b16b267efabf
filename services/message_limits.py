"""Limits of messages: each text, list and map of a request has a largest size, and unknown fields can be found. Pure.

The limits are far above what a real request needs. They bound the work that one request can cause before its own rules
are checked.
"""

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from engine.errors import FieldViolation

MAX_TEXT_BYTES, MAX_ENTRIES = 1024, 1024  # of a text (or bytes), and of a list or map
_LARGER_BYTES = {"muxtune.v1.FileChunk.data": 2 << 20}  # clients send about 1 MiB
_MAX_DEPTH = 20
_TEXT = FieldDescriptor.CPPTYPE_STRING


def max_bytes_of(field: FieldDescriptor) -> int:
    """Return the largest size of the field's text or bytes, or of each entry's."""
    return _LARGER_BYTES.get(field.full_name, MAX_TEXT_BYTES)


def oversized_fields(message: Message, path: str = "", except_type: str = "") -> Iterator[FieldViolation]:
    """Yield the fields of the message, and of messages in it, that are too large. Messages of `except_type` (a full
    name) are not looked at: their service checks them itself."""
    for field, value in message.ListFields():
        name = f"{path}.{field.name}" if path else field.name
        if field.is_repeated and len(value) > MAX_ENTRIES:
            yield FieldViolation(name, f"has {len(value)} entries, at most {MAX_ENTRIES} are allowed: shorten it")
            continue
        for key, entry in _entries(field, name, value):
            if isinstance(entry, Message):
                if entry.DESCRIPTOR.full_name != except_type:
                    yield from oversized_fields(entry, key, except_type)
            elif isinstance(entry, str | bytes) and (size := _size(entry)) > (limit := max_bytes_of(field)):
                yield FieldViolation(key, f"has {size} bytes, at most {limit} are allowed: shorten it")


def unknown_fields(message: Message, path: str = "", depth: int = 0) -> Iterator[FieldViolation]:
    """Yield the fields of the message, and of messages in it, that this version does not know: by number, as their
    names are not sent."""
    found: Any = UnknownFieldSet(message)  # its stub does not say that it can be iterated
    for unknown in found:
        field = f"{path}.{unknown.field_number}" if path else str(unknown.field_number)
        yield FieldViolation(
            field,
            f"field number {unknown.field_number} of {message.DESCRIPTOR.name} is unknown to this version of muxtune: "
            "remove it, or have the service upgraded",
        )
    for field_descriptor, value in message.ListFields():
        name = f"{path}.{field_descriptor.name}" if path else field_descriptor.name
        for key, entry in _entries(field_descriptor, name, value):
            if isinstance(entry, Message) and depth < _MAX_DEPTH:
                yield from unknown_fields(entry, key, depth + 1)


def largest_field(message: Message, path: str = "") -> tuple[str, int]:
    """Return the path of the largest field that holds no message, and its bytes."""
    largest = path, 0
    for field, value in message.ListFields():
        name = f"{path}.{field.name}" if path else field.name
        if field.message_type is not None and not field.is_repeated:
            largest = max(largest, largest_field(value, name), key=lambda found: found[1])
        else:
            alone = type(message)()
            getattr(alone, field.name).MergeFrom(value) if field.is_repeated else setattr(alone, field.name, value)
            largest = max(largest, (name, alone.ByteSize()), key=lambda found: found[1])
    return largest


def _entries(field: FieldDescriptor, name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values of a field, of a list or of a map (its keys too), each with its path."""
    if not field.is_repeated:
        yield name, value
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        for key in value:
            yield name, key
            yield f"{name}[{key:.40}]" if isinstance(key, str) else f"{name}[{key}]", value[key]
    elif field.message_type is not None or field.cpp_type == _TEXT:
        for index, entry in enumerate(value):
            yield f"{name}[{index}]", entry


def _size(text: str | bytes) -> int:
    return len(text) if isinstance(text, bytes) else len(text.encode())
