"""The lease of the leading scheduler: one scheduler leads at a time, in a term that only grows. Synchronous, no gRPC.

As leases of executors do, it runs on the monotonic clock and lasts its whole duration again after a restart.
"""

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from engine.errors import SupersededError
from services.admission.ledger.fencing import FencedDatabase
from services.admission.store.tables import leaderships

_ROLE = "scheduling"


class SchedulerLease:
    """Every committed plan carries the leader's term, so that a superseded leader commits none."""

    def __init__(self, database: FencedDatabase, monotonic: Callable[[], float]) -> None:
        self._database, self._monotonic = database, monotonic
        with database.read() as connection:
            row = _row(connection)
        self._deadline = monotonic() + row.seconds if row is not None and row.holder else -1.0

    def acquire(self, holder: str, incarnation: str, seconds: float) -> tuple[str, str, int]:
        """Acquire or renew the lease if it is free; 0 seconds: resign. Return the leader, its incarnation and term."""
        with self._database.write() as connection:
            row = _row(connection)
            leader = ("", "", 0) if row is None else (row.holder, row.incarnation, row.term)
            is_same = leader[:2] == (holder, incarnation)
            may_lead = is_same or holder == leader[0] or not leader[0] or self._deadline <= self._monotonic()
            if not may_lead or (seconds <= 0 and not is_same):
                return leader
            leader = ("", "", leader[2]) if seconds <= 0 else (holder, incarnation, leader[2] + (not is_same))
            if row is None:
                connection.execute(sa.insert(leaderships).values(role=_ROLE))
            values = dict(zip(("holder", "incarnation", "term"), leader, strict=True))
            connection.execute(
                sa.update(leaderships).where(leaderships.c.role == _ROLE).values(**values, seconds=seconds)
            )
            self._deadline = self._monotonic() + seconds
        return leader


def check_leader_term(connection: sa.Connection, term: int) -> None:
    """Raises SupersededError unless `term` is the newest leader's."""
    row = _row(connection)
    newest = 0 if row is None else row.term
    if term != newest:
        raise SupersededError(f"leader term {term} was superseded by {newest}: another scheduler leads")


def _row(connection: sa.Connection) -> Any:
    return connection.execute(sa.select(leaderships).where(leaderships.c.role == _ROLE)).one_or_none()
