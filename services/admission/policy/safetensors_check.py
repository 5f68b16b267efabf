"""Checks uploaded safetensors weights before anything loads them. Pure.

Source: the safetensors format (8 bytes of header size, a JSON header, tensors that tile the rest).
"""

import math
from typing import Any

import numpy as np

from engine.errors import InvalidInputError
from engine.strict_json import parse_strict_json

_MAX_HEADER_BYTES, _MAX_TENSORS, _MAX_DIMENSIONS = 16 << 20, 100_000, 8
_BYTES_OF_DTYPE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # integers are refused: an adapter's weights are floats
_EXPONENT_OF_BF16 = 0x7F80


def check_safetensors(data: bytes, field: str) -> None:
    """Raises InvalidInputError unless each tensor's bytes match its type and shape, the tensors fill the file without
    gaps, and every number is finite."""
    try:
        size = int.from_bytes(data[:8], "little")
        if size > min(_MAX_HEADER_BYTES, len(data) - 8):
            raise ValueError(f"the header exceeds the file, or {_MAX_HEADER_BYTES} bytes")
        header = parse_strict_json(data[8 : 8 + size])
        _check_metadata(header.pop("__metadata__", {}))
        if not 0 < len(header) <= _MAX_TENSORS:
            raise ValueError(f"{len(header)} tensors; 1 to {_MAX_TENSORS} are allowed")
        end = 0
        for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
            end = _check_tensor(entry, end, memoryview(data)[8 + size :])
        if end != len(data) - 8 - size:
            raise ValueError("the tensors do not fill the file")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = str(error) if type(error) is ValueError else "the header is malformed"
        raise InvalidInputError.of_field(field, f"must be a valid safetensors file: {reason}") from error


def _check_tensor(entry: dict[str, Any], start: int, data: memoryview) -> int:
    """Return the end of the tensor, which must begin at `start`. Raises ValueError."""
    (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError("a shape or an offset is not a non-negative integer")
    if begin != start or not start <= end <= len(data):
        raise ValueError("tensors overlap, leave gaps or exceed the file")
    if dtype not in _BYTES_OF_DTYPE or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(
            f"a tensor must have type {', '.join(_BYTES_OF_DTYPE)} and at most {_MAX_DIMENSIONS} dimensions"
        )
    if math.prod(shape) * _BYTES_OF_DTYPE[dtype] != end - begin:
        raise ValueError("the size of a tensor does not match its type and shape")
    if not _is_finite(data[begin:end], dtype):
        raise ValueError("a tensor contains NaN or Inf")
    return int(end)


def _is_finite(data: memoryview, dtype: str) -> bool:
    if dtype == "BF16":
        exponents = np.frombuffer(data, "<u2") & _EXPONENT_OF_BF16
        return not bool((exponents == _EXPONENT_OF_BF16).any())
    return bool(np.isfinite(np.frombuffer(data, f"<f{_BYTES_OF_DTYPE[dtype]}")).all())


def _check_metadata(metadata: Any) -> None:
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError("the metadata is not a mapping of strings to strings")
