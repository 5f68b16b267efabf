"""Protobuf <-> the engine's dataclasses: the only code that knows both, with method_convert.py and plan_convert.py.
Shared defaults live here, as the protos state.

Legend: T tokens of a microbatch.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.timestamp_pb2 import Timestamp
from numpy.typing import NDArray

from engine.alignment.microbatch import Microbatch, MicrobatchKind, Range, Segment
from engine.errors import FieldViolation, InvalidInputError
from engine.methods.base import Method
from engine.results import EvaluationResult, StepResult
from engine.task import TaskSpec, TaskState, Training
from muxtune.v1 import alignment_pb2, dataset_pb2, task_pb2
from services.conversion.method import method_to_domain, method_to_proto

if TYPE_CHECKING:
    from engine.alignment.preflight import Preflight

_KINDS = {
    MicrobatchKind.TRAIN: alignment_pb2.MICROBATCH_KIND_TRAIN,
    MicrobatchKind.EVALUATE: alignment_pb2.MICROBATCH_KIND_EVALUATE,
}


def state_to_proto(state: TaskState) -> task_pb2.TaskState.ValueType:
    number: task_pb2.TaskState.ValueType = task_pb2.TaskState.Value(f"TASK_STATE_{state.name}")
    return number


def state_to_domain(state: int) -> TaskState:
    """Raises InvalidInputError for UNSPECIFIED and unknown values."""
    names = {task_pb2.TaskState.Value(f"TASK_STATE_{s.name}"): s for s in TaskState}
    if state not in names:
        raise InvalidInputError.of_field("states", f"{state} is no task state")
    return names[state]  # type: ignore[index]


def spec_to_domain(spec: task_pb2.TaskSpec, path: str = "spec", method: Method | None = None) -> TaskSpec:
    """The spec with the protos' defaults filled in. `method`: its method, where it was read before.

    Raises InvalidInputError naming every wrong field at once.
    """
    wrong: list[FieldViolation] = []
    method = method or method_to_domain(spec, path, wrong)
    training = _training(spec.training, f"{path}.training", wrong)
    deadline = _deadline(spec, f"{path}.deadline", wrong)
    _refuse(wrong)
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


def _deadline(spec: task_pb2.TaskSpec, path: str, wrong: list[FieldViolation]) -> int:
    """Microseconds since the epoch; 0 for none, and for one that is no time of the years 1 to 9999."""
    try:
        return spec.deadline.ToMicroseconds() if spec.HasField("deadline") else 0
    except ValueError:
        wrong.append(FieldViolation(path, f"{spec.deadline.seconds} seconds are no time of the years 1 to 9999"))
        return 0


def training_to_domain(training: task_pb2.Training, path: str = "training") -> Training:
    """Raises InvalidInputError naming every wrong field at once."""
    wrong: list[FieldViolation] = []
    result = _training(training, path, wrong)
    _refuse(wrong)
    return result


def _refuse(wrong: list[FieldViolation]) -> None:
    if wrong:
        raise InvalidInputError("; ".join(f"{v.field}: {v.description}" for v in wrong), wrong)


def _training(message: task_pb2.Training, path: str, wrong: list[FieldViolation]) -> Training:
    """Each field of the dataclass is the proto's field of that name. A field that is unset, or 0 where the proto cannot
    tell 0 from unset, has the dataclass's default."""
    if message.WhichOneof("duration") is None:
        wrong.append(FieldViolation(f"{path}.duration", "is missing: set num_steps or num_epochs"))
    present = {descriptor.name for descriptor, _ in message.ListFields()}  # not those that are 0 without presence
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Training):
        value, descriptor = getattr(message, field.name), message.DESCRIPTOR.fields_by_name[field.name]
        is_set = field.name in present
        if is_set and descriptor.enum_type is not None:
            value = _choice(type(field.default), descriptor.enum_type, value, f"{path}.{field.name}", wrong)
        values[field.name] = value if is_set or field.default is dataclasses.MISSING else field.default
    return Training(**values)


def _choice(kind: Any, described: EnumDescriptor, value: int, path: str, wrong: list[FieldViolation]) -> Any:
    """The member of `kind` that has the name of the proto's value; its first one where there is none."""
    numbers = {number: kind[name] for name, number in _numbers(described).items()}
    if value not in numbers:
        known = ", ".join(f"{number} ({choice.name})" for number, choice in numbers.items())
        wrong.append(FieldViolation(path, f"{value} is no known value: use one of {known}"))
    return numbers.get(value, next(iter(kind)))


def _numbers(described: EnumDescriptor) -> dict[str, int]:
    """Numbers by name, without the prefix that proto style asks for and without the unspecified value."""
    prefix = described.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return {value.name.removeprefix(prefix): value.number for value in described.values if value.number}


def spec_to_proto(spec: TaskSpec) -> task_pb2.TaskSpec:
    """`spec_to_domain` of it is `spec` again."""
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
    """Every field set, none left to its default. `training_to_domain` of it is `training` again."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(training):
        value, described = getattr(training, field.name), task_pb2.Training.DESCRIPTOR.fields_by_name[field.name]
        if value is not None:
            values[field.name] = value if described.enum_type is None else _numbers(described.enum_type)[value.name]
    return task_pb2.Training(**values)


def microbatch_to_proto(microbatch: Microbatch) -> alignment_pb2.Microbatch:
    return alignment_pb2.Microbatch(
        round=microbatch.round,
        kind=_KINDS[microbatch.kind],
        token_ids=microbatch.token_ids_T.astype("<i4", copy=False).tobytes(),
        targets=microbatch.targets_T.astype("<i4", copy=False).tobytes(),
        ranges=[_range_to_proto(range_) for range_ in microbatch.ranges],
        is_last_in_round=microbatch.is_last_in_round,
    )


def microbatch_to_domain(message: alignment_pb2.Microbatch) -> Microbatch:
    """Raises InvalidInputError if tokens, targets, ranges and segments do not fit each other."""
    token_ids_T = _int32(message.token_ids, "token_ids")
    targets_T = _int32(message.targets, "targets")
    ranges = tuple(_range_to_domain(range_) for range_ in message.ranges)
    end = 0
    for range_ in ranges:
        if range_.start != end:
            raise InvalidInputError.of_field("ranges", f"range of {range_.task} starts at {range_.start}, not {end}")
        if any(s.num_tokens < 1 for s in range_.segments) or range_.num_effective_tokens > range_.num_tokens:
            raise InvalidInputError.of_field(
                "ranges.segments", f"{range_.num_effective_tokens} tokens of {range_.task} in {range_.num_tokens}"
            )
        end += range_.num_tokens
    if not len(token_ids_T) == len(targets_T) == end:
        raise InvalidInputError.of_field(
            "token_ids", f"{len(token_ids_T)} tokens, {len(targets_T)} targets, {end} in ranges"
        )
    kind = next((k for k, v in _KINDS.items() if v == message.kind), None)
    if kind is None:
        raise InvalidInputError.of_field("kind", f"{message.kind} is no kind of microbatch")
    return Microbatch(message.round, kind, token_ids_T, targets_T, ranges, message.is_last_in_round)


def _int32(data: bytes, field: str) -> NDArray[np.int32]:
    if len(data) % 4:
        raise InvalidInputError.of_field(field, f"{len(data)} bytes are no whole number of int32")
    return np.frombuffer(data, dtype="<i4").astype(np.int32)


def _range_to_proto(range_: Range) -> alignment_pb2.Range:
    return alignment_pb2.Range(
        task=range_.task,
        step=range_.step,
        start=range_.start,
        num_tokens=range_.num_tokens,
        segments=[
            alignment_pb2.Segment(num_tokens=s.num_tokens, stream_offset_tokens=s.stream_offset_tokens)
            for s in range_.segments
        ],
        num_step_target_tokens=range_.num_step_target_tokens,
        is_last=range_.is_last,
    )


def _range_to_domain(message: alignment_pb2.Range) -> Range:
    segments = tuple(Segment(s.num_tokens, s.stream_offset_tokens) for s in message.segments)
    return Range(
        message.task,
        message.step,
        message.start,
        message.num_tokens,
        segments,
        message.num_step_target_tokens,
        message.is_last,
    )


def preflight_to_proto(report: "Preflight", max_refused: int = 100) -> dataset_pb2.PreflightReport:
    return dataset_pb2.PreflightReport(
        num_rows=report.num_rows,
        num_train_rows=report.num_train_rows,
        num_heldout_rows=report.num_heldout_rows,
        num_tokens_per_epoch=report.num_tokens_per_epoch,
        num_target_tokens_per_epoch=report.num_target_tokens_per_epoch,
        num_steps=report.num_steps,
        num_train_tokens=report.num_train_tokens,
        samples=[
            dataset_pb2.RenderedRow(
                line=row.line,
                num_tokens=row.num_tokens,
                pieces=[
                    dataset_pb2.RenderedRow.Piece(text=p.text, bears_loss=p.bears_loss, num_tokens=p.num_tokens)
                    for p in row.pieces
                ],
                is_heldout=row.is_heldout,
            )
            for row in report.samples
        ],
        length_histogram=[
            dataset_pb2.LengthBucket(from_tokens=low, to_tokens=high, num_rows=count)
            for (low, high), count in sorted(report.length_histogram.items())
        ],
        num_truncated_rows=report.num_truncated_rows,
        refused_rows=[dataset_pb2.RefusedRow(line=r.line, reason=r.reason) for r in report.refused[:max_refused]],
        num_refused_rows=len(report.refused),
        length_quantiles=report.length_quantiles,
        num_special_text_rows=report.num_special_text_rows,
    )


def step_to_proto(result: StepResult) -> task_pb2.StepDone:
    check = None
    if result.shadow_check is not None:
        check = task_pb2.ShadowCheck(**dataclasses.asdict(result.shadow_check))
    return task_pb2.StepDone(
        shadow_check=check,
        step=result.step,
        loss=result.loss,
        learning_rate=result.learning_rate,
        grad_norm=result.grad_norm,
        effective_tokens=result.num_effective_tokens,
        target_tokens=result.num_target_tokens,
        padding_tokens=result.num_padding_tokens,
        device_seconds=result.seconds,
        num_neighbours=result.num_neighbours,
        input_digest=result.input_digest,
    )


def evaluation_to_proto(result: EvaluationResult) -> task_pb2.Evaluated:
    return task_pb2.Evaluated(step=result.step, loss=result.loss, target_tokens=result.num_target_tokens)
