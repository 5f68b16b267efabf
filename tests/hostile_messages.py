"""Hostile messages, drawn by hypothesis from the descriptors of the protos."""

import os
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from muxtune.upload_status import upload_response
from tests.thoroughness import examples

# Of each RPC; 2500 make the 100,000 of the long mode.
NUM_EXAMPLES = int(os.environ.get("MUXTUNE_FUZZ_EXAMPLES") or examples(15))
FUZZING = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
PATIENT = pytest.mark.timeout(300 + NUM_EXAMPLES)  # seconds
_MAX_DEPTH = 4
_TIMEOUT_SECONDS = 20.0
# What a peer may answer to nonsense; INTERNAL, UNKNOWN, DATA_LOSS and a hang are ours.
FAIR = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
}
_F = FieldDescriptor
_INTEGERS = {
    _F.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    _F.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    _F.CPPTYPE_UINT32: (0, 2**32 - 1),
    _F.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_ODD_TEXTS = [
    "", "\0", "../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://169.254.169.254/", "s3://x/y",
    "tenants/../tasks/x", "tenants/a/tasks/" + "x" * 70, "x" * 5000, "'; DROP TABLE tasks; --", "%s%n{}{0}", "\u202e",
    "\U0001f4a3" * 50, "q_proj", "all-linear", "(a+)+$", ".*", "tiny", "NaN", "-1", "1e999", "a\nb\r\nc", "\ufeff",
]  # fmt: skip


def texts(names: Sequence[str]) -> st.SearchStrategy[str]:
    return st.one_of(st.sampled_from([*names, *_ODD_TEXTS]), st.text(max_size=20))


def messages(kind: Descriptor, names: Sequence[str], depth: int = _MAX_DEPTH) -> st.SearchStrategy[Message]:
    """Return a strategy for any message of that type. Many of its strings are one of `names`."""

    @st.composite
    def build(draw: st.DrawFn) -> Message:
        message = GetMessageClass(kind)()
        for field in kind.fields:
            if draw(st.integers(0, 3)) and (depth > 0 or field.cpp_type != _F.CPPTYPE_MESSAGE):
                _fill(message, field, names, draw, depth)
        return message

    return build()


def streams(kind: Descriptor, names: Sequence[str]) -> st.SearchStrategy[list[Message]]:
    return st.lists(messages(kind, names), max_size=6)


def _fill(message: Any, field: FieldDescriptor, names: Sequence[str], draw: st.DrawFn, depth: int) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        _fill_map(message, field, names, draw)
    elif field.cpp_type == _F.CPPTYPE_MESSAGE:
        inner = messages(field.message_type, names, depth - 1)
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(inner, max_size=2)))
        else:
            getattr(message, field.name).CopyFrom(draw(inner))
    elif field.is_repeated:
        getattr(message, field.name).extend(draw(st.lists(_scalar(field, names), max_size=3)))
    else:
        setattr(message, field.name, draw(_scalar(field, names)))


def _fill_map(message: Any, field: FieldDescriptor, names: Sequence[str], draw: st.DrawFn) -> None:
    key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
    if value.cpp_type != _F.CPPTYPE_MESSAGE:
        getattr(message, field.name).update(
            draw(st.dictionaries(_scalar(key, names), _scalar(value, names), max_size=3))
        )


def _scalar(field: FieldDescriptor, names: Sequence[str]) -> st.SearchStrategy[Any]:
    if field.cpp_type in _INTEGERS:
        low, high = _INTEGERS[field.cpp_type]
        ordinary = st.integers(max(low, -2), 64)
        return st.one_of(ordinary, st.sampled_from([low, high, high - 1]), st.integers(low, high))
    if field.cpp_type in (_F.CPPTYPE_DOUBLE, _F.CPPTYPE_FLOAT):
        width = 64 if field.cpp_type == _F.CPPTYPE_DOUBLE else 32
        return st.one_of(st.sampled_from([0.0, 0.5, -1.0, float("nan"), float("inf")]), st.floats(width=width))
    if field.cpp_type == _F.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type == _F.CPPTYPE_ENUM:
        numbers = [value.number for value in field.enum_type.values]
        return st.sampled_from([*numbers, 999, -1, 2**31 - 1])
    if field.type == _F.TYPE_BYTES:
        return st.binary(max_size=200)
    return texts(names)


async def answer_of(channel: grpc.aio.Channel, method: MethodDescriptor, sent: Any, token: str) -> Any:
    """Calls by descriptor: (status, its text, answers). `sent`: a message, a list of them, or raw bytes."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    shape = ("stream" if method.client_streaming else "unary") + ("_stream" if method.server_streaming else "_unary")
    start = getattr(channel, shape)(
        path,
        request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    parts = sent if isinstance(sent, list) else [sent]
    call = start(
        iter(parts) if method.client_streaming else parts[0],
        metadata=[("authorization", f"Bearer {token}")],
        timeout=_TIMEOUT_SECONDS,
    )
    answers = []
    try:
        if method.server_streaming:
            async for response in call:
                answers.append(response)
                if len(answers) == 3:
                    call.cancel()
                    return grpc.StatusCode.OK, "", answers
        else:
            answers.append(await (upload_response(call) if method.client_streaming else call))
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or "", answers
    return grpc.StatusCode.OK, "", answers
