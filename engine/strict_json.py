"""What strangers send as JSON: what the format allows and no more, no NaN, no key twice."""

import json
from typing import Any


def parse_strict_json(data: bytes) -> Any:
    """Raises ValueError (UnicodeDecodeError and json.JSONDecodeError among them) or RecursionError."""
    text = data.decode()
    try:
        value, end = _DECODER.raw_decode(text)
        if end == len(text) or not text[end:].strip(" \t\n\r"):
            return value
    except json.JSONDecodeError:  # blanks before it, or an error to be told as `decode` tells it
        pass
    return _DECODER.decode(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return fields


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
