"""Assistant turns in a rendered conversation: their characters are found by rendering and checked, never guessed.

A turn begins after the prompt that a server would send for it: the messages before it with the generation prompt. It
ends with its stop token. The text that is trained on must contain both exactly, else the row is refused.
Legend: K turns, T tokens of the conversations that they stand in.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.alignment.chat_template import ChatTemplate, RenderedConversation, TemplateRefusedError
from engine.alignment.token_offsets import Offsets
from engine.alignment.tokenizer import BackboneTokenizer

_MARK = "\ue000Mx\ue001"  # private use; mixed case, so that a template that changes letters is noticed
_WRONG_START = "the chat template starts an assistant turn differently from its generation prompt"


class AssistantTurn(NamedTuple):
    """The characters [start, end) of a turn. After `content_end`, the end of the content, follows template text."""

    start: int
    end: int
    content_end: int


def find_assistant_turns(
    messages: Sequence[Mapping[str, Any]], rendered: RenderedConversation, tokenizer: BackboneTokenizer
) -> list[AssistantTurn]:
    """Return the assistant turns in order. Raises TemplateRefusedError where their bounds can't be found exactly."""
    assert tokenizer.template is not None
    bounds = _bounds_by_start if rendered.starts is not None else _bounds_by_rendering
    turns, text = [], rendered.text
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, end = bounds(messages, index, rendered, tokenizer.template)
        if end is None:
            turns.append(_marked_turn(messages, index, text, start, tokenizer))
        else:
            content = message["content"].strip()
            turns.append(AssistantTurn(start, end, max(start, text.find(content, start, end) + len(content))))
    return turns


def _bounds_by_start(
    messages: Sequence[Mapping[str, Any]], index: int, rendered: RenderedConversation, _: ChatTemplate
) -> tuple[int, int | None]:
    """Return where the prompt for message `index` ends, and where the message itself ends."""
    text, starts, prompt = rendered
    assert starts is not None
    if not text.startswith(prompt, starts[index]):
        raise TemplateRefusedError(_WRONG_START)
    start, end = starts[index] + len(prompt), starts[index + 1] if index + 1 < len(starts) else len(text)
    return start, end if start <= end else None


def _bounds_by_rendering(
    messages: Sequence[Mapping[str, Any]], index: int, rendered: RenderedConversation, template: ChatTemplate
) -> tuple[int, int | None]:
    """Return the same by rendering; the end is None where later messages change how this message is rendered."""
    text = rendered.text
    before = template.render(messages[:index], add_generation_prompt=True)
    if not text.startswith(before):
        raise TemplateRefusedError(_WRONG_START)
    through = text if index + 1 == len(messages) else template.render(messages[: index + 1])
    is_unchanged = text.startswith(through) and through.startswith(before)
    return len(before), len(through) if is_unchanged else None


def _marked_turn(
    messages: Sequence[Mapping[str, Any]], index: int, text: str, start: int, tokenizer: BackboneTokenizer
) -> AssistantTurn:
    """Find a turn that a template renders differently once more messages follow (Qwen3 drops earlier reasoning).

    A mark is added to the end of the content. It must appear in the rendered text and change nothing else.
    """
    assert tokenizer.template is not None
    content = messages[index]["content"]
    bare = content.rstrip()
    marked = [dict(message) for message in messages]
    marked[index]["content"] = bare + _MARK + content[len(bare) :]
    rendered = tokenizer.template.render(marked)
    content_end = rendered.find(_MARK)
    if _MARK in text or content_end < start or rendered[:content_end] + rendered[content_end + len(_MARK) :] != text:
        raise TemplateRefusedError(
            "the chat template rewrites earlier turns, so that their ends can't be found exactly"
        )
    rest = text[content_end:].lstrip()
    stop = max((token for token in tokenizer.special_tokens if rest.startswith(token)), key=len, default="")
    return AssistantTurn(start, len(text) - len(rest) + len(stop) if stop else content_end, content_end)


def turn_tokens(
    turns_3K: NDArray[np.int64], rows_2K: NDArray[np.int64], offsets: Offsets, is_special_T: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Return the tokens [start, end) of each turn, 2 by K, up to and with its stop token.

    Template text after the stop token is never generated. A token without width (a sentencepiece prefix) belongs to the
    turn if it lies strictly inside. `turns_3K`: the fields of each AssistantTurn, in characters as `offsets` counts
    them. `rows_2K`: the tokens [start, end) of the turn's conversation.
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
