"""Who keeps the ledger: of several processes on one database the one that took it last. Synchronous, no gRPC.

The fence is a term in the database that every transaction of a keeper is compared with: whoever was superseded, while
it was paused or cut off, commits nothing any more.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import sqlalchemy as sa

from engine.errors import UnavailableError
from services.admission.store.database import Database
from services.admission.store.tables import leaderships

_ROLE = "ledger"


class FencedDatabase:
    """A database whose writes count until the next FencedDatabase is made on it; making one takes the ledger."""

    def __init__(self, database: Database) -> None:
        self._database = database
        with database.write() as connection:
            self.term = _term(connection) + 1
            if self.term == 1:
                connection.execute(sa.insert(leaderships).values(role=_ROLE))
            ours = sa.update(leaderships).where(leaderships.c.role == _ROLE).values(term=self.term)
            connection.execute(ours)

    def read(self) -> AbstractContextManager[sa.Connection]:
        return self._database.read()

    def is_current(self) -> bool:
        with self.read() as connection:
            return _term(connection) == self.term

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Raises UnavailableError where another has taken the ledger: since writers take turns, none can meanwhile."""
        with self._database.write() as connection:
            if (newest := _term(connection)) != self.term:
                raise UnavailableError(f"another admission keeps the ledger, in term {newest}; {self.term} is over")
            yield connection


def _term(connection: sa.Connection) -> int:
    """Of the newest keeper; 0: there was none."""
    return connection.execute(sa.select(leaderships.c.term).where(leaderships.c.role == _ROLE)).scalar() or 0
