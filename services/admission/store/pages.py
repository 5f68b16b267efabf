"""Reads one page of a list: rows up to a number and up to the bytes of a message, whichever comes first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from services.message_parts import MAX_PART_BYTES

_ROWS_OF_A_FETCH = 32
_ROW_BYTES = 64  # of a row's numbers and times


@dataclass(frozen=True)
class Page:
    """Rows of a list. `has_more`: further rows follow."""

    rows: Sequence[Any]
    has_more: bool


def read_page(connection: sa.Connection, query: "sa.Select[Any]", size: int, max_bytes: int = MAX_PART_BYTES) -> Page:
    """Return the query's first rows, at least one if there is one. Rows behind the page are not read, but one."""
    rows, num_bytes = list[Any](), 0
    options = {"yield_per": _ROWS_OF_A_FETCH}
    for row in connection.execute(query.limit(size + 1).execution_options(**options)):
        num_bytes += _ROW_BYTES + sum(len(value) for value in row if isinstance(value, str | bytes))
        if rows and (len(rows) == size or num_bytes > max_bytes):
            return Page(rows, has_more=True)
        rows.append(row)
    return Page(rows, has_more=False)
