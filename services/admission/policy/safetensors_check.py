"""Checks uploaded safetensors weights before anything loads them. Reads them piece by piece.

Source: the safetensors format (8 bytes of header size, a JSON header, tensors that tile the rest).
"""

import math
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from engine.errors import InvalidInputError
from engine.strict_json import parse_strict_json

_MAX_DIMENSIONS = 8
_FREE_HEADER_BYTES, _HEADER_BYTES_PER_TENSOR = 64 << 10, 512  # the metadata; a tensor's name, type, shape and offsets
_READ_BYTES = 4 << 20
_BYTES_OF_DTYPE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # integers are refused: an adapter's weights are floats
_EXPONENT_OF_BF16 = 0x7F80


def check_header_size(size: int, max_tensors: int, field: str) -> None:
    """Raises InvalidInputError for a header longer than that of `max_tensors` tensors; its first 8 bytes tell."""
    if size > (limit := _FREE_HEADER_BYTES + max_tensors * _HEADER_BYTES_PER_TENSOR):
        raise InvalidInputError.of_field(
            field, f"has a header of {size} bytes; at most {limit} are allowed, which suffice for {max_tensors} tensors"
        )


def check_safetensors(
    file: IO[bytes], num_bytes: int, field: str, max_tensors: int, yield_turn: Callable[[], object] = lambda: None
) -> None:
    """Raises InvalidInputError unless each tensor's bytes match its type and shape, the tensors fill the file without
    gaps, every number is finite, and there are at most `max_tensors`.

    `yield_turn` is called between pieces of the work.
    """
    try:
        size = int.from_bytes(file.read(8), "little")
        check_header_size(size, max_tensors, field)
        if size > num_bytes - 8:
            raise ValueError("the header exceeds the file")
        yield_turn()
        header = parse_strict_json(file.read(size))
        _check_metadata(header.pop("__metadata__", {}))
        if not 0 < len(header) <= max_tensors:
            raise ValueError(f"{len(header)} tensors; 1 to {max_tensors} are allowed, by the largest backbone served")
        end = 0
        for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
            yield_turn()
            end = _check_tensor(entry, end, num_bytes - 8 - size)
            _check_finite(file, entry, yield_turn)
        if end != num_bytes - 8 - size:
            raise ValueError("the tensors do not fill the file")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = str(error) if type(error) is ValueError else "the header is malformed"
        raise InvalidInputError.of_field(field, f"must be a valid safetensors file: {reason}") from error


def _check_tensor(entry: dict[str, Any], start: int, num_data_bytes: int) -> int:
    """Return the end of the tensor, which must begin at `start`. Raises ValueError."""
    (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError("a shape or an offset is not a non-negative integer")
    if begin != start or not start <= end <= num_data_bytes:
        raise ValueError("tensors overlap, leave gaps or exceed the file")
    if dtype not in _BYTES_OF_DTYPE or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(
            f"a tensor must have type {', '.join(_BYTES_OF_DTYPE)} and at most {_MAX_DIMENSIONS} dimensions"
        )
    if math.prod(shape) * _BYTES_OF_DTYPE[dtype] != end - begin:
        raise ValueError("the size of a tensor does not match its type and shape")
    return int(end)


def _check_finite(file: IO[bytes], entry: dict[str, Any], yield_turn: Callable[[], object]) -> None:
    """Read the tensor, which is next in the file. Raises ValueError if it contains NaN or Inf."""
    begin, end = entry["data_offsets"]
    for offset in range(begin, end, _READ_BYTES):
        yield_turn()
        if not _is_finite(file.read(min(_READ_BYTES, end - offset)), entry["dtype"]):
            raise ValueError("a tensor contains NaN or Inf")


def _is_finite(data: bytes, dtype: str) -> bool:
    if dtype == "BF16":
        exponents = np.frombuffer(data, "<u2") & _EXPONENT_OF_BF16
        return not bool((exponents == _EXPONENT_OF_BF16).any())
    return bool(np.isfinite(np.frombuffer(data, f"<f{_BYTES_OF_DTYPE[dtype]}")).all())


def _check_metadata(metadata: Any) -> None:
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError("the metadata is not a mapping of strings to strings")
