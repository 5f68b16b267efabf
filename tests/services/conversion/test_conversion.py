"""Protos and dataclasses convert to each other without loss; all invalid fields are named at once."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.alignment.microbatch import IGNORE, Microbatch, MicrobatchKind, Range, Segment
from engine.alignment.preflight import LossSpan, Preflight, RenderedRow
from engine.errors import InvalidInputError
from engine.methods import Lora
from engine.task import LrSchedule, Optimizer, Overlength, TaskSpec, TaskState, Training
from muxtune.v1 import alignment_pb2, plan_pb2, task_pb2
from services.conversion import microbatch as microbatch_conversion
from services.conversion import plan as plan_conversion
from services.conversion import preflight as preflight_conversion
from services.conversion import task as task_conversion
from tests.thoroughness import examples

positive = st.integers(1, 2**31 - 1)
natural = st.integers(0, 2**31 - 1)
real = st.floats(allow_nan=False)
text = st.text(max_size=20)
durations = st.one_of(st.tuples(natural, st.none()), st.tuples(st.none(), natural))
trainings = st.builds(
    lambda duration, **fields: Training(num_steps=duration[0], num_epochs=duration[1], **fields),
    duration=durations,
    learning_rate=real,
    lr_schedule=st.sampled_from(LrSchedule),
    warmup_steps=natural,
    micro_batch_size=positive,
    global_batch_size=positive,
    max_sequence_tokens=positive,
    overlength=st.sampled_from(Overlength),
    optimizer=st.sampled_from(Optimizer),
    weight_decay=real,
    beta1=real,
    beta2=real,
    epsilon=real,
    momentum=real,
    max_grad_norm=real,
    seed=st.integers(0, 2**64 - 1),
    shuffle=st.booleans(),
    heldout_fraction=real,
    evaluate_every_steps=natural,
    early_stop_patience=natural,
    early_stop_min_delta=real,
)
specs = st.builds(
    TaskSpec,
    backbone=text,
    method=st.builds(
        Lora,
        rank=natural,
        alpha=real.filter(bool),
        target_modules=st.lists(text, max_size=3).map(tuple),
        dropout=real,
    ),
    dataset=text,
    training=trainings,
    dataset_version=text,
    initial_adapter=text,
    labels=st.dictionaries(text, text, max_size=3),
    priority=st.integers(-(2**31), 2**31 - 1),
    deadline_microseconds=st.integers(0, 2**52),
)


@settings(max_examples=examples(100), deadline=None)
@given(specs)
def test_a_spec_survives_the_wire(spec: TaskSpec) -> None:
    sent = task_conversion.spec_to_proto(spec).SerializeToString()
    assert task_conversion.spec_to_domain(task_pb2.TaskSpec.FromString(sent)) == spec


def test_every_field_of_training_is_on_both_sides() -> None:
    domain = {field.name for field in dataclasses.fields(Training)}
    assert domain == {field.name for field in task_pb2.Training.DESCRIPTOR.fields}


def test_a_map_has_the_same_order_in_every_process() -> None:
    """The first key that matches a module counts, and a process reads a proto's map in an order of its own."""
    ranks = {f"layers.{i}.q_proj": i + 1 for i in range(40)} | {"q_proj": 99}
    message = task_pb2.TaskSpec(
        lora=task_pb2.Lora(rank=2, target_modules=["q_proj"], rank_pattern=ranks),
        training=task_pb2.Training(learning_rate=0.1, num_steps=1),
    )
    for copy in (message, task_pb2.TaskSpec.FromString(message.SerializeToString())):
        assert list(task_conversion.spec_to_domain(copy).method.rank_pattern) == sorted(ranks)  # type: ignore[attr-defined]


def test_unset_fields_have_the_protos_defaults() -> None:
    spec = task_pb2.TaskSpec(lora=task_pb2.Lora(rank=8), training=task_pb2.Training(learning_rate=1e-3, num_steps=5))
    domain = task_conversion.spec_to_domain(spec)
    assert domain.method == Lora(rank=8, alpha=8.0, target_modules=(), dropout=0.0)
    assert domain.training == Training(learning_rate=1e-3, num_steps=5)


def test_zero_differs_from_unset_where_the_proto_has_presence() -> None:
    message = task_pb2.Training(num_epochs=0, beta1=0.0, beta2=0.0, epsilon=0.0, max_grad_norm=0.0, shuffle=False)
    training = task_conversion.training_to_domain(message)
    assert (training.beta1, training.beta2, training.epsilon, training.max_grad_norm) == (0, 0, 0, 0)
    assert training.shuffle is False and training.num_epochs == 0 and training.num_steps is None


def test_all_invalid_fields_are_named_at_once() -> None:
    training = task_pb2.Training(lr_schedule=77, optimizer=88, overlength=99)
    with pytest.raises(InvalidInputError) as caught:
        task_conversion.spec_to_domain(task_pb2.TaskSpec(training=training))
    assert [violation.field for violation in caught.value.violations] == [
        "spec.method",
        "spec.training.duration",
        "spec.training.lr_schedule",
        "spec.training.overlength",
        "spec.training.optimizer",
    ]
    assert "77" in caught.value.message and "3 (COSINE)" in caught.value.message
    with pytest.raises(InvalidInputError):
        task_conversion.spec_to_domain(task_pb2.TaskSpec())


def test_states_map_one_to_one() -> None:
    for state in TaskState:
        assert task_conversion.state_to_domain(task_conversion.state_to_proto(state)) is state
    assert len(task_pb2.TaskState.values()) == len(TaskState) + 1
    for number in (task_pb2.TASK_STATE_UNSPECIFIED, 99):
        with pytest.raises(InvalidInputError):
            task_conversion.state_to_domain(number)


def microbatch(kind: MicrobatchKind = MicrobatchKind.TRAIN) -> Microbatch:
    ranges = (
        Range("tenants/a/tasks/x", 3, 0, 8, (Segment(4, 0), Segment(3, 4)), 12, False),
        Range("tenants/b/tasks/y", 0, 8, 4, (Segment(4, 2**40),), 2**40, True),
    )
    token_ids_T = np.array([5, 2**31 - 1, *range(10)], dtype=np.int32)
    targets_T = np.array([IGNORE] * 6 + [-(2**31), *range(5)], dtype=np.int32)
    return Microbatch(2**40, kind, token_ids_T, targets_T, ranges, True)


@pytest.mark.parametrize("kind", MicrobatchKind)
def test_a_microbatch_survives_the_wire(kind: MicrobatchKind) -> None:
    sent = microbatch(kind)
    message = alignment_pb2.Microbatch.FromString(microbatch_conversion.microbatch_to_proto(sent).SerializeToString())
    assert message.token_ids[:8] == b"\x05\x00\x00\x00\xff\xff\xff\x7f"  # little-endian, as the proto says
    received = microbatch_conversion.microbatch_to_domain(message)
    for field in dataclasses.fields(Microbatch):
        mine, theirs = getattr(sent, field.name), getattr(received, field.name)
        assert np.array_equal(mine, theirs) if isinstance(mine, np.ndarray) else mine == theirs
    assert received.token_ids_T.dtype == received.targets_T.dtype == np.int32
    received.token_ids_T[0] = 1  # its own memory, writable


def test_a_big_endian_or_strided_array_is_sent_right() -> None:
    plain = microbatch()
    odd = dataclasses.replace(
        plain,
        token_ids_T=plain.token_ids_T.astype(">i4"),
        targets_T=np.repeat(plain.targets_T, 2)[::2],
    )
    assert microbatch_conversion.microbatch_to_proto(odd) == microbatch_conversion.microbatch_to_proto(plain)


DAMAGES = {
    "half a token": lambda m: setattr(m, "token_ids", m.token_ids[:-1]),
    "one token less": lambda m: setattr(m, "token_ids", m.token_ids[:-4]),
    "one target more": lambda m: setattr(m, "targets", m.targets + b"\0\0\0\0"),
    "a range too few": lambda m: m.ranges.pop(),
    "a gap": lambda m: setattr(m.ranges[1], "start", 9),
    "an overlap": lambda m: setattr(m.ranges[1], "start", 7),
    "segments over the range": lambda m: setattr(m.ranges[1].segments[0], "num_tokens", 5),
    "a negative segment": lambda m: setattr(m.ranges[0].segments[0], "num_tokens", -1),
    "no kind": lambda m: setattr(m, "kind", 0),
    "an unknown kind": lambda m: setattr(m, "kind", 9),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_an_inconsistent_microbatch_is_refused(damage) -> None:
    message = microbatch_conversion.microbatch_to_proto(microbatch())
    damage(message)
    with pytest.raises(InvalidInputError):
        microbatch_conversion.microbatch_to_domain(message)


def test_an_executor_becomes_a_view() -> None:
    backbone = plan_pb2.Backbone(
        name="tiny",
        num_layers=2,
        dtype="bfloat16",
        adaptable_modules=[plan_pb2.AdaptableModule(name="q", in_features=4)],
    )
    device = plan_pb2.Device(memory_bytes=1 << 30, effective_tokens_per_second=7.5)
    view = plan_conversion.executor_to_view(
        plan_pb2.Executor(name="executors/e", backbone=backbone, device=device, draining=True)
    )
    assert (view.name, view.memory_bytes, view.effective_tokens_per_second, view.is_draining) == (
        "executors/e",
        1 << 30,
        7.5,
        True,
    )
    assert view.backbone.element_bytes == 2 and view.backbone.sites[0].in_features == 4


def test_rendered_rows_of_a_report_fit_into_a_message() -> None:
    row = RenderedRow(1, 50_000, (LossSpan("x" * 200_000, True, 50_000),), is_heldout=False)
    report = Preflight(60, 60, 0, 1, 1, 1, 1, (row,) * 60, {}, 0, (), (), 0)
    message = preflight_conversion.preflight_to_proto(report)
    assert len(message.samples) == 15 and message.ByteSize() < 4 << 20 and message.num_rows == 60
