"""The tokens of rows, and which of them bear loss.

`messages`: the backbone's chat template; loss on assistant turns, their stop token included. `prompt`/`completion`:
loss on the completion and its end. `text`: loss on all of it. Special tokens that a row spells out stay text; in the
last two they are read as such for a task that asks for it (`Training.parse_special_tokens`).
No error ever quotes a row: it is the tenant's data. Legend: L tokens of one row.
"""

import itertools
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.alignment.rows import Row
from engine.alignment.smuggled import smuggled_spans
from engine.alignment.templates import TemplateRefusedError
from engine.alignment.tokens import BackboneTokenizer, Encoded, Piece
from engine.alignment.turns import Turn, assistant_turns

_BATCH_ROWS, _BATCH_CHARACTERS = 1024, 1 << 20  # that go through the tokenizer at once
_BATCHES_AHEAD = 2  # encoded by threads of their own, without Python's lock, while other rows are parsed and finished


class TokenizedRow(NamedTuple):
    """Token ids, and the spans [start, end) of them that bear loss, in order: each of those tokens is to be predicted
    from the tokens before it. `spells_special`: a `text`, `prompt` or `completion` spells out a special token that is
    read as text."""

    line: int
    ids: list[int]
    spans: list[tuple[int, int]]
    spells_special: bool

    @property
    def token_ids_L(self) -> NDArray[np.int32]:
        return np.array(self.ids, np.int32)

    @property
    def bears_loss_L(self) -> NDArray[np.bool_]:
        mask_L = np.zeros(len(self.ids), np.bool_)
        for start, end in self.spans:
            mask_L[start:end] = True
        return mask_L

    def has_target(self, num_tokens: int) -> bool:
        """Whether any of its first tokens is to be predicted: nothing stands before the very first."""
        return any(max(start, 1) < min(end, num_tokens) for start, end in self.spans)


class RowRefusedError(Exception):
    """This row can't be trained on as asked; the text says why and never quotes it."""


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
    ahead: deque[tuple[list[_Reader], Future[list[Encoded]]]] = deque()
    with ThreadPoolExecutor(_BATCHES_AHEAD, "tokenize") as threads:
        for readers in _batches(_Reader(row, tokenizer, parse_special_tokens) for row in rows):
            pieces = [piece for reader in readers for piece in reader.pieces]
            ahead.append((readers, threads.submit(tokenizer.encode, pieces)))
            if len(ahead) > _BATCHES_AHEAD:
                yield from _finished(*ahead.popleft())
        while ahead:
            yield from _finished(*ahead.popleft())


def _batches(readers: Iterable["_Reader"]) -> Iterator[list["_Reader"]]:
    batch: list[_Reader] = []
    num_characters = 0
    for reader in readers:
        batch.append(reader)
        num_characters += reader.num_characters
        if len(batch) == _BATCH_ROWS or num_characters > _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _finished(
    readers: Sequence["_Reader"], encoding: Future[list[Encoded]]
) -> Iterator[tuple[Row, TokenizedRow | RowRefusedError]]:
    encoded = iter(encoding.result())
    for reader in readers:
        yield reader.row, reader.finish(list(itertools.islice(encoded, len(reader.pieces))))


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
        self.num_characters, self._spells_special = 0, False
        for piece in self.pieces:
            self.num_characters += len(piece.text)
            if piece.is_plain and row.shape != "messages" and tokenizer.special_pattern.search(piece.text):
                self._spells_special = True

    def finish(self, encoded: list[Encoded]) -> TokenizedRow | RowRefusedError:
        if self._refused is not None:
            return self._refused
        for part in encoded:
            if part.is_forged and not self._is_trusted:
                return RowRefusedError("the backbone's tokenizer makes a special token of what it spells out as text")
        try:
            self._reading.send(encoded)
        except StopIteration as done:
            ids, spans = done.value
        row = TokenizedRow(self.row.line, ids, spans, self._spells_special)
        return row if row.has_target(len(ids)) else RowRefusedError("no token bears loss")


# A shape's reading asks for its pieces, is sent what became of them, and returns tokens and spans that bear loss.
_Reading = Generator[list[Piece], list[Encoded], tuple[list[int], list[tuple[int, int]]]]


def _text(fields: Mapping[str, Any], tokenizer: BackboneTokenizer, parse_special_tokens: bool) -> _Reading:
    (encoded,) = yield [Piece(fields["text"], adds_tokens=True, is_plain=not parse_special_tokens)]
    ids = _closed(encoded.ids, tokenizer)
    return ids, [(0, len(ids))]


def _prompt_completion(fields: Mapping[str, Any], tokenizer: BackboneTokenizer, parse_special_tokens: bool) -> _Reading:
    prompt, completion = yield [
        Piece(fields["prompt"], adds_tokens=True, is_plain=not parse_special_tokens),
        Piece(fields["completion"], is_plain=not parse_special_tokens),
    ]
    head, tail = prompt.ids, _closed(completion.ids, tokenizer)
    if tokenizer.eos_token_id is not None and head and head[-1] == tokenizer.eos_token_id:
        head = head[:-1]  # some tokenizers close what they encode
    return head + tail, [(len(head), len(head) + len(tail))]


def _closed(ids: list[int], tokenizer: BackboneTokenizer) -> list[int]:
    if tokenizer.eos_token_id is None or (ids and ids[-1] == tokenizer.eos_token_id):
        return ids
    return [*ids, tokenizer.eos_token_id]


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
    (ids, starts, ends, _forged), *others = encoded
    if others:
        ids = [token for part in encoded for token in part.ids]
        starts = [at + start for part, start in zip(encoded, bounds, strict=False) for at in part.starts]
        ends = [at + start for part, start in zip(encoded, bounds, strict=False) for at in part.ends]
    return ids, [_turn_span(turn, ids, starts, ends, tokenizer) for turn in turns]


def _turn_span(
    turn: Turn, ids: list[int], starts: list[int], ends: list[int], tokenizer: BackboneTokenizer
) -> tuple[int, int]:
    """The tokens that lie in the turn, up to its stop token, that one included: template text after it is never
    generated. A token of no width (a sentencepiece prefix) belongs to the turn if it lies strictly inside."""
    first = max(bisect_left(starts, turn.start), bisect_right(ends, turn.start))
    end = max(first, min(bisect_left(starts, turn.end), bisect_right(ends, turn.end)))
    after = max(first, bisect_left(starts, turn.content_end))
    stops = (i + 1 for i in range(end - 1, after - 1, -1) if ids[i] in tokenizer.special_ids)
    return first, next(stops, end)


_READINGS: dict[str, Callable[[Mapping[str, Any], BackboneTokenizer, bool], _Reading]] = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "text": _text,
}
