"""Strict parsing of untrusted JSON: the standard format alone, without NaN, duplicate keys and deep nesting."""

import json
from typing import Any

MAX_NESTING = 64  # far below the depth at which Python's recursion ends, in the parser and in whatever reads the value


def parse_strict_json(data: bytes) -> Any:
    """Return the value. Raises ValueError, also as UnicodeDecodeError and json.JSONDecodeError."""
    text = data.decode()
    try:
        value = _parse(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > MAX_NESTING and _is_nested_deeper(value, MAX_NESTING):
        raise ValueError(_TOO_DEEP)
    return value


def _parse(text: str) -> Any:
    try:
        value, end = _DECODER.raw_decode(text)
        if end == len(text) or not text[end:].strip(" \t\n\r"):
            return value
    except json.JSONDecodeError:  # blanks precede the value, or `decode` raises the same error with its position
        pass
    return _DECODER.decode(text)


def _is_nested_deeper(value: Any, limit: int) -> bool:
    """Return whether more than `limit` arrays and objects stand in each other."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        children = (child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent))
        level = [child for child in children if isinstance(child, dict | list)]
    return bool(level)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object has a duplicate key")
    return fields


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


_TOO_DEEP = f"more than {MAX_NESTING} arrays and objects are nested"
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
