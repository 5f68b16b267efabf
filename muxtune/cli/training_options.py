"""Command-line options for the fields of Training, derived from the proto: each new field gets an option."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from google.protobuf.descriptor import FieldDescriptor

from muxtune.v1 import task_pb2

_SHORT = {"num_steps": "--steps", "num_epochs": "--epochs"}
_KINDS = {
    FieldDescriptor.CPPTYPE_INT32: int,
    FieldDescriptor.CPPTYPE_UINT64: int,
    FieldDescriptor.CPPTYPE_DOUBLE: float,
    FieldDescriptor.CPPTYPE_BOOL: bool,
    FieldDescriptor.CPPTYPE_ENUM: str,
}


def with_training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the command's parameter `training` by one option for each field of Training.

    The command gets a dict of the options that were set, by field name. Enum values are the proto's names, with or
    without the prefix: "cosine" and "LR_SCHEDULE_COSINE" are the same.
    """
    fields = list(task_pb2.Training.DESCRIPTOR.fields)
    signature = inspect.signature(command)
    others = [parameter for name, parameter in signature.parameters.items() if name != "training"]
    options = [_parameter(field) for field in fields]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        training = {field.name: _value(field, values.pop(field.name)) for field in fields}
        command(**values, training={name: value for name, value in training.items() if value is not None})

    run.__signature__ = signature.replace(parameters=[*others, *options])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*others, *options)}
    return run


def _parameter(field: FieldDescriptor) -> inspect.Parameter:
    long = f"--{field.name.replace('_', '-')}"
    kind = _KINDS[field.cpp_type]
    names = [f"{long}/--no-{long.removeprefix('--')}"] if kind is bool else [long]
    if field.name in _SHORT:
        names.append(_SHORT[field.name])
    values = field.enum_type.values[1:] if field.enum_type else ()
    choices = ", ".join(value.name.removeprefix(_prefix(field)).lower() for value in values)
    option = typer.Option(*names, help=choices, rich_help_panel="Training", show_default=False)
    annotation: Any = Annotated[kind | None, option]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _value(field: FieldDescriptor, value: Any) -> Any:
    """Return the value as protobuf's JSON mapping reads it."""
    if value is None or field.enum_type is None:
        return value
    name = value.upper()
    return name if name.startswith(_prefix(field)) else _prefix(field) + name


def _prefix(field: FieldDescriptor) -> str:
    assert field.enum_type is not None
    return str(field.enum_type.values[0].name).removesuffix("UNSPECIFIED")
