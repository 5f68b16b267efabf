"""Statements of the busiest calls, each made once: SQLAlchemy takes four times as long to run one as SQLite does.

On SQLite the driver gets their text; elsewhere, where the way to the server is longer than that, SQLAlchemy runs them.
"""

from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

_DIALECT = sqlite.dialect(paramstyle="named")


class PreparedStatement:
    """`values` are by the names of its parameters or, of an insert, of its columns, the same ones each time. Columns
    are of types that SQLite's driver takes and gives as they are: integers, numbers, text, bytes."""

    def __init__(self, clause: sa.Select[Any] | sa.CompoundSelect[Any] | sa.Insert | sa.TextClause) -> None:
        self._clause = clause.inline() if isinstance(clause, sa.Insert) else clause
        self._text, self._fixed = "", dict[str, Any]()
        self._row: Callable[[Iterable[Any]], Any] = tuple

    def rows(self, connection: sa.Connection, **values: Any) -> Sequence[Any]:
        """As SQLAlchemy gives them: with the columns' names."""
        if connection.dialect.name != _DIALECT.name:
            return connection.execute(self._clause, values).all()
        return [self._row(row) for row in self._execute(connection, values).fetchall()]

    def row(self, connection: sa.Connection, **values: Any) -> Any | None:
        """The first one."""
        found = self.rows(connection, **values)
        return found[0] if found else None

    def run(self, connection: sa.Connection, **values: Any) -> int:
        """How many rows it changed."""
        done = self._execute(connection, values) if connection.dialect.name == _DIALECT.name else None
        changed: int = (done or connection.execute(self._clause, values)).rowcount
        return changed

    def _execute(self, connection: sa.Connection, values: Mapping[str, Any]) -> Any:
        if not self._text:
            self._compile(list(values))
        driver: Any = connection.connection.dbapi_connection
        return driver.execute(self._text, {**self._fixed, **values})

    def _compile(self, names: Sequence[str]) -> None:
        keys = names if isinstance(self._clause, sa.Insert) else None
        compiled = self._clause.compile(dialect=_DIALECT, column_keys=keys)
        if isinstance(self._clause, sa.Select | sa.CompoundSelect):
            row: Any = namedtuple("Row", self._clause.selected_columns.keys())  # type: ignore[misc]
            self._row = row._make
        self._fixed = {name: value for name, value in compiled.params.items() if name not in names}
        self._text = str(compiled)  # last: threads may meet here
