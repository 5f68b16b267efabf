"""Page tokens: where the next page begins, bound to the query that made them.

The binding finds mistakes, not forgers: a page never holds what its caller may not see, wherever it begins.
"""

import base64
import hashlib
import json
from collections.abc import Sequence

from engine.errors import InvalidInputError

DEFAULT_SIZE, MAX_SIZE = 50, 1000


def size(asked: int) -> int:
    """Raises InvalidInputError for a negative size; larger ones are cut (AIP-158)."""
    if asked < 0:
        raise InvalidInputError.of_field("page_size", f"{asked} must not be negative")
    return min(asked or DEFAULT_SIZE, MAX_SIZE)


def token(query: Sequence[str], created: int, name: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([created, name, _bound(query, created, name)]).encode()).decode()


def start(query: Sequence[str], page_token: str) -> tuple[int, str] | None:
    """(created, name) after which the page begins. Raises InvalidInputError for a token of another query."""
    if not page_token:
        return None
    try:
        created, name, bound = json.loads(base64.urlsafe_b64decode(page_token.encode()))
        if bound == _bound(query, created, name) and 0 <= created < 1 << 63 and "\0" not in name:
            return int(created), str(name)
    except (ValueError, TypeError, RecursionError):
        pass
    raise InvalidInputError.of_field("page_token", "is not one we gave for this parent and filter: begin again")


def _bound(query: Sequence[str], created: int, name: str) -> str:
    return hashlib.sha256("\n".join([*query, f"{created:d}", name]).encode()).hexdigest()[:16]
