"""Rows of JSON Lines, and the tokens of each that bear loss.

Three shapes: `messages` (the backbone's chat template; loss on assistant turns, their stop token included),
`prompt`/`completion` (loss on the completion and its end), `text` (loss on all of it).
No error ever quotes a row: it is the tenant's data. Legend: L tokens of one row.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.alignment.smuggled import smuggled_spans
from engine.alignment.templates import TemplateRefusedError
from engine.alignment.tokens import BackboneTokenizer
from engine.alignment.turns import assistant_turns
from engine.errors import MalformedDatasetError

MAX_LINE_BYTES, MAX_ROWS, MAX_MESSAGES = 4 << 20, 10_000_000, 512
_ROLES = frozenset({"system", "user", "assistant", "tool"})
_SHAPES = {
    frozenset({"messages"}): "messages",
    frozenset({"prompt", "completion"}): "prompt_completion",
    frozenset({"text"}): "text",
}
_SHAPE_KEYS = frozenset[str]().union(*_SHAPES)


@dataclass(frozen=True)
class Row:
    """One parsed row: its 1-based line, its shape ("messages", "prompt_completion", "text") and its fields."""

    line: int
    shape: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class TokenizedRow:
    """`bears_loss_L`: whether the token is to be predicted (from those before it)."""

    line: int
    token_ids_L: NDArray[np.int32]
    bears_loss_L: NDArray[np.bool_]


class RowRefusedError(Exception):
    """This row can't be trained on as asked; the text says why and never quotes it."""


def parse_lines(lines: Iterable[bytes]) -> Iterator[Row]:
    """Rows in order; blank lines are skipped. Raises MalformedDatasetError (metadata `line`) at the first bad one."""
    num_rows = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            num_rows += 1
            if num_rows > MAX_ROWS:
                raise _malformed(number, f"is one row too many; at most {MAX_ROWS}: upload several datasets")
            yield _parse(number, line)
    if num_rows == 0:
        raise MalformedDatasetError("the dataset is empty: upload at least one row")


def tokenize(row: Row, tokenizer: BackboneTokenizer) -> TokenizedRow:
    """Raises RowRefusedError where the backbone's template cannot render or mask the row."""
    if row.shape == "messages":
        ids, mask = _messages(row.fields["messages"], tokenizer)
    elif row.shape == "prompt_completion":
        ids, mask = _prompt_completion(row.fields["prompt"], row.fields["completion"], tokenizer)
    else:
        ids = _closed(tokenizer.encode(row.fields["text"], add_special_tokens=True).token_ids_L, tokenizer)
        mask = np.ones(len(ids), dtype=np.bool_)
    if not mask[1:].any():
        raise RowRefusedError("no token bears loss")
    return TokenizedRow(row.line, ids, mask)


def _parse(number: int, line: bytes) -> Row:
    if len(line) > MAX_LINE_BYTES:
        raise _malformed(number, f"is {len(line)} bytes long; at most {MAX_LINE_BYTES}")
    try:
        fields = json.loads(line.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise _malformed(number, f"is not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise _malformed(number, f"is not JSON (column {error.colno}: {error.msg})") from None
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _malformed(number, f"cannot be read: {why}") from None
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
            _check_text(number, key, fields[key])
    return shape


def _check_messages(number: int, messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise _malformed(number, '"messages" must be a list of at least one message')
    if len(messages) > MAX_MESSAGES:  # a turn is found by rendering what comes before it: work grows with the square
        raise _malformed(number, f"has {len(messages)} messages; at most {MAX_MESSAGES}: split the conversation")
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _ROLES:
            raise _malformed(number, f'messages[{index}] needs a "role" of {", ".join(sorted(_ROLES))}')
        _check_text(number, f"messages[{index}].content", message.get("content"))
    if not any(message["role"] == "assistant" for message in messages):
        raise _malformed(number, "has no assistant message: nothing to learn from")


def _check_text(number: int, key: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _malformed(number, f'"{key}" must be a string')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _malformed(number, f'"{key}" holds a lone surrogate') from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _malformed(number: int, why: str) -> MalformedDatasetError:
    return MalformedDatasetError(f"line {number} {why}", line=number)


def _prompt_completion(
    prompt: str, completion: str, tokenizer: BackboneTokenizer
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    head = tokenizer.encode(prompt, add_special_tokens=True).token_ids_L
    if tokenizer.eos_token_id is not None and len(head) and head[-1] == tokenizer.eos_token_id:
        head = head[:-1]  # some tokenizers close what they encode
    tail = _closed(tokenizer.encode(completion, add_special_tokens=False).token_ids_L, tokenizer)
    mask = np.concatenate([np.zeros(len(head), np.bool_), np.ones(len(tail), np.bool_)])
    return np.concatenate([head, tail]), mask


def _closed(ids: NDArray[np.int32], tokenizer: BackboneTokenizer) -> NDArray[np.int32]:
    if tokenizer.eos_token_id is None or (len(ids) and ids[-1] == tokenizer.eos_token_id):
        return ids
    return np.append(ids, np.int32(tokenizer.eos_token_id))


def _messages(
    messages: list[dict[str, Any]], tokenizer: BackboneTokenizer
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """One tokenization of the whole conversation, as a server would see it; the assistant turns in it bear loss."""
    if tokenizer.template is None:
        raise RowRefusedError("the backbone has no chat template: use prompt/completion or text")
    try:
        text = tokenizer.template.render(messages)
        turns = assistant_turns(messages, text, tokenizer)
        smuggled = smuggled_spans(messages, text, tokenizer)
    except TemplateRefusedError as error:
        raise RowRefusedError(str(error)) from None
    encoded = tokenizer.encode_rendered(text, smuggled)
    mask = np.zeros(len(encoded.token_ids_L), np.bool_)
    starts, ends = encoded.offsets_L2.T
    for turn in turns:
        # A token of no width (a sentencepiece prefix) belongs to the turn if it lies strictly inside.
        inside = np.flatnonzero((starts >= turn.start) & (starts < turn.end) & (ends > turn.start) & (ends <= turn.end))
        is_special = np.isin(encoded.token_ids_L[inside], list(tokenizer.special_ids))
        mask[inside[: _stop(is_special & (starts[inside] >= turn.content_end))]] = True
    return encoded.token_ids_L, mask


def _stop(is_stop: NDArray[np.bool_]) -> int:
    """Tokens of a turn up to its stop token, that one included; template text after it is never generated."""
    stops = np.flatnonzero(is_stop)
    return int(stops[-1]) + 1 if len(stops) else len(is_stop)
