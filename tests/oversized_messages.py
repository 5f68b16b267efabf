"""Requests in which one field is larger than allowed: for each text, list and map that a request can hold, by the
descriptors of the protos, so that a new field is tested, too."""

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from services.message_limits import MAX_ENTRIES, max_bytes_of

_F = FieldDescriptor


def oversized_requests(kind: Descriptor, path: str = "") -> Iterator[tuple[str, Message]]:
    """Yield the path of each field that can be too large, with a request in which nothing but that field is set."""
    for field in kind.fields:
        name = f"{path}.{field.name}" if path else field.name
        message: Any = GetMessageClass(kind)()
        if field.is_repeated:
            _add_entries(getattr(message, field.name), field)
            yield name, message
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for inner_path, inner in oversized_requests(
                field.message_type, f"{name}[0]" if field.is_repeated else name
            ):
                outer: Any = GetMessageClass(kind)()
                value = getattr(outer, field.name)
                (value.add() if field.is_repeated else value).CopyFrom(inner)
                yield inner_path, outer
        elif field.cpp_type == _F.CPPTYPE_STRING and not field.is_repeated:
            setattr(message, field.name, _text(field, max_bytes_of(field) + 1))
            yield name, message
        elif field.cpp_type == _F.CPPTYPE_STRING:
            one: Any = GetMessageClass(kind)()
            getattr(one, field.name).append(_text(field, max_bytes_of(field) + 1))
            yield name, one


def _add_entries(container: Any, field: FieldDescriptor) -> None:
    """Add one entry more than a list or a map may have."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        value = field.message_type.fields_by_name["value"]
        for i in range(MAX_ENTRIES + 1):
            container[str(i)] = "x" if value.cpp_type == _F.CPPTYPE_STRING else 1
    elif field.message_type is not None:
        for _ in range(MAX_ENTRIES + 1):
            container.add()
    else:
        entry = _text(field, 1) if field.cpp_type == _F.CPPTYPE_STRING else 1
        container.extend([entry] * (MAX_ENTRIES + 1))


def _text(field: FieldDescriptor, size: int) -> str | bytes:
    return b"x" * size if field.type == _F.TYPE_BYTES else "x" * size
