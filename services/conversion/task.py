"""Protobuf <-> the engine's dataclasses: the only code that knows both, with method_convert.py and plan_convert.py.
Shared defaults live here, as the protos state.

Legend: T tokens of a microbatch.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from numpy.typing import NDArray

from engine.alignment.microbatch import Microbatch, MicrobatchKind, Range, Segment
from engine.errors import FieldViolation, InvalidInputError
from engine.methods.base import Method
from engine.results import EvaluationResult, StepResult
from engine.task import LrSchedule, Optimizer, Overlength, TaskSpec, TaskState, Training
from muxtune.v1 import alignment_pb2, dataset_pb2, task_pb2
from services.conversion.method import method_to_domain, method_to_proto

if TYPE_CHECKING:
    from engine.alignment.preflight import Preflight

E = TypeVar("E", LrSchedule, Optimizer, Overlength)

_SCHEDULES = dict(enumerate((LrSchedule.LINEAR, LrSchedule.CONSTANT, LrSchedule.LINEAR, LrSchedule.COSINE)))
_OPTIMIZERS = dict(enumerate((Optimizer.ADAMW, Optimizer.ADAMW, Optimizer.SGD)))
_OVERLENGTHS = dict(enumerate((Overlength.TRUNCATE, Overlength.TRUNCATE, Overlength.DROP, Overlength.REFUSE)))
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


def _training(t: task_pb2.Training, path: str, wrong: list[FieldViolation]) -> Training:
    duration = t.WhichOneof("duration")
    if duration is None:
        wrong.append(FieldViolation(f"{path}.duration", "is missing: set num_steps or num_epochs"))
    return Training(
        learning_rate=t.learning_rate,
        num_steps=t.num_steps if duration == "num_steps" else None,
        num_epochs=t.num_epochs if duration == "num_epochs" else None,
        lr_schedule=_choice(_SCHEDULES, t.lr_schedule, f"{path}.lr_schedule", wrong),
        warmup_steps=t.warmup_steps,
        micro_batch_size=t.micro_batch_size or 4,
        global_batch_size=t.global_batch_size or 8,
        max_sequence_tokens=t.max_sequence_tokens or 512,
        overlength=_choice(_OVERLENGTHS, t.overlength, f"{path}.overlength", wrong),
        optimizer=_choice(_OPTIMIZERS, t.optimizer, f"{path}.optimizer", wrong),
        weight_decay=t.weight_decay,
        beta1=t.beta1 if t.HasField("beta1") else 0.9,
        beta2=t.beta2 if t.HasField("beta2") else 0.999,
        epsilon=t.epsilon if t.HasField("epsilon") else 1e-8,
        momentum=t.momentum,
        max_grad_norm=t.max_grad_norm if t.HasField("max_grad_norm") else 1.0,
        seed=t.seed,
        shuffle=t.shuffle if t.HasField("shuffle") else True,
        heldout_fraction=t.heldout_fraction,
        evaluate_every_steps=t.evaluate_every_steps,
        early_stop_patience=t.early_stop_patience,
        early_stop_min_delta=t.early_stop_min_delta,
        verify_every_steps=t.verify_every_steps,
        parse_special_tokens=t.parse_special_tokens,
    )


def _choice(table: Mapping[int, E], value: int, path: str, wrong: list[FieldViolation]) -> E:
    if value not in table:
        known = ", ".join(f"{number} ({choice.name})" for number, choice in table.items() if number)
        wrong.append(FieldViolation(path, f"{value} is no known value: use one of {known}"))
    return table.get(value, table[0])


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
    fields = {f.name: getattr(training, f.name) for f in dataclasses.fields(training)}
    enums = {
        "lr_schedule": _number_of(_SCHEDULES, training.lr_schedule),
        "optimizer": _number_of(_OPTIMIZERS, training.optimizer),
        "overlength": _number_of(_OVERLENGTHS, training.overlength),
    }
    return task_pb2.Training(**{name: value for name, value in {**fields, **enums}.items() if value is not None})


def _number_of(table: Mapping[int, E], choice: E) -> int:
    return next(number for number, known in table.items() if number and known is choice)


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
