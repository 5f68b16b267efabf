"""Uploaded adapters that lie, exhaust memory or would run code are refused; valid ones train."""

import hashlib
import io
import json
import math
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load, save

from engine.errors import InvalidInputError
from engine.strict_json import MAX_NESTING
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import artifact_pb2
from services.admission.policy.adapter_upload import CONFIG_FILE, WEIGHTS_FILE
from services.admission.policy.safetensors_check import check_safetensors
from tests.hostile_messages import FUZZING
from tests.services.admission.admission_mesh import Admission, adapter_files, adapter_parts, refused, spec

INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT")


def safetensors(header: Any, data: bytes = b"", size: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


def tensor(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


LYING: dict[str, bytes] = {
    "a header over the file": safetensors(tensor(), b"\0" * 8, size=10_000),
    "a header of 2**64 bytes": safetensors(tensor(), b"\0" * 8, size=2**64 - 1),
    "a shape over its bytes": safetensors(tensor(shape=[1_000_000_000]), b"\0" * 8),
    "a shape of 2**63": safetensors(tensor(shape=[2**63, 2]), b"\0" * 8),
    "a shape that multiplies to its bytes by overflow": safetensors(tensor(shape=[2**62 + 1, 2]), b"\0" * 8),
    "a negative shape": safetensors(tensor(shape=[-1, -2]), b"\0" * 8),
    "a shape of floats": safetensors(tensor(shape=[2.0]), b"\0" * 8),
    "a shape of booleans": safetensors(tensor(shape=[True, 2]), b"\0" * 8),
    "a shape that is text": safetensors(tensor(shape="2"), b"\0" * 8),
    "a thousand dimensions": safetensors(tensor(shape=[2] + [1] * 1000), b"\0" * 8),
    "no shape": safetensors({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8),
    "an unknown type": safetensors(tensor(dtype="F31"), b"\0" * 8),
    "integers": safetensors(tensor(dtype="I64", shape=[1]), b"\0" * 8),
    "offsets over the file": safetensors(tensor(data_offsets=[0, 800]), b"\0" * 8),
    "offsets backwards": safetensors(tensor(data_offsets=[8, 0]), b"\0" * 8),
    "offsets that overlap": safetensors({**tensor(), "v": tensor()["w"]}, b"\0" * 8),
    "bytes that belong to nobody": safetensors(tensor(), b"\0" * 16),
    "a tensor twice": safetensors(b'{"w":%b,"w":%b}' % ((json.dumps(tensor()["w"]).encode(),) * 2), b"\0" * 8),
    "no tensor": safetensors({"__metadata__": {}}),
    "metadata that is not text": safetensors({**tensor(), "__metadata__": {"a": 5}}, b"\0" * 8),
    "metadata that is a list": safetensors({**tensor(), "__metadata__": ["x"]}, b"\0" * 8),
    "a header that is a list": safetensors([1], b"\0" * 8),
    "a deep header": safetensors(b"[" * 100_000, b"\0" * 8),
    "a header of 5,000 digits": safetensors(b'{"w":' + b"9" * 5000 + b"}", b"\0" * 8),
    "a header with NaN": safetensors(b'{"w":NaN}', b"\0" * 8),
    "a header that is not UTF-8": safetensors(b'{"\xff":1}', b"\0" * 8),
    "NaN": safetensors(tensor(), struct.pack("<2f", 1.0, math.nan)),
    "Inf": safetensors(tensor(), struct.pack("<2f", -math.inf, 1.0)),
    "NaN in half precision": safetensors(tensor(dtype="F16", shape=[4]), struct.pack("<4e", 0, math.nan, 0, 0)),
    "NaN in bfloat16": safetensors(tensor(dtype="BF16", shape=[4]), b"\0\0\xc0\x7f\0\0\0\0"),
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    "a zip": b"PK\x03\x04" + b"\0" * 60,
    "a gzip": b"\x1f\x8b\x08\x00" + b"\0" * 60,
}


async def upload(admission: Admission, **files: bytes) -> Any:
    good = adapter_files()
    return await admission.tenant().UploadAdapter(
        adapter_parts(
            {
                CONFIG_FILE: files.get("config", good[CONFIG_FILE]),
                WEIGHTS_FILE: files.get("weights", good[WEIGHTS_FILE]),
            },
            chunk_bytes=1 << 20,
        )
    )


async def test_corrupt_weights_are_refused_and_leave_nothing(admission: Admission) -> None:
    before = admission.files()
    for case, weights in LYING.items():
        with refused(*INVALID) as refusal:
            await upload(admission, weights=weights)
        assert refusal.fields == [WEIGHTS_FILE], case
        assert len(refusal.message) < 300, case
    assert admission.files() == before


def configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (field, configuration) of adapters that must be refused."""
    fine = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    code = {"base_model_class": "LlamaForCausalLM", "parent_library": "os"}
    yield f"{CONFIG_FILE}.auto_map", {**fine, "auto_map": code}
    yield f"{CONFIG_FILE}.auto_map", {**fine, "auto_map": "modeling.py"}
    for rank in (257, 10**9, 10**400, -4, 0, math.nan, "4x"):
        yield CONFIG_FILE, {**fine, "r": rank}
    yield CONFIG_FILE, {**fine, "comment": "x" * (300 << 10)}
    yield CONFIG_FILE, {**fine, "nested": math.nan}


async def test_configurations_that_name_code_or_huge_ranks_are_refused(admission: Admission) -> None:
    for field, config in configs():
        with refused(*INVALID) as refusal:
            await upload(admission, config=json.dumps(config).encode())
        assert refusal.fields == [field], str(config)[:100]
    await upload(admission, config=json.dumps({**dict(next(iter(configs()))[1]), "auto_map": None}).encode())


async def test_a_deep_configuration_or_header_is_refused_or_used(admission: Admission) -> None:
    """What the upload accepts is read again for each task that starts from it, from another depth of the stack."""
    dataset = (await admission.upload()).name
    fine = '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "x": %s}'
    for depth in (10, 60, 70, 400, 900, 930, 960, 990, 2000):
        for deep in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
            header = ",".join(f'"{name}":{{"dtype":"F32","shape":[2],"data_offsets":{deep}}}' for name in "ab")
            with refused(*INVALID) as refusal:
                await upload(admission, weights=safetensors(f"{{{header}}}".encode(), b"\0" * 8))
            assert refusal.fields == [WEIGHTS_FILE]
            if depth > MAX_NESTING:
                with refused(*INVALID) as refusal:
                    await upload(admission, config=(fine % deep).encode())
                assert refusal.fields == [CONFIG_FILE]
            else:
                adapter = (await upload(admission, config=(fine % deep).encode())).adapter
                task = spec(dataset, initial_adapter=adapter.name)
                await admission.tenant().EstimateTask(pb.EstimateTaskRequest(spec=task))


async def test_20_kb_of_metadata_are_no_harm(admission: Admission) -> None:
    header = {"__metadata__": {"format": "pt", "note": "x" * 20_000}, **tensor()}
    await upload(admission, weights=safetensors(header, b"\0" * 8))


ODD = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
KEYS = ("target_modules", "rank_pattern", "alpha_pattern", "modules_to_save", "bias", "use_rslora", "use_dora",
        "layers_to_transform", "fan_in_fan_out", "lora_dropout", "init_lora_weights", "peft_type", "r")  # fmt: skip


@FUZZING
@given(st.dictionaries(st.sampled_from(KEYS), ODD, max_size=4))
async def test_a_configuration_of_odd_types_is_refused_fairly(admission: Admission, odd: dict[str, Any]) -> None:
    """A configuration that passes the upload is compared with the task that starts from it."""
    if not getattr(admission, "dataset", ""):
        admission.dataset = (await admission.upload()).name  # type: ignore[attr-defined]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **odd}
    try:
        adapter = (await upload(admission, config=json.dumps(config).encode())).adapter
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        return
    task_spec = spec(admission.dataset)  # type: ignore[attr-defined]
    task_spec.initial_adapter = adapter.name
    try:
        await admission.tenant().EstimateTask(pb.EstimateTaskRequest(spec=task_spec))
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error


@FUZZING
@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=6).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(["<f8", "<f4", "<f2"]), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=4,
    )
)
def test_files_of_the_safetensors_library_are_accepted(shapes: dict[str, tuple[str, list[int]]]) -> None:
    data = save({name: np.ones(shape, dtype) for name, (dtype, shape) in shapes.items()}, {"format": "pt"})
    check_safetensors(io.BytesIO(data), len(data), "file", 100)


@FUZZING
@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 255))
def test_accepted_files_load_in_the_safetensors_library(tail: bytes, place: int, value: int) -> None:
    """A valid file with a changed byte and added bytes: what admission accepts, the safetensors library loads."""
    data = bytearray(save({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16)}))
    data[place % len(data)] = value
    damaged = bytes(data) + tail
    try:
        check_safetensors(io.BytesIO(damaged), len(damaged), "file", 100)
    except InvalidInputError:
        return
    try:
        load(damaged)
    except SafetensorError as error:
        pytest.fail(f"taken, and does not load: {error}")


async def test_a_file_announced_as_a_terabyte_is_refused_before_its_first_byte(admission: Admission) -> None:
    sha256 = hashlib.sha256(b"").hexdigest()
    header = artifact_pb2.FileHeader(file_name=WEIGHTS_FILE, size_bytes=1 << 40, sha256=sha256)
    parts = [pb.UploadAdapterRequest(header=artifact_pb2.UploadHeader()), pb.UploadAdapterRequest(file=header)]
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"):
        await admission.tenant().UploadAdapter(iter(parts))
