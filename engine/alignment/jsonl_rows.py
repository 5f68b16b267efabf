"""Rows of untrusted JSON Lines, parsed strictly, one at a time.

A row has one of three shapes: `messages`, `prompt`/`completion`, `text`. No error ever quotes a row: it is the tenant's
data.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from engine.errors import MalformedDatasetError
from engine.strict_json import parse_strict_json

MAX_LINE_BYTES, MAX_ROWS, MAX_BLANK_LINES, MAX_MESSAGES = 4 << 20, 10_000_000, 1_000_000, 512
_ROLES = frozenset({"system", "user", "assistant", "tool"})
_SHAPES = {
    frozenset({"messages"}): "messages",
    frozenset({"prompt", "completion"}): "prompt_completion",
    frozenset({"text"}): "text",
}
_SHAPE_KEYS = frozenset[str]().union(*_SHAPES)


class Row(NamedTuple):
    """One parsed row: its 1-based line, its shape ("messages", "prompt_completion", "text") and its fields."""

    line: int
    shape: str
    fields: Mapping[str, Any]


def parse_lines(lines: Iterable[bytes]) -> Iterator[Row]:
    """Yield rows in order, without blank lines. Raises MalformedDatasetError (metadata `line`) at the first bad one."""
    num_rows = number = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            num_rows += 1
            if num_rows > MAX_ROWS:
                raise _malformed(number, f"is row {num_rows}; at most {MAX_ROWS} are allowed: upload several datasets")
            yield _parse(number, line)
        elif number - num_rows > MAX_BLANK_LINES:
            raise _malformed(number, f"is one of over {MAX_BLANK_LINES} blank lines, which is too many: remove them")
    if num_rows == 0:
        raise MalformedDatasetError("the dataset is empty: upload at least one row")


def _parse(number: int, line: bytes) -> Row:
    if len(line) > MAX_LINE_BYTES:
        raise _malformed(number, f"is {len(line)} bytes long; at most {MAX_LINE_BYTES} are allowed: shorten the row")
    try:
        fields = parse_strict_json(line)
    except UnicodeDecodeError as error:
        raise _malformed(number, f"is not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise _malformed(number, f"is not JSON (column {error.colno}: {error.msg})") from None
    except ValueError as error:
        raise _malformed(number, f"cannot be parsed: {error}") from None
    if not isinstance(fields, dict):
        raise _malformed(number, "is not a JSON object")
    return Row(number, _shape(number, fields), fields)


def _shape(number: int, fields: dict[str, Any]) -> str:
    shape = _SHAPES.get(frozenset(fields) & _SHAPE_KEYS)
    if shape is None:
        raise _malformed(number, 'needs exactly one of "messages", "prompt" with "completion", or "text"')
    if shape == "messages":
        _check_messages(number, fields["messages"])
    else:
        for key in ("prompt", "completion") if shape == "prompt_completion" else ("text",):
            if not is_text(fields[key]):
                raise _not_text(number, key, fields[key])
    return shape


def _check_messages(number: int, messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise _malformed(number, '"messages" must be a list of at least one message')
    if len(messages) > MAX_MESSAGES:  # finding turns renders each prefix: quadratic work
        raise _malformed(
            number, f"has {len(messages)} messages; at most {MAX_MESSAGES} are allowed: split the conversation"
        )
    has_answer = False
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _ROLES:
            raise _malformed(number, f'messages[{index}] needs a "role" of {", ".join(sorted(_ROLES))}')
        if not is_text(content := message.get("content")):
            raise _not_text(number, f"messages[{index}].content", content)
        has_answer |= role == "assistant"
    if not has_answer:
        raise _malformed(number, "has no message of the role assistant to train on: add one")


def is_text(value: Any) -> bool:
    """Return whether `value` is a string without a lone surrogate, which UTF-8 can't encode."""
    if not isinstance(value, str):
        return False
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def _not_text(number: int, key: str, value: Any) -> MalformedDatasetError:
    return _malformed(
        number, f'"{key}" ' + ("holds a lone surrogate" if isinstance(value, str) else "must be a string")
    )


def _malformed(number: int, description: str) -> MalformedDatasetError:
    return MalformedDatasetError(f"line {number} {description}", line=number)
