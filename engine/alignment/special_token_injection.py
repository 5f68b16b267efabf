"""Special tokens spelled out in what somebody wrote: they stay text, or a message could end itself and forge the next.

Found as turns are: the conversation is rendered a second time with a mark inside each of them, and must come out the
same but for the marks. Only a template's own special tokens are read as such.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.alignment.chat_template import TemplateRefusedError
from engine.alignment.tokenizer import BackboneTokenizer

_MARK = "\ue002Mx\ue003"  # private use


def smuggled_spans(
    messages: Sequence[Mapping[str, Any]], text: str, tokenizer: BackboneTokenizer
) -> list[tuple[int, int]]:
    """Characters [start, end) of `text`, the rendered messages, where one of them spells a special token out.

    Raises TemplateRefusedError where the template does anything with it but to put it there.
    """
    assert tokenizer.template is not None
    spelled = tokenizer.special_pattern
    if not _spells(messages, spelled):
        return []
    rendered = tokenizer.template.render([_marked(message, spelled) for message in messages])
    parts = rendered.split(_MARK)
    if _MARK in text or "".join(parts) != text:
        raise TemplateRefusedError("the chat template reads a special token that a message spells out")
    spans, place = [], 0
    for part in parts[:-1]:
        place += len(part)
        found = spelled.match(text, place - 1)  # the mark stands behind its first character
        if found is None:
            raise TemplateRefusedError("the chat template changes a special token that a message spells out")
        spans.append(found.span())
    return spans


def _spells(value: Any, spelled: re.Pattern[str]) -> bool:
    """Whether any string in it does: a template may write any field."""
    if isinstance(value, str):
        return spelled.search(value) is not None
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if _spells(part, spelled):
            return True
    return False


def _marked(value: Any, spelled: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return spelled.sub(lambda found: found[0][0] + _MARK + found[0][1:], value)
    if isinstance(value, dict):
        return {key: _marked(part, spelled) for key, part in value.items()}
    return [_marked(part, spelled) for part in value] if isinstance(value, list) else value
