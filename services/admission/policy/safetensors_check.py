"""Weights of strangers, looked through before anyone loads them. Pure.

Source: the safetensors format (8 bytes of header size, a JSON header, tensors that tile the rest).
"""

import math
from typing import Any

import numpy as np

from engine.errors import InvalidInputError
from engine.strict_json import parse_strict_json

_MAX_HEADER_BYTES, _MAX_TENSORS, _MAX_DIMENSIONS = 16 << 20, 100_000, 8
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # an adapter's weights are floats
_EXPONENT_OF_BF16 = 0x7F80


def check_safetensors(data: bytes, field: str) -> None:
    """Raises InvalidInputError unless the header tells the truth: every tensor's bytes are those of its type and shape,
    all of them fill the file, and every number is finite."""
    try:
        size = int.from_bytes(data[:8], "little")
        if size > min(_MAX_HEADER_BYTES, len(data) - 8):
            raise ValueError("its header leaves the file")
        header = parse_strict_json(data[8 : 8 + size])
        _check_metadata(header.pop("__metadata__", {}))
        if not 0 < len(header) <= _MAX_TENSORS:
            raise ValueError(f"it has {len(header)} tensors; 1 to {_MAX_TENSORS} are taken")
        end = 0
        for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
            end = _check_tensor(entry, end, memoryview(data)[8 + size :])
        if end != len(data) - 8 - size:
            raise ValueError("its tensors do not fill the file")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        why = str(error) if type(error) is ValueError else "its header is not of the format"
        raise InvalidInputError.of_field(field, f"is no safetensors file: {why}") from error


def _check_tensor(entry: dict[str, Any], start: int, data: memoryview) -> int:
    """Where it ends, if it begins at `start`. Raises ValueError."""
    (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError("a shape or offset is no natural number")
    if begin != start or not start <= end <= len(data):
        raise ValueError("its tensors overlap, leave gaps or leave the file")
    if dtype not in _BYTES or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor is not of {', '.join(_BYTES)} and at most {_MAX_DIMENSIONS} dimensions")
    if math.prod(shape) * _BYTES[dtype] != end - begin:
        raise ValueError("a tensor's bytes are not those of its type and shape")
    if not _is_finite(data[begin:end], dtype):
        raise ValueError("it holds NaN or Inf")
    return int(end)


def _is_finite(data: memoryview, dtype: str) -> bool:
    if dtype == "BF16":
        exponents = np.frombuffer(data, "<u2") & _EXPONENT_OF_BF16
        return not bool((exponents == _EXPONENT_OF_BF16).any())
    return bool(np.isfinite(np.frombuffer(data, f"<f{_BYTES[dtype]}")).all())


def _check_metadata(metadata: Any) -> None:
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError("its metadata is not text by text")
