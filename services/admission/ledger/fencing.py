"""Fencing of the ledger's leader: the process that acquired it last owns it; writes of earlier ones are refused.

The fence is a term in the database. Every transaction of a leader compares its own term with it, so that a leader that
was superseded while it was paused or cut off commits nothing. Synchronous, no gRPC.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import sqlalchemy as sa

from engine.errors import UnavailableError
from services.admission.store.database import Database
from services.admission.store.tables import leaderships

_ROLE = "ledger"


class FencedDatabase:
    """Acquires the ledger of a database; its writes succeed until the next FencedDatabase acquires it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        with database.write() as connection:
            self.term = _term(connection) + 1
            if self.term == 1:
                connection.execute(sa.insert(leaderships).values(role=_ROLE))
            acquire = sa.update(leaderships).where(leaderships.c.role == _ROLE).values(term=self.term)
            connection.execute(acquire)

    def read(self) -> AbstractContextManager[sa.Connection]:
        return self._database.read()

    @contextmanager
    def read_consistently(self) -> Iterator[sa.Connection]:
        """Open a transaction in which all statements read the same state. Raises UnavailableError if another process
        had acquired the ledger by then."""
        with self._database.read_consistently() as connection:
            self._check(connection)
            yield connection

    def is_current(self) -> bool:
        """Return whether no other process has acquired the ledger since."""
        with self.read() as connection:
            return _term(connection) == self.term

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Open a transaction. Raises UnavailableError if another process has acquired the ledger. No process can
        acquire it during the transaction, because there is one writer at a time."""
        with self._database.write() as connection:
            self._check(connection)
            yield connection

    def _check(self, connection: sa.Connection) -> None:
        if (newest := _term(connection)) != self.term:
            raise UnavailableError(
                f"another admission leads the ledger in term {newest}, this one did in {self.term}: try again"
            )


def _term(connection: sa.Connection) -> int:
    """Return the newest leader's term; 0 before the first one."""
    return connection.execute(sa.select(leaderships.c.term).where(leaderships.c.role == _ROLE)).scalar() or 0
