"""Strict parsing of untrusted JSON: the standard format alone, without NaN and without duplicate keys."""

import json
from typing import Any


def parse_strict_json(data: bytes) -> Any:
    """Return the value. Raises ValueError (also UnicodeDecodeError and json.JSONDecodeError) or RecursionError."""
    text = data.decode()
    try:
        value, end = _DECODER.raw_decode(text)
        if end == len(text) or not text[end:].strip(" \t\n\r"):
            return value
    except json.JSONDecodeError:  # blanks precede the value, or `decode` raises the same error with its position
        pass
    return _DECODER.decode(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object has a duplicate key")
    return fields


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
