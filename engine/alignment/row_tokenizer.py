"""The tokens of rows, and which of them bear loss.

`messages`: the backbone's chat template; loss on assistant turns, their stop token included. `prompt`/`completion`:
loss on the completion and its end. `text`: loss on all of it. Special tokens that a row spells out stay text; in the
last two they are read as such for a task that asks for it (`Training.parse_special_tokens`).
No error ever quotes a row: it is the tenant's data. Legend: N rows, S tokens of all rows, C of the conversations among
them, K assistant turns of those.
"""

import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, pairwise, repeat
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.alignment.assistant_mask import AssistantTurn, assistant_turns, turn_tokens
from engine.alignment.chat_template import TemplateRefusedError
from engine.alignment.jsonl_rows import Row, is_text
from engine.alignment.special_token_injection import smuggled_spans
from engine.alignment.tokenized_rows import RefusedRow, TokenizedRow, TokenizedRows
from engine.alignment.tokenizer import BackboneTokenizer, Encoded, TextPiece

# Some milliseconds of the tokenizer's work: no core waits long for the first batch, or for what is made of the last.
_BATCH_ROWS, _BATCH_CHARACTERS = 1024, 1 << 17
# Under work at once, while other rows are parsed and rendered; of one row alone the characters may be more. Fewer leave
# a core idle while their threads wait for Python's lock.
_BATCHES_AHEAD, _CHARACTERS_AHEAD = 12, 4 << 20


class RowRefusedError(Exception):
    """This row can't be trained on as asked; the text says why and never quotes it."""


def tokenize(row: Row, tokenizer: BackboneTokenizer, parse_special_tokens: bool = False) -> TokenizedRow:
    """Raises RowRefusedError where the backbone's template cannot render or mask the row."""
    (rows,) = tokenize_all([row], tokenizer, parse_special_tokens)
    for refused in rows.refused:
        raise RowRefusedError(refused.reason)
    return rows.row(0)


def tokenize_all(
    rows: Iterable[Row], tokenizer: BackboneTokenizer, parse_special_tokens: bool = False
) -> Iterator[TokenizedRows]:
    """All rows in order, some at a time."""
    ahead, num_ahead = deque[tuple[int, Future[TokenizedRows]]](), 0
    with ThreadPoolExecutor(_BATCHES_AHEAD, "tokenize") as threads:
        for batch, num_characters in _batches(_ask(row, tokenizer, parse_special_tokens) for row in rows):
            while ahead and (len(ahead) == _BATCHES_AHEAD or num_ahead + num_characters > _CHARACTERS_AHEAD):
                num_done, future = ahead.popleft()
                num_ahead -= num_done
                yield future.result()
            ahead.append((num_characters, threads.submit(_read, batch, tokenizer, parse_special_tokens)))
            num_ahead += num_characters
        for _, future in ahead:
            yield future.result()


class _Asked(NamedTuple):
    """A row on its way: what is to be encoded of it, or why nothing is; of a conversation, what an assistant says."""

    row: Row
    pieces: list[TextPiece]
    turns: list[AssistantTurn]
    refusal: str = ""


def _ask(row: Row, tokenizer: BackboneTokenizer, parse_special_tokens: bool) -> _Asked:
    try:
        return _Asked(row, *_SHAPES[row.shape](row.fields, tokenizer, not parse_special_tokens))
    except TemplateRefusedError as error:
        return _Asked(row, [], [], str(error))


def _text(
    fields: Mapping[str, Any], _: BackboneTokenizer, is_plain: bool
) -> tuple[list[TextPiece], list[AssistantTurn]]:
    return [TextPiece(fields["text"], True, is_plain)], []


def _prompt_completion(
    fields: Mapping[str, Any], _: BackboneTokenizer, is_plain: bool
) -> tuple[list[TextPiece], list[AssistantTurn]]:
    return [TextPiece(fields["prompt"], True, is_plain), TextPiece(fields["completion"], False, is_plain)], []


def _messages(
    fields: Mapping[str, Any], tokenizer: BackboneTokenizer, _: bool
) -> tuple[list[TextPiece], list[AssistantTurn]]:
    """One tokenization of the whole conversation, as a server would see it.

    What a message itself spells out of the template's special tokens is encoded apart, as text.
    """
    if tokenizer.template is None:
        raise TemplateRefusedError("the backbone has no chat template: use prompt/completion or text")
    messages = fields["messages"]
    rendered = tokenizer.template.render_marked(messages)
    turns, text = assistant_turns(messages, rendered, tokenizer), rendered.text
    if not is_text(text):  # of another field than a content
        raise TemplateRefusedError("the chat template writes a lone surrogate")
    smuggled = smuggled_spans(messages, text, tokenizer)
    if not smuggled:
        return [TextPiece(text, has_offsets=True)], turns
    bounds = [0, *chain.from_iterable(smuggled), len(text)]
    return [
        TextPiece(text[start:end], is_plain=i % 2 == 1, has_offsets=True)
        for i, (start, end) in enumerate(pairwise(bounds))
    ], turns


_SHAPES: dict[
    str, Callable[[Mapping[str, Any], BackboneTokenizer, bool], tuple[list[TextPiece], list[AssistantTurn]]]
] = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "text": _text,
}


def _batches(rows: Iterable[_Asked]) -> Iterator[tuple[list[_Asked], int]]:
    """With their numbers of characters."""
    batch, num_characters = list[_Asked](), 0
    for asked in rows:
        batch.append(asked)
        for piece in asked.pieces:
            num_characters += len(piece.text)
        if len(batch) == _BATCH_ROWS or num_characters > _BATCH_CHARACTERS:
            yield batch, num_characters
            batch, num_characters = [], 0
    if batch:
        yield batch, num_characters


def _read(batch: Sequence[_Asked], tokenizer: BackboneTokenizer, parse_special_tokens: bool) -> TokenizedRows:
    pieces = [piece for asked in batch for piece in asked.pieces]
    reading, at = _Reading(tokenizer, tokenizer.encode(pieces)), 0
    for asked in batch:
        own = range(at, at + len(asked.pieces))
        at = own.stop
        reading.add(asked, own, is_trusted=parse_special_tokens)
    return reading.rows()


class _Reading:
    """Rows of a batch one after another, of encoded pieces."""

    def __init__(self, tokenizer: BackboneTokenizer, encoded: Encoded) -> None:
        self._tokenizer, self._encoded = tokenizer, encoded
        self._ids, self._ends = list[int](), [0]
        self._lines, self._spells_special, self._refused = list[int](), list[bool](), list[RefusedRow]()
        self._spans = list[tuple[int, int]]()  # of tokens that bear loss, but for those of conversations
        self._chats, self._chat_pieces = list[int](), dict[int, TextPiece]()
        self._turns, self._num_characters = list[tuple[int, int, int, int]](), 0  # of all conversations, joined

    def add(self, asked: _Asked, own: range, is_trusted: bool) -> None:
        """`own`: the indices of its pieces."""
        is_chat, forged = asked.row.shape == "messages", self._encoded.forged
        refusal = asked.refusal
        if forged and not forged.isdisjoint(own) and (is_chat or not is_trusted):
            refusal = "the backbone's tokenizer makes a special token of what it spells out as text"
        if refusal:
            self._refused.append(RefusedRow(asked.row.line, refusal))
            return
        if is_chat:
            self._add_chat(asked, own)
        else:
            self._add_plain(self._encoded.ids[own.start : own.stop])
        spelled = self._tokenizer.special_pattern.search
        self._lines.append(asked.row.line)
        self._ends.append(len(self._ids))
        self._spells_special.append(
            not is_chat and any(piece.is_plain and spelled(piece.text) is not None for piece in asked.pieces)
        )

    def _add_plain(self, ids: Sequence[list[int]]) -> None:
        """`text`, or `prompt` and `completion`: loss on the last of them and its end."""
        all_ids, eos = self._ids, self._tokenizer.eos_token_id
        *prompt, learned = ids
        for own in prompt:
            all_ids += own
            if eos is not None and own and own[-1] == eos:  # some tokenizers close what they encode
                all_ids.pop()
        start = len(all_ids)
        all_ids += learned
        if eos is not None and not (learned and learned[-1] == eos):
            all_ids.append(eos)
        self._spans.append((start, len(all_ids)))

    def _add_chat(self, asked: _Asked, own: range) -> None:
        index, before = len(self._lines), self._num_characters
        self._chats.append(index)
        self._turns += [(index, before + start, before + end, before + content) for start, end, content in asked.turns]
        for i, piece in zip(own, asked.pieces, strict=True):
            self._ids += self._encoded.ids[i]
            self._chat_pieces[i] = piece
            self._num_characters += len(piece.text)

    def rows(self) -> TokenizedRows:
        ids_S = np.frombuffer(struct.pack(f"={len(self._ids)}i", *self._ids), np.int32)  # twice as fast as np.array
        offsets = np.array(self._ends, np.int64)
        spans = np.array(self._spans, np.int64).reshape(-1, 2).T
        if self._chats:
            spans = np.concatenate([spans, self._chat_spans(ids_S, offsets)], axis=1)
        rows = TokenizedRows(
            ids_S,
            _covered_S(spans, len(ids_S)),
            offsets,
            np.array(self._lines, np.int64),
            np.array(self._spells_special, np.bool_),
            self._refused,
        )
        has_target_N = rows.num_targets_N(len(ids_S)) > 0
        return rows if has_target_N.all() else rows.where(has_target_N, len(ids_S), repeat("no token bears loss"))

    def _chat_spans(self, ids_S: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of tokens that bear loss, 2 by K: found among those of conversations alone."""
        is_chat_N = np.zeros(len(offsets) - 1, np.bool_)
        is_chat_N[self._chats] = True
        lengths_N = np.diff(offsets)
        ids_C = ids_S if is_chat_N.all() else ids_S[is_chat_N.repeat(lengths_N)]
        chat_offsets = np.concatenate([[0], (lengths_N * is_chat_N).cumsum()])
        row_K, *turns = np.array(self._turns, np.int64).reshape(-1, 4).T
        told = self._tokenizer.offsets(self._chat_pieces, self._encoded, ids_C)
        rows_2K = np.stack([chat_offsets[row_K], chat_offsets[row_K + 1]])
        spans = turn_tokens(np.stack(turns), rows_2K, told, self._tokenizer.is_special_V[ids_C])
        spans += (offsets - chat_offsets)[row_K]
        return spans


def _covered_S(spans: NDArray[np.int64], num_tokens: int) -> NDArray[np.bool_]:
    """Which tokens stand in any of the spans [start, end)."""
    num_spans_S = np.zeros(num_tokens + 1, np.int16)  # counted up where one begins
    np.add.at(num_spans_S, spans[0], 1)
    np.subtract.at(num_spans_S, spans[1], 1)
    return num_spans_S[:-1].cumsum(dtype=np.int16).astype(np.bool_)
