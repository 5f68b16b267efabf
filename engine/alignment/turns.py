"""What an assistant says in a rendered conversation: characters found by rendering, checked exactly, never guessed.

A turn begins where the prompt ends that a server would send for it: the messages before it with the generation prompt.
It ends with its stop token. Both must hold in the one text that is trained on, or the row is refused.
Legend: K turns, T tokens of the conversations that they stand in.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.alignment.offsets import Offsets
from engine.alignment.templates import TemplateRefusedError
from engine.alignment.tokens import BackboneTokenizer

_MARK = "\ue000Mx\ue001"  # private use; mixed case, so that a template that changes letters is noticed


class Turn(NamedTuple):
    """Characters [start, end) of the text; the message's content ends at `content_end`, template text follows."""

    start: int
    end: int
    content_end: int


def assistant_turns(messages: Sequence[Mapping[str, Any]], text: str, tokenizer: BackboneTokenizer) -> list[Turn]:
    """Raises TemplateRefusedError where the template's output can't be told apart exactly."""
    return [_turn(messages, i, text, tokenizer) for i, m in enumerate(messages) if m["role"] == "assistant"]


def _turn(messages: Sequence[Mapping[str, Any]], index: int, text: str, tokenizer: BackboneTokenizer) -> Turn:
    assert tokenizer.template is not None
    before = tokenizer.template.render(messages[:index], add_generation_prompt=True)
    if not text.startswith(before):
        raise TemplateRefusedError("the chat template opens this turn otherwise than its generation prompt")
    is_last = index + 1 == len(messages)
    through = text if is_last else tokenizer.template.render(messages[: index + 1])
    if text.startswith(through) and through.startswith(before):
        content = messages[index]["content"].strip()
        content_end = max(len(before), through.find(content, len(before)) + len(content))
        return Turn(len(before), len(through), content_end)
    return _marked_turn(messages, index, text, len(before), tokenizer)


def _marked_turn(
    messages: Sequence[Mapping[str, Any]], index: int, text: str, start: int, tokenizer: BackboneTokenizer
) -> Turn:
    """For templates that render a turn otherwise once more messages follow (Qwen3 drops what was thought before).

    A mark put behind the content must come out in the whole text, and change nothing else: there the content ends.
    """
    assert tokenizer.template is not None
    content = messages[index]["content"]
    bare = content.rstrip()
    marked = [dict(message) for message in messages]
    marked[index]["content"] = bare + _MARK + content[len(bare) :]
    rendered = tokenizer.template.render(marked)
    content_end = rendered.find(_MARK)
    if _MARK in text or content_end < start or rendered[:content_end] + rendered[content_end + len(_MARK) :] != text:
        raise TemplateRefusedError("the chat template rewrites earlier turns, so what bears loss can't be told exactly")
    rest = text[content_end:].lstrip()
    stop = max((token for token in tokenizer.special_tokens if rest.startswith(token)), key=len, default="")
    return Turn(start, len(text) - len(rest) + len(stop) if stop else content_end, content_end)


def turn_tokens(
    turns_3K: NDArray[np.int64], rows_2K: NDArray[np.int64], offsets: Offsets, is_special_T: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """The tokens [start, end) that lie in each turn, 2 by K: up to its stop token, that one included, for template text
    after it is never generated. A token of no width (a sentencepiece prefix) belongs to the turn if it lies strictly
    inside.

    `turns_3K`: the fields of each Turn, in characters as `offsets` counts them; `rows_2K`: the tokens [start, end) of
    the conversation that it stands in.
    """
    (start_K, end_K, content_end_K), (row_start_K, row_end_K) = turns_3K, rows_2K
    starts_T, ends_T = offsets
    first_K = np.maximum(starts_T.searchsorted(start_K), ends_T.searchsorted(start_K, "right"))
    first_K = first_K.clip(row_start_K, row_end_K)
    last_K = np.minimum(starts_T.searchsorted(end_K), ends_T.searchsorted(end_K, "right")).clip(first_K, row_end_K)
    after_K = starts_T.searchsorted(content_end_K).clip(first_K, row_end_K)
    special = np.concatenate([[-1], np.flatnonzero(is_special_T)])
    stop_K = special[special.searchsorted(last_K) - 1]  # the last one before
    return np.stack([first_K, np.where(stop_K >= after_K, stop_K + 1, last_K)])
