"""Output to the terminal: what rows, names, arguments and errors contain is shown on it, and never obeyed by it.

A control character in a row could else move the cursor, change the window's title, hide text or answer for the user;
the same holds where the output is a pipe that ends at a terminal.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment
from rich.table import Table
from typer.core import TyperGroup

_CONTROLS = [*(set(range(0x20)) - {0x09, 0x0A}), *range(0x7F, 0xA0)]  # C0 but tab and line feed, DEL, C1
_BIDI = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_BREAKS = [0x2028, 0x2029]
_SURROGATES = range(0xD800, 0xE000)  # Python's marks of bytes that are not UTF-8; they cannot be written
_UNSAFE = [*_CONTROLS, *_BIDI, *_BREAKS, *_SURROGATES]
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _UNSAFE}
_JSON_ESCAPES = {code: f"\\u{code:04x}" for code in _UNSAFE}
# Exceptions about the command line, of click or of the copy of it in newer versions of typer.
_CommandLineError: Any = typer.BadParameter.__bases__[0].__bases__[0]


def visible(text: str) -> str:
    r"""Return the text with its control characters as escapes, such as \x1b. Tabs and line feeds remain."""
    return text.translate(_ESCAPES)


class Terminal(Console):
    """A rich console that prints text unchanged but for its control characters: without markup and line breaks."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, soft_wrap=True, markup=False, highlight=False)
        self.push_render_hook(_ControlsEscaped())

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects; of strings rich itself would silently drop some control characters."""
        super().print(*(visible(each) if isinstance(each, str) else each for each in objects), **options)


class _ControlsEscaped(RenderHook):
    """Escapes control characters in whatever is rendered; rich's own codes are added later."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(renderable) for renderable in renderables]


class _Escaped:
    def __init__(self, renderable: ConsoleRenderable) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class CommandGroup(TyperGroup):
    """A group of commands whose errors about the command line show the arguments that they quote."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _visible_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _visible_errors():
            return super().invoke(ctx)


@contextmanager
def _visible_errors() -> Iterator[None]:
    try:
        yield
    except _CommandLineError as error:
        if isinstance(message := getattr(error, "message", None), str):
            error.message = visible(message)
        raise


console, error_console = Terminal(), Terminal(stderr=True)


def format_json(value: Any) -> str:
    """Return JSON as one line without control characters, also without those that JSON allows."""
    return json.dumps(value, ensure_ascii=False).translate(_JSON_ESCAPES)


def print_json(messages: Iterable[Message]) -> None:
    """Print one JSON object per line, with the field names of the protos."""
    for message in messages:
        fields = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        print(format_json(fields), flush=True)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table."""
    result = Table(title=title or None, title_justify="left")
    for column in columns:
        result.add_column(column, overflow="fold")
    for row in rows:
        result.add_row(*(visible(str(cell)) for cell in row))
    console.print(result)
