"""Converts states, specs and training settings of tasks between protobuf and the engine's dataclasses."""

import dataclasses
from typing import Any

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.timestamp_pb2 import Timestamp

from engine.errors import FieldViolation, InvalidInputError
from engine.methods.base import Method
from engine.task import TaskSpec, TaskState, Training
from muxtune.v1 import task_pb2
from services.conversion.method import method_to_domain, method_to_proto


def state_to_proto(state: TaskState) -> task_pb2.TaskState.ValueType:
    number: task_pb2.TaskState.ValueType = task_pb2.TaskState.Value(f"TASK_STATE_{state.name}")
    return number


def state_to_domain(state: int) -> TaskState:
    """Return the state with that number. Raises InvalidInputError for UNSPECIFIED and unknown numbers."""
    names = {task_pb2.TaskState.Value(f"TASK_STATE_{s.name}"): s for s in TaskState}
    if state not in names:
        raise InvalidInputError.of_field("states", f"{state} is not a task state")
    return names[state]  # type: ignore[index]


def spec_to_domain(spec: task_pb2.TaskSpec, path: str = "spec", method: Method | None = None) -> TaskSpec:
    """Return the spec with defaults for the fields that are unset. `method`: its method if converted before.

    Raises InvalidInputError that names every invalid field.
    """
    violations: list[FieldViolation] = []
    method = method or method_to_domain(spec, path, violations)
    training = _training(spec.training, f"{path}.training", violations)
    deadline = _deadline(spec, f"{path}.deadline", violations)
    _raise_any(violations)
    assert method is not None
    return TaskSpec(
        backbone=spec.backbone,
        method=method,
        dataset=spec.dataset,
        training=training,
        dataset_version=spec.dataset_version,
        initial_adapter=spec.initial_adapter,
        labels=dict(spec.labels),
        priority=spec.priority,
        deadline_microseconds=deadline,
    )


def _deadline(spec: task_pb2.TaskSpec, path: str, violations: list[FieldViolation]) -> int:
    """Return microseconds since 1970; 0 if there is no deadline or, with a violation, an invalid one."""
    try:
        return spec.deadline.ToMicroseconds() if spec.HasField("deadline") else 0
    except ValueError:
        violations.append(
            FieldViolation(path, f"{spec.deadline.seconds} seconds since 1970 are outside the years 1 to 9999")
        )
        return 0


def training_to_domain(training: task_pb2.Training, path: str = "training") -> Training:
    """Return the training settings. Raises InvalidInputError that names every invalid field."""
    violations: list[FieldViolation] = []
    result = _training(training, path, violations)
    _raise_any(violations)
    return result


def _raise_any(violations: list[FieldViolation]) -> None:
    if violations:
        raise InvalidInputError.of_fields(violations)


def _training(message: task_pb2.Training, path: str, violations: list[FieldViolation]) -> Training:
    """Copy each field from the proto's field of the same name.

    A field that is unset, or 0 where the proto cannot distinguish 0 from unset, gets the dataclass's default.
    """
    if message.WhichOneof("duration") is None:
        violations.append(FieldViolation(f"{path}.duration", "is missing: set num_steps or num_epochs"))
    present = {
        descriptor.name for descriptor, _ in message.ListFields()
    }  # without fields that are 0 and have no presence
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Training):
        value, descriptor = getattr(message, field.name), message.DESCRIPTOR.fields_by_name[field.name]
        is_set = field.name in present
        if is_set and descriptor.enum_type is not None:
            value = _enum_member(type(field.default), descriptor.enum_type, value, f"{path}.{field.name}", violations)
        values[field.name] = value if is_set or field.default is dataclasses.MISSING else field.default
    return Training(**values)


def _enum_member(
    enum: Any, descriptor: EnumDescriptor, number: int, path: str, violations: list[FieldViolation]
) -> Any:
    """Return the member of `enum` with the name of the proto's value; with a violation, its first if there is none."""
    members = {number: enum[name] for name, number in _numbers_by_name(descriptor).items()}
    if number not in members:
        choices = ", ".join(f"{number} ({member.name})" for number, member in members.items())
        violations.append(FieldViolation(path, f"{number} is unknown; use one of {choices}"))
    return members.get(number, next(iter(enum)))


def _numbers_by_name(descriptor: EnumDescriptor) -> dict[str, int]:
    """Return an enum's numbers by name, without the name's prefix and without the unspecified value."""
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return {value.name.removeprefix(prefix): value.number for value in descriptor.values if value.number}


def spec_to_proto(spec: TaskSpec) -> task_pb2.TaskSpec:
    """Return the message that `spec_to_domain` converts back to `spec`."""
    deadline = Timestamp()
    deadline.FromMicroseconds(spec.deadline_microseconds)
    return task_pb2.TaskSpec(
        **{spec.method.name: method_to_proto(spec.method)},
        backbone=spec.backbone,
        dataset=spec.dataset,
        dataset_version=spec.dataset_version,
        training=training_to_proto(spec.training),
        initial_adapter=spec.initial_adapter,
        labels=spec.labels,
        priority=spec.priority,
        deadline=deadline if spec.deadline_microseconds else None,
    )


def training_to_proto(training: Training) -> task_pb2.Training:
    """Return the message, with every field set, that `training_to_domain` converts back to `training`."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(training):
        value, descriptor = getattr(training, field.name), task_pb2.Training.DESCRIPTOR.fields_by_name[field.name]
        if value is not None:
            values[field.name] = (
                value if descriptor.enum_type is None else _numbers_by_name(descriptor.enum_type)[value.name]
            )
    return task_pb2.Training(**values)
