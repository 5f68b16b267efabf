"""Converts states, specs and training settings of tasks between protobuf and the engine's dataclasses."""

from google.protobuf.timestamp_pb2 import Timestamp

from engine.errors import FieldViolation, InvalidInputError
from engine.methods.base import Method
from engine.task import TaskSpec, TaskState, Training
from muxtune.v1 import task_pb2
from services.conversion.fields import fields_to_domain, fields_to_proto
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
    """Return microseconds since 1970; 0 without a deadline. An invalid one appends a violation."""
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
    if message.WhichOneof("duration") is None:
        violations.append(FieldViolation(f"{path}.duration", "is missing: set num_steps or num_epochs"))
    return Training(**fields_to_domain(message, Training, path, violations))


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
    result: task_pb2.Training = fields_to_proto(training, task_pb2.Training)
    return result
