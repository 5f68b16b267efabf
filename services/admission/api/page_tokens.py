"""Pages of lists, and their tokens: the start of the next page, bound to the query of the page before.

The binding detects mistakes, not forgeries: a forged token shows its caller nothing that the caller may not see.
"""

import base64
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from engine.errors import InvalidInputError
from services.admission.store.pages import Page

DEFAULT_SIZE, MAX_SIZE = 50, 1000

Position = tuple[int, str]  # of a row in its list: when it was created, and its name


class PageRequest(Protocol):
    @property
    def page_size(self) -> int: ...

    @property
    def page_token(self) -> str: ...


async def read_page(
    request: PageRequest,
    query: Sequence[str],
    read: Callable[[Position | None, int], Awaitable[Page]],
    position: Callable[[Any], Position] = lambda row: (row.created, row.name),
) -> tuple[Sequence[Any], str]:
    """Return the rows of the requested page, and the token of the page after it; "" if there is none.

    `read` returns at most so many rows after a position; fewer where they fill a message (AIP-158 allows that). Raises
    InvalidInputError as `resolve_size` and `decode`.
    """
    page = await read(decode(query, request.page_token), resolve_size(request.page_size))
    return page.rows, encode(query, *position(page.rows[-1])) if page.has_more else ""


def resolve_size(page_size: int) -> int:
    """Return the default for 0, and reduce a large size to the maximum (AIP-158). Raises InvalidInputError for a
    negative size."""
    if page_size < 0:
        raise InvalidInputError.of_field("page_size", f"{page_size} must not be negative")
    return min(page_size or DEFAULT_SIZE, MAX_SIZE)


def encode(query: Sequence[str], created: int, name: str) -> str:
    """Return the token of the page that follows (created, name)."""
    return base64.urlsafe_b64encode(json.dumps([created, name, _digest(query, created, name)]).encode()).decode()


def decode(query: Sequence[str], page_token: str) -> tuple[int, str] | None:
    """Return the (created, name) that the page follows, or None for the first page. Raises InvalidInputError for a
    token of another query."""
    if not page_token:
        return None
    try:
        created, name, digest = json.loads(base64.urlsafe_b64decode(page_token.encode()))
        if digest == _digest(query, created, name) and 0 <= created < 1 << 63 and "\0" not in name:
            return int(created), str(name)
    except (ValueError, TypeError, RecursionError):
        pass
    raise InvalidInputError.of_field(
        "page_token", "does not belong to this parent and filter: start again without a token"
    )


def _digest(query: Sequence[str], created: int, name: str) -> str:
    return hashlib.sha256("\n".join([*query, f"{created:d}", name]).encode()).hexdigest()[:16]
