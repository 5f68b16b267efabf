"""Special tokens that messages spell out: they stay text, or a message could end itself and forge the next one.

The conversation is rendered a second time with a mark inside each of them, and must come out the same but for the
marks. Only special tokens that the template writes are encoded as special tokens.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from engine.alignment.chat_template import TemplateRefusedError
from engine.alignment.tokenizer import BackboneTokenizer

_MARK = "\ue002Mx\ue003"  # private use


def find_injected_tokens(
    messages: Sequence[Mapping[str, Any]], text: str, tokenizer: BackboneTokenizer
) -> list[tuple[int, int]]:
    """Return the characters [start, end) of special tokens that messages spell out in `text`, the rendered messages.

    Raises TemplateRefusedError where the template does not copy them unchanged.
    """
    assert tokenizer.template is not None
    pattern = tokenizer.special_pattern
    if not _contains(messages, pattern):
        return []
    rendered = tokenizer.template.render([_marked(message, pattern) for message in messages])
    parts = rendered.split(_MARK)
    if _MARK in text or "".join(parts) != text:
        raise TemplateRefusedError("the chat template interprets a special token that a message spells out")
    spans, position = [], 0
    for part in parts[:-1]:
        position += len(part)
        match = pattern.match(text, position - 1)  # the mark follows the token's first character
        if match is None:
            raise TemplateRefusedError("the chat template changes a special token that a message spells out")
        spans.append(match.span())
    return spans


def _contains(value: Any, pattern: re.Pattern[str]) -> bool:
    """Return whether any string in `value` matches: a template may write any field, and any key."""
    if isinstance(value, str):
        return pattern.search(value) is not None
    parts = chain(value, value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_contains(part, pattern) for part in parts)


def _marked(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda match: match[0][0] + _MARK + match[0][1:], value)
    if isinstance(value, dict):
        return {_marked(key, pattern): _marked(part, pattern) for key, part in value.items()}
    return [_marked(part, pattern) for part in value] if isinstance(value, list) else value
