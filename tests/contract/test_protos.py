"""The protos pass the linter, do not break clients, carry every declared field, and their stubs are up to date."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from muxtune.v1 import (
    admission_pb2,
    alignment_pb2,
    artifact_pb2,
    budget_pb2,
    dataset_pb2,
    errors_pb2,
    event_pb2,
    execution_pb2,
    executor_history_pb2,
    key_pb2,
    ledger_pb2,
    method_pb2,
    operator_pb2,
    plan_pb2,
    scheduling_pb2,
    task_pb2,
)

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"
SOURCES = sorted((PROTOS / "muxtune" / "v1").glob("*.proto"))
MODULES: tuple[ModuleType, ...] = (
    admission_pb2,
    alignment_pb2,
    artifact_pb2,
    budget_pb2,
    dataset_pb2,
    errors_pb2,
    event_pb2,
    execution_pb2,
    executor_history_pb2,
    key_pb2,
    ledger_pb2,
    method_pb2,
    operator_pb2,
    plan_pb2,
    scheduling_pb2,
    task_pb2,
)
FILES: list[FileDescriptor] = [module.DESCRIPTOR for module in MODULES]
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def all_messages() -> list[Descriptor]:
    messages, waiting = [], [message for file in FILES for message in file.message_types_by_name.values()]
    while waiting:
        message = waiting.pop()
        if not message.GetOptions().map_entry:
            messages.append(message)
            waiting += message.nested_types
    return sorted(messages, key=lambda message: message.full_name)


def run(*command: object, cwd: Path = PROTOS) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def buf(*arguments: object, cwd: Path = PROTOS) -> subprocess.CompletedProcess[str]:
    return run(BIN / "buf", *arguments, cwd=cwd)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the protos, which a test may damage."""
    shutil.copytree(PROTOS, tmp_path / "protos")
    return tmp_path / "protos"


def edit(copy: Path, name: str, old: str, new: str) -> None:
    path = copy / "muxtune" / "v1" / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def test_every_proto_is_tested_here() -> None:
    assert {Path(file.name).name for file in FILES} == {path.name for path in SOURCES}


def test_protos_lint() -> None:
    answer = buf("lint")
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_lint_is_alive(copy: Path) -> None:
    edit(copy, "task.proto", "LR_SCHEDULE_UNSPECIFIED = 0;", "LR_SCHEDULE_NOTHING = 0;")
    assert buf("lint", cwd=copy).returncode != 0


def test_nothing_is_broken_since_the_committed_image() -> None:
    answer = buf("breaking", "--against", "image.binpb")
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("task.proto", "  double dropout = 4;\n", "", "Previously present field"),
        ("task.proto", "  double dropout = 4;\n", "  float dropout = 4;\n", "changed type"),
        ("task.proto", "  double dropout = 4;\n", "  double dropout = 50;\n", "Previously present field"),
        ("errors.proto", "  ERROR_REASON_OVERLOADED = 13;\n", "", "Previously present enum value"),
        (
            "key.proto",
            "  rpc ListApiKeys(ListApiKeysRequest) returns (ListApiKeysResponse);\n",
            "",
            "Previously present RPC",
        ),
    ],
    ids=["field removed", "field retyped", "field renumbered", "enum value removed", "rpc removed"],
)
def test_a_break_is_caught(copy: Path, name: str, old: str, new: str, said: str) -> None:
    edit(copy, name, old, new)
    answer = buf("breaking", "--against", PROTOS / "image.binpb", cwd=copy)
    assert answer.returncode != 0 and said in answer.stdout


def test_a_new_method_joins_without_a_break(copy: Path) -> None:
    edit(copy, "task.proto", "    Lora lora = 2;\n", "    Lora lora = 2;\n    Lora another = 80;\n")
    answer = buf("breaking", "--against", PROTOS / "image.binpb", cwd=copy)
    assert answer.returncode == 0, answer.stdout


def test_the_image_holds_every_file() -> None:
    image = descriptor_pb2.FileDescriptorSet.FromString((PROTOS / "image.binpb").read_bytes())
    assert {f"muxtune/v1/{path.name}" for path in SOURCES} <= {file.name for file in image.file}


def test_stubs_are_fresh(tmp_path: Path) -> None:
    plugins = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    answer = run(sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *plugins, *SOURCES, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    fresh = {path.name: path.read_text() for path in (tmp_path / "muxtune" / "v1").iterdir()}
    folder = ROOT / "muxtune" / "v1"
    committed = {p.name: p.read_text() for p in folder.glob("*_pb2*.py*") if p.suffix in (".py", ".pyi")}
    stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    assert not stale, f"run `make protos`: {stale}"


def scalar(field: FieldDescriptor) -> Any:
    """Return a value that is not the default and shows a loss of bits."""
    kinds: dict[int, Any] = {
        FieldDescriptor.CPPTYPE_INT32: -(2**31),
        FieldDescriptor.CPPTYPE_INT64: 2**62 + 1,
        FieldDescriptor.CPPTYPE_UINT32: 2**32 - 1,
        FieldDescriptor.CPPTYPE_UINT64: 2**64 - 1,
        FieldDescriptor.CPPTYPE_DOUBLE: 0.1 + 1e-16,
        FieldDescriptor.CPPTYPE_FLOAT: 0.5,
        FieldDescriptor.CPPTYPE_BOOL: True,
    }
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return b"\x00\xff\x80" if field.type == FieldDescriptor.TYPE_BYTES else "ünï\u2028code"
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return field.enum_type.values[-1].number
    return kinds[field.cpp_type]


def fill(message: Message, depth: int = 6) -> Message:
    """Set every field; of a oneof, the last one."""
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.full_name == "google.protobuf.FieldMask":
            value.paths.extend(["max_tokens_per_day", "a.b"])
        elif field.message_type is not None and field.message_type.full_name.startswith("google."):
            value.seconds, value.nanos = 1_700_000_000, 5_000_000
        elif field.message_type is not None and field.message_type.GetOptions().map_entry:
            value[scalar(field.message_type.fields_by_name["key"])] = scalar(field.message_type.fields_by_name["value"])
        elif field.is_repeated:
            value.append(
                fill(GetMessageClass(field.message_type)(), depth - 1) if field.message_type else scalar(field)
            )
        elif field.message_type is not None:
            fill(value, depth - 1)
            value.SetInParent()
        else:
            setattr(message, field.name, scalar(field))
    return message


@pytest.mark.parametrize("descriptor", all_messages(), ids=lambda descriptor: descriptor.name)
def test_a_message_survives_the_wire_and_json(descriptor: Descriptor) -> None:
    cls = GetMessageClass(descriptor)
    message = fill(cls())
    assert cls.FromString(message.SerializeToString()) == message
    assert json_format.Parse(json_format.MessageToJson(message), cls()) == message
    for oneof in descriptor.oneofs:
        for arm in oneof.fields:
            one = cls()
            if arm.message_type is not None:
                getattr(one, arm.name).SetInParent()
            else:
                setattr(one, arm.name, scalar(arm))
            assert cls.FromString(one.SerializeToString()).WhichOneof(oneof.name) == arm.name


def test_every_enum_begins_with_unspecified() -> None:
    enums = [enum for file in FILES for enum in file.enum_types_by_name.values()]
    enums += [enum for message in all_messages() for enum in message.enum_types]
    assert enums
    for enum in enums:
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED"), enum.full_name


def test_every_rpc_says_its_statuses() -> None:
    """Each service lists the statuses of all its RPCs, and no two RPCs share a message."""
    seen: set[str] = set()
    for path in SOURCES:
        text = path.read_text()
        if "\nservice " in text:
            assert "UNAUTHENTICATED" in text.partition("\nservice ")[0], path.name
    for file in FILES:
        for service in file.services_by_name.values():
            for method in service.methods:
                assert method.input_type.full_name not in seen and method.output_type.full_name not in seen
                seen |= {method.input_type.full_name, method.output_type.full_name}


def test_protos_are_short() -> None:
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 250, path.name
