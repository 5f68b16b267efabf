"""Rows as token ids, with the tokens that bear loss.

`messages`: rendered by the backbone's chat template; loss on assistant turns with their stop token.
`prompt`/`completion`: loss on the completion and its end. `text`: loss on all of it. Special tokens that a row spells
out stay text, except in the last two shapes of a task that sets `Training.parse_special_tokens`.
No error ever quotes a row: it is the tenant's data. Legend: N rows, S tokens of all rows, C tokens of the conversations
among them, K assistant turns of those.
"""

import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, chain, pairwise, repeat
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.alignment.assistant_mask import AssistantTurn, find_assistant_turns, turn_tokens
from engine.alignment.chat_template import TemplateRefusedError
from engine.alignment.jsonl_rows import Row, is_text
from engine.alignment.special_token_injection import find_injected_tokens
from engine.alignment.tokenized_rows import RefusedRow, TokenizedRow, TokenizedRows
from engine.alignment.tokenizer import BackboneTokenizer, EncodedPieces, TextPiece

# A batch takes the tokenizer a few milliseconds, so that no core waits long for the first or the last one.
_BATCH_ROWS, _BATCH_CHARACTERS = 1024, 1 << 17
# Batches in work at once, while further rows are parsed and rendered; one row alone may exceed the characters. With
# fewer batches a core is idle while their threads wait for Python's lock.
_BATCHES_AHEAD, _CHARACTERS_AHEAD = 12, 4 << 20


class RowRefusedError(Exception):
    """The task can't train on this row. The text states the reason and never quotes the row."""


def tokenize(row: Row, tokenizer: BackboneTokenizer, parse_special_tokens: bool = False) -> TokenizedRow:
    """Tokenize one row. Raises RowRefusedError where the backbone's template cannot render or mask it."""
    (rows,) = tokenize_all([row], tokenizer, parse_special_tokens)
    for refused in rows.refused:
        raise RowRefusedError(refused.reason)
    return rows.row(0)


def tokenize_all(
    rows: Iterable[Row], tokenizer: BackboneTokenizer, parse_special_tokens: bool = False
) -> Iterator[TokenizedRows]:
    """Yield all rows in order, a batch at a time."""
    ahead, num_ahead = deque[tuple[int, Future[TokenizedRows]]](), 0
    with ThreadPoolExecutor(_BATCHES_AHEAD, "tokenize") as threads:
        for batch, num_characters in _batches(_prepare(row, tokenizer, parse_special_tokens) for row in rows):
            while ahead and (len(ahead) == _BATCHES_AHEAD or num_ahead + num_characters > _CHARACTERS_AHEAD):
                num_done, future = ahead.popleft()
                num_ahead -= num_done
                yield future.result()
            ahead.append((num_characters, threads.submit(_tokenize_batch, batch, tokenizer, parse_special_tokens)))
            num_ahead += num_characters
        for _, future in ahead:
            yield future.result()


class _PreparedRow(NamedTuple):
    """A row's texts to encode, and a conversation's assistant turns. `refusal`: why the row is left out, or empty."""

    row: Row
    pieces: list[TextPiece]
    turns: list[AssistantTurn]
    refusal: str = ""


def _prepare(row: Row, tokenizer: BackboneTokenizer, parse_special_tokens: bool) -> _PreparedRow:
    try:
        return _PreparedRow(row, *_SHAPES[row.shape](row.fields, tokenizer, not parse_special_tokens))
    except TemplateRefusedError as error:
        return _PreparedRow(row, [], [], str(error))


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
    """Render the whole conversation, to be tokenized at once as a server would.

    Special tokens of the template that a message itself spells out are encoded apart, as text.
    """
    if tokenizer.template is None:
        raise TemplateRefusedError("the backbone has no chat template: use prompt/completion or text")
    messages = fields["messages"]
    rendered = tokenizer.template.render_marked(messages)
    turns, text = find_assistant_turns(messages, rendered, tokenizer), rendered.text
    if not is_text(text):  # from another field than a content
        raise TemplateRefusedError("the chat template writes a lone surrogate")
    injected = find_injected_tokens(messages, text, tokenizer)
    if not injected:
        return [TextPiece(text, has_offsets=True)], turns
    bounds = [0, *chain.from_iterable(injected), len(text)]
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


def _batches(rows: Iterable[_PreparedRow]) -> Iterator[tuple[list[_PreparedRow], int]]:
    """Yield batches of rows with their numbers of characters."""
    batch, num_characters = list[_PreparedRow](), 0
    for row in rows:
        batch.append(row)
        for piece in row.pieces:
            num_characters += len(piece.text)
        if len(batch) == _BATCH_ROWS or num_characters > _BATCH_CHARACTERS:
            yield batch, num_characters
            batch, num_characters = [], 0
    if batch:
        yield batch, num_characters


def _tokenize_batch(
    batch: Sequence[_PreparedRow], tokenizer: BackboneTokenizer, parse_special_tokens: bool
) -> TokenizedRows:
    encoded = tokenizer.encode([piece for row in batch for piece in row.pieces])
    rows, refused = _encode_rows(batch, encoded, tokenizer, parse_special_tokens)
    token_ids = list(chain.from_iterable([row.token_ids for row in rows]))
    ids_S = np.frombuffer(struct.pack(f"={len(token_ids)}i", *token_ids), np.int32)  # twice as fast as np.array
    offsets = np.array([0, *accumulate([len(row.token_ids) for row in rows])], np.int64)
    is_chat_N = np.array([row.is_chat for row in rows], np.bool_)
    spans = _completion_spans(rows, is_chat_N, offsets)
    if is_chat_N.any():
        spans = np.concatenate([spans, _turn_spans(rows, is_chat_N, ids_S, offsets, encoded, tokenizer)], axis=1)
    tokenized = TokenizedRows(
        ids_S,
        _covered_S(spans, len(ids_S)),
        offsets,
        np.array([row.prepared.row.line for row in rows], np.int64),
        np.array([not row.is_chat and _spells_special(row.prepared, tokenizer) for row in rows], np.bool_),
        refused,
    )
    has_target_N = tokenized.num_targets_N(len(ids_S)) > 0
    if has_target_N.all():
        return tokenized
    return tokenized.select(has_target_N, len(ids_S), repeat("no token bears loss"))


class _EncodedRow(NamedTuple):
    """A row's token ids. `first_piece`: its place in the batch's pieces; `num_prompt_tokens`: see _join_pieces."""

    prepared: _PreparedRow
    is_chat: bool
    first_piece: int
    token_ids: list[int]
    num_prompt_tokens: int = 0


def _encode_rows(
    batch: Sequence[_PreparedRow], encoded: EncodedPieces, tokenizer: BackboneTokenizer, parse_special_tokens: bool
) -> tuple[list[_EncodedRow], list[RefusedRow]]:
    rows, refused, end = list[_EncodedRow](), list[RefusedRow](), 0
    for prepared in batch:
        start, end = end, end + len(prepared.pieces)
        refusal, is_chat = prepared.refusal, prepared.row.shape == "messages"
        if (is_chat or not parse_special_tokens) and not encoded.forged.isdisjoint(range(start, end)):
            refusal = "the backbone's tokenizer makes a special token of text that the row spells out"
        ids = encoded.ids[start:end]
        if refusal:
            refused.append(RefusedRow(prepared.row.line, refusal))
        elif is_chat:
            rows.append(_EncodedRow(prepared, True, start, ids[0] if len(ids) == 1 else list(chain.from_iterable(ids))))
        else:
            rows.append(_EncodedRow(prepared, False, start, *_join_pieces(ids, tokenizer.eos_token_id)))
    return rows, refused


def _join_pieces(ids: Sequence[list[int]], eos: int | None) -> tuple[list[int], int]:
    """Return the tokens of `text`, or of `prompt` and `completion`, and how many come before those that bear loss."""
    *prompt, completion = ids
    token_ids = list[int]()
    for piece in prompt:
        token_ids += piece
        if eos is not None and piece and piece[-1] == eos:  # some tokenizers end each text that they encode
            token_ids.pop()
    num_prompt_tokens = len(token_ids)
    token_ids += completion
    if eos is not None and not (completion and completion[-1] == eos):
        token_ids.append(eos)
    return token_ids, num_prompt_tokens


def _spells_special(row: _PreparedRow, tokenizer: BackboneTokenizer) -> bool:
    find = tokenizer.special_pattern.search
    return any(piece.is_plain and find(piece.text) is not None for piece in row.pieces)


def _completion_spans(
    rows: Sequence[_EncodedRow], is_chat_N: NDArray[np.bool_], offsets: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the tokens [start, end) that bear loss in the rows that are not conversations, 2 by their number."""
    starts_N = offsets[:-1] + np.array([row.num_prompt_tokens for row in rows], np.int64)
    return np.stack([starts_N[~is_chat_N], offsets[1:][~is_chat_N]])


def _turn_spans(
    rows: Sequence[_EncodedRow],
    is_chat_N: NDArray[np.bool_],
    ids_S: NDArray[np.int32],
    offsets: NDArray[np.int64],
    encoded: EncodedPieces,
    tokenizer: BackboneTokenizer,
) -> NDArray[np.int64]:
    """Return the tokens [start, end) of assistant turns, 2 by K. They are searched in the conversations alone."""
    pieces, turns, num_characters = dict[int, TextPiece](), list[tuple[int, int, int, int]](), 0
    for index, row in enumerate(rows):
        if row.is_chat:
            before = num_characters  # turns count characters through all conversations, joined
            turns += [
                (index, before + start, before + end, before + content) for start, end, content in row.prepared.turns
            ]
            for i, piece in enumerate(row.prepared.pieces, row.first_piece):
                pieces[i] = piece
                num_characters += len(piece.text)
    lengths_N = np.diff(offsets)
    ids_C = ids_S if is_chat_N.all() else ids_S[is_chat_N.repeat(lengths_N)]
    chat_offsets = np.concatenate([[0], (lengths_N * is_chat_N).cumsum()])
    row_K, *turns_3K = np.array(turns, np.int64).reshape(-1, 4).T
    token_offsets = tokenizer.offsets(pieces, encoded, ids_C)
    rows_2K = np.stack([chat_offsets[row_K], chat_offsets[row_K + 1]])
    spans = turn_tokens(np.stack(turns_3K), rows_2K, token_offsets, tokenizer.is_special_V[ids_C])
    spans += (offsets - chat_offsets)[row_K]
    return spans


def _covered_S(spans: NDArray[np.int64], num_tokens: int) -> NDArray[np.bool_]:
    """Return whether each token is in any of the spans [start, end)."""
    num_spans_S = np.zeros(num_tokens + 1, np.int16)  # +1 where a span starts, -1 where it ends
    np.add.at(num_spans_S, spans[0], 1)
    np.subtract.at(num_spans_S, spans[1], 1)
    return num_spans_S[:-1].cumsum(dtype=np.int16).astype(np.bool_)
