"""Chat templates, rendered exactly as transformers renders them, except that the date is fixed.

Source: transformers.utils.chat_template_utils: jinja2's immutable sandbox, trimmed blocks, loop controls, its tojson;
the content of `{% generation %}` is plain text. Backbones may come from anywhere: a template can access nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.alignment.template_analysis import mark_messages

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # templates read the first
_TODAY = datetime(2024, 7, 26)  # as in Llama 3's template: a step's tokens must not depend on the day it runs
_REASONING_FIELDS_SET = frozenset(_REASONING_FIELDS)
_MARK_NAME, _MARK = (
    "_message_begins",
    "".join(["message", " begins"]),
)  # compared by identity: no other string is this object
_FAST_LOOP_ATTRIBUTES = frozenset({"first", "last", "index", "index0"})


class TemplateRefusedError(Exception):
    """The template does not compile or cannot render these messages. The text never quotes them."""


class RenderedConversation(NamedTuple):
    """A conversation as text.

    `starts`: the character at which each message begins, or None for a template that does not render one message after
    another (see template_analysis). text[:starts[i]] is the conversation before message i, and text[:starts[i]] +
    `generation_prompt` is the prompt for message i.
    """

    text: str
    starts: list[int] | None
    generation_prompt: str


class ChatTemplate:
    """A compiled template with the special tokens it may name. Raises TemplateRefusedError if it does not compile."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            raise_exception=_raise,
            strftime_now=_TODAY.strftime,
            dict=_TemplateDict(),
            namespace=_TemplateNamespace,
        )
        try:
            self._template = self._marked = _compiled(environment, source)
            tree = environment.parse(source)
        except jinja2.TemplateError as error:
            raise TemplateRefusedError(f"the chat template does not compile: {error}") from error
        constants = {"tools": None, "documents": None, **special_tokens}
        self._always = {**environment.globals, **constants, _MARK_NAME: _MARK}
        self._generation_prompt: str | None = None
        if mark_messages(tree, _MARK_NAME, constants):
            self._marked = _compiled(environment, tree)
            with suppress(TemplateRefusedError):  # render refuses each row with the reason
                self._generation_prompt = self.render([], add_generation_prompt=True).removeprefix(self.render([]))

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """Return the conversation as text. Raises TemplateRefusedError where the template cannot render it."""
        return "".join(self._chunks(self._template, messages, add_generation_prompt))

    def render_marked(self, messages: Sequence[Mapping[str, Any]]) -> RenderedConversation:
        """Return the conversation as text, with the start of each message where the template allows it."""
        if self._generation_prompt is None:
            return RenderedConversation(self.render(messages), None, "")
        chunks: list[str] = []
        starts: list[int] = []
        num_characters = 0
        for chunk in self._chunks(self._marked, messages, False):
            if chunk is _MARK:  # no text of a row is this object
                starts.append(num_characters)
            else:
                chunks.append(chunk)
                num_characters += len(chunk)
        return RenderedConversation("".join(chunks), starts, self._generation_prompt)

    def _chunks(
        self, template: jinja2.Template, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> list[str]:
        try:
            variables = {
                **self._always,
                "messages": [_with_reasoning(message) for message in messages],
                "add_generation_prompt": add_generation_prompt,
            }
            # As Template.render, without the code that shows the template's line in a traceback.
            return list(template.root_render_func(template.new_context(variables, shared=True)))
        except Exception as error:  # a template may fail on any value in any way
            kind = type(error).__name__
            raise TemplateRefusedError(f"the chat template cannot render this row ({kind})") from None


def _compiled(environment: jinja2.Environment, source: str | jinja2.nodes.Template) -> jinja2.Template:
    template = environment.from_string(source)
    template.globals = {}  # each rendering gets them as variables: no second look-up
    return template


class _Sandbox(ImmutableSandboxedEnvironment):
    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return `loop.first` and others, which templates read at every message, without the sandbox's checks."""
        if type(obj) is LoopContext and attribute in _FAST_LOOP_ATTRIBUTES:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


class _Generation(Extension):
    """Renders the content of `{% generation %}...{% endgeneration %}`, which marks assistant turns, as it is."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        text: str = caller()
        return text


class _TemplateDict:
    """Replaces `dict` for templates, without access to the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(jinja2.utils.Namespace):
    """Replaces `namespace` for templates, without names that start with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no `self`: so that namespace(self=...) works
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a chat template cannot store {name!r}")


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if _REASONING_FIELDS_SET.isdisjoint(message):
        return message
    reasoning = next((message[key] for key in _REASONING_FIELDS if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
