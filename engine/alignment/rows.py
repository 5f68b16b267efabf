"""Rows of JSON Lines, and the tokens of each that bear loss.

Three shapes: `messages` (the backbone's chat template; loss on assistant turns, their stop token included),
`prompt`/`completion` (loss on the completion and its end), `text` (loss on all of it). Special tokens that a row spells
out stay text; in the last two they are read as such for a task that asks for it (`Training.parse_special_tokens`).
No error ever quotes a row: it is the tenant's data. Legend: L tokens of one row.
"""

import itertools
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.alignment.smuggled import smuggled_spans
from engine.alignment.templates import TemplateRefusedError
from engine.alignment.tokens import BackboneTokenizer, Encoded, Piece
from engine.alignment.turns import Turn, assistant_turns
from engine.errors import MalformedDatasetError
from engine.plain_json import plain_json

MAX_LINE_BYTES, MAX_ROWS, MAX_MESSAGES = 4 << 20, 10_000_000, 512
_BATCH_ROWS, _BATCH_CHARACTERS = 512, 1 << 20  # that go through the tokenizer at once
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
    """`bears_loss_L`: whether the token is to be predicted (from those before it). `spells_special`: whether a `text`,
    `prompt` or `completion` spells out a special token that is read as text."""

    line: int
    token_ids_L: NDArray[np.int32]
    bears_loss_L: NDArray[np.bool_]
    spells_special: bool = False


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


def tokenize(row: Row, tokenizer: BackboneTokenizer, parse_special_tokens: bool = False) -> TokenizedRow:
    """Raises RowRefusedError where the backbone's template cannot render or mask the row."""
    ((_, read),) = tokenize_all([row], tokenizer, parse_special_tokens)
    if isinstance(read, RowRefusedError):
        raise read
    return read


def tokenize_all(
    rows: Iterable[Row], tokenizer: BackboneTokenizer, parse_special_tokens: bool = False
) -> Iterator[tuple[Row, TokenizedRow | RowRefusedError]]:
    """Each row in order, with its tokens or why it has none. Rows go through the tokenizer many at once."""
    waiting: list[_Reader] = []
    num_characters = 0
    for row in rows:
        waiting.append(_Reader(row, tokenizer, parse_special_tokens))
        num_characters += waiting[-1].num_characters
        if len(waiting) == _BATCH_ROWS or num_characters > _BATCH_CHARACTERS:
            yield from _read(waiting, tokenizer)
            waiting, num_characters = [], 0
    yield from _read(waiting, tokenizer)


def _read(
    readers: Sequence["_Reader"], tokenizer: BackboneTokenizer
) -> Iterator[tuple[Row, TokenizedRow | RowRefusedError]]:
    encoded = iter(tokenizer.encode([piece for reader in readers for piece in reader.pieces]))
    for reader in readers:
        yield reader.row, reader.finish([next(encoded) for _ in reader.pieces])


class _Reader:
    """One row on its way: `pieces` are to be encoded, none if it is refused already."""

    def __init__(self, row: Row, tokenizer: BackboneTokenizer, parse_special_tokens: bool) -> None:
        self.row, self._refused = row, None
        self._is_trusted = parse_special_tokens and row.shape != "messages"
        self._reading = _READINGS[row.shape](row.fields, tokenizer, parse_special_tokens)
        self.pieces: list[Piece] = []
        try:
            self.pieces = next(self._reading)
        except RowRefusedError as error:
            self._refused = error
        self.num_characters = sum(len(piece.text) for piece in self.pieces)
        self._spells_special = row.shape != "messages" and any(
            piece.is_plain and tokenizer.special_pattern.search(piece.text) for piece in self.pieces
        )

    def finish(self, encoded: list[Encoded]) -> TokenizedRow | RowRefusedError:
        if self._refused is not None:
            return self._refused
        if not self._is_trusted and any(part.is_forged for part in encoded):
            return RowRefusedError("the backbone's tokenizer makes a special token of what it spells out, even as text")
        try:
            self._reading.send(encoded)
        except StopIteration as done:
            ids, mask = done.value
        if not mask[1:].any():
            return RowRefusedError("no token bears loss")
        return TokenizedRow(self.row.line, ids, mask, self._spells_special)


def _parse(number: int, line: bytes) -> Row:
    if len(line) > MAX_LINE_BYTES:
        raise _malformed(number, f"is {len(line)} bytes long; at most {MAX_LINE_BYTES}")
    try:
        fields = plain_json(line)
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


def _malformed(number: int, why: str) -> MalformedDatasetError:
    return MalformedDatasetError(f"line {number} {why}", line=number)


# A shape's reading asks for its pieces, is sent what became of them, and returns tokens and which of them bear loss.
_Reading = Generator[list[Piece], list[Encoded], tuple[NDArray[np.int32], NDArray[np.bool_]]]


def _text(fields: Mapping[str, Any], tokenizer: BackboneTokenizer, parse_special_tokens: bool) -> _Reading:
    (encoded,) = yield [Piece(fields["text"], adds_tokens=True, is_plain=not parse_special_tokens)]
    ids = _closed(encoded.token_ids_L, tokenizer)
    return ids, np.ones(len(ids), np.bool_)


def _prompt_completion(fields: Mapping[str, Any], tokenizer: BackboneTokenizer, parse_special_tokens: bool) -> _Reading:
    prompt, completion = yield [
        Piece(fields["prompt"], adds_tokens=True, is_plain=not parse_special_tokens),
        Piece(fields["completion"], is_plain=not parse_special_tokens),
    ]
    head, tail = prompt.token_ids_L, _closed(completion.token_ids_L, tokenizer)
    if tokenizer.eos_token_id is not None and len(head) and head[-1] == tokenizer.eos_token_id:
        head = head[:-1]  # some tokenizers close what they encode
    mask = np.concatenate([np.zeros(len(head), np.bool_), np.ones(len(tail), np.bool_)])
    return np.concatenate([head, tail]), mask


def _closed(ids: NDArray[np.int32], tokenizer: BackboneTokenizer) -> NDArray[np.int32]:
    if tokenizer.eos_token_id is None or (len(ids) and ids[-1] == tokenizer.eos_token_id):
        return ids
    return np.append(ids, np.int32(tokenizer.eos_token_id))


def _messages(fields: Mapping[str, Any], tokenizer: BackboneTokenizer, _: bool) -> _Reading:
    """One tokenization of the whole conversation, as a server would see it; the assistant turns in it bear loss.

    What a message itself spells out of the template's special tokens is encoded apart, as text.
    """
    if tokenizer.template is None:
        raise RowRefusedError("the backbone has no chat template: use prompt/completion or text")
    messages = fields["messages"]
    try:
        text = tokenizer.template.render(messages)
        turns = assistant_turns(messages, text, tokenizer)
        smuggled = smuggled_spans(messages, text, tokenizer)
    except TemplateRefusedError as error:
        raise RowRefusedError(str(error)) from None
    bounds = [0, *(bound for span in smuggled for bound in span), len(text)]
    encoded = yield [
        Piece(text[start:end], is_plain=i % 2 == 1, has_offsets=True)
        for i, (start, end) in enumerate(itertools.pairwise(bounds))
    ]
    ids = np.concatenate([part.token_ids_L for part in encoded])
    offsets_L2 = np.concatenate([part.offsets_L2 + start for part, start in zip(encoded, bounds, strict=False)])
    return ids, _turns_mask(turns, ids, offsets_L2, tokenizer)


def _turns_mask(
    turns: Sequence[Turn], ids: NDArray[np.int32], offsets_L2: NDArray[np.int64], tokenizer: BackboneTokenizer
) -> NDArray[np.bool_]:
    mask = np.zeros(len(ids), np.bool_)
    starts, ends = offsets_L2.T
    for turn in turns:
        # A token of no width (a sentencepiece prefix) belongs to the turn if it lies strictly inside.
        inside = np.flatnonzero((starts >= turn.start) & (starts < turn.end) & (ends > turn.start) & (ends <= turn.end))
        is_special = tokenizer.are_special(ids[inside])
        mask[inside[: _stop(is_special & (starts[inside] >= turn.content_end))]] = True
    return mask


def _stop(is_stop: NDArray[np.bool_]) -> int:
    """Tokens of a turn up to its stop token, that one included; template text after it is never generated."""
    stops = np.flatnonzero(is_stop)
    return int(stops[-1]) + 1 if len(stops) else len(is_stop)


_READINGS: dict[str, Callable[[Mapping[str, Any], BackboneTokenizer, bool], _Reading]] = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "text": _text,
}
