"""Cuts what is too large for one message into parts, and keeps the parts of an answer while its caller reads them."""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from google.protobuf.message import Message

from engine.errors import SupersededError

# A part holds more only if a single item is larger. gRPC clients accept 4 MiB by default.
MAX_PART_BYTES = 3 << 20
_MAX_HELD, _HELD_SECONDS = 4, 60.0  # answers that are being read, and the time for one
M = TypeVar("M", bound=Message)
T = TypeVar("T")


def cut(items: Iterable[M], max_bytes: int = MAX_PART_BYTES) -> Iterator[list[M]]:
    """Yield the items in lists of at most so many bytes, at least one item in each."""
    part, size = list[M](), 0
    for item in items:
        item_size = item.ByteSize() + 8  # its tag and length
        if part and size + item_size > max_bytes:
            yield part
            part, size = [], 0
        part.append(item)
        size += item_size
    if part:
        yield part


def joined(parts: Iterable[M], max_bytes: int = MAX_PART_BYTES) -> list[M]:
    """Return the parts of one message, neighbours merged where the result has at most so many bytes."""
    whole = list[M]()
    for part in parts:
        if whole and whole[-1].ByteSize() + part.ByteSize() <= max_bytes:
            whole[-1].MergeFrom(part)
        else:
            whole.append(part)
    return whole


class HeldPages(Generic[T]):
    """Pages of answers that were made at once, so that all pages of an answer belong together. An answer is kept until
    its last page is read, for a minute at most, and only if it is one of the newest."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._held: dict[str, tuple[Sequence[T], float]] = {}

    def hold(self, pages: Sequence[T]) -> tuple[T, str]:
        """Return the first page and the token of the next one, "" if there is none."""
        self._drop_old()
        key = secrets.token_hex(8)
        if len(pages) > 1:
            self._held[key] = pages, self._monotonic() + _HELD_SECONDS
        return pages[0], self._token(key, pages, 1)

    def page(self, token: str) -> tuple[T, str]:
        """Return the token's page and the token of the next one. Raises SupersededError if the answer is gone."""
        self._drop_old()
        key, _, number = token.partition(".")
        pages, _ = self._held.get(key, ((), 0.0))
        if not (number.isdecimal() and len(number) < 9 and 0 < int(number) < len(pages)):
            raise SupersededError("page_token: this answer is no longer kept: start again without a token")
        if not (following := self._token(key, pages, int(number) + 1)):
            del self._held[key]
        return pages[int(number)], following

    def _token(self, key: str, pages: Sequence[T], number: int) -> str:
        return f"{key}.{number}" if number < len(pages) else ""

    def _drop_old(self) -> None:
        now = self._monotonic()
        live = [(key, held) for key, held in self._held.items() if held[1] > now]
        self._held = dict(live[-_MAX_HELD:])
