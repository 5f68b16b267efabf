"""Prepared statements of the busiest calls, compiled once: SQLAlchemy takes four times as long as SQLite to run one.

On SQLite the driver gets the compiled text. On PostgreSQL SQLAlchemy runs the statement, because the round trip to
the server takes longer than that.
"""

from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

_DIALECT = sqlite.dialect(paramstyle="named")


class PreparedStatement:
    """`values` are named after the statement's parameters or, of an insert, after its columns; the same names each
    time. Columns have types that SQLite's driver passes unchanged: integers, floats, text, bytes."""

    def __init__(self, clause: sa.Select[Any] | sa.CompoundSelect[Any] | sa.Insert | sa.TextClause) -> None:
        self._clause = clause.inline() if isinstance(clause, sa.Insert) else clause
        self._text, self._constants = "", dict[str, Any]()
        self._to_row: Callable[[Iterable[Any]], Any] = tuple

    def fetch_all(self, connection: sa.Connection, **values: Any) -> Sequence[Any]:
        """Return the rows, with the columns' names as attributes."""
        if connection.dialect.name != _DIALECT.name:
            return connection.execute(self._clause, values).all()
        return [self._to_row(row) for row in self._run_on_driver(connection, values).fetchall()]

    def fetch_first(self, connection: sa.Connection, **values: Any) -> Any | None:
        """Return the first row, or None."""
        rows = self.fetch_all(connection, **values)
        return rows[0] if rows else None

    def execute(self, connection: sa.Connection, **values: Any) -> int:
        """Run the statement; return the number of changed rows."""
        if connection.dialect.name != _DIALECT.name:
            return connection.execute(self._clause, values).rowcount
        return int(self._run_on_driver(connection, values).rowcount)

    def _run_on_driver(self, connection: sa.Connection, values: Mapping[str, Any]) -> Any:
        if not self._text:
            self._compile(list(values))
        driver: Any = connection.connection.dbapi_connection
        return driver.execute(self._text, {**self._constants, **values})

    def _compile(self, names: Sequence[str]) -> None:
        keys = names if isinstance(self._clause, sa.Insert) else None
        compiled = self._clause.compile(dialect=_DIALECT, column_keys=keys)
        if isinstance(self._clause, sa.Select | sa.CompoundSelect):
            row: Any = namedtuple("Row", self._clause.selected_columns.keys())  # type: ignore[misc]
            self._to_row = row._make
        self._constants = {name: value for name, value in compiled.params.items() if name not in names}
        self._text = str(compiled)  # last, because several threads may compile at once
