"""The audit log in the database: it only grows, held by triggers of the migration. Synchronous, no gRPC."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa

from muxtune.v1 import operator_pb2
from services.admission.store.clock import now, timestamp
from services.admission.store.database import Database
from services.admission.store.prepared_statements import PreparedStatement
from services.admission.store.tables import audit_events
from services.rpc.audit import Audit, AuditEntry

_INSERT = PreparedStatement(sa.insert(audit_events))
_log = logging.getLogger(__name__)


def audited_in(database: Database) -> Audit:
    """What the gate calls. An entry that cannot be written is the operators' error, in the service's log, and not the
    caller's, whose work is done by then; a call that stores something fails by itself where the database is away."""

    async def audit(entry: AuditEntry) -> None:
        try:
            await database.commit(partial(insert, entry=entry))
        except Exception:
            _log.exception("audit: not recorded: %s", entry)

    return audit


def insert(connection: sa.Connection, entry: AuditEntry) -> None:
    _INSERT.execute(
        connection,
        time=now(),
        subject=entry.principal.subject,
        tenant=entry.principal.tenant or "",
        method=entry.method,
        resource=entry.resource.replace("\0", ""),  # which PostgreSQL does not store
        status_code=entry.status_code,
    )


def page(connection: sa.Connection, tenant: str, after_sequence: int, limit: int) -> Sequence[Any]:
    query = sa.select(audit_events).where(audit_events.c.sequence > after_sequence).order_by(audit_events.c.sequence)
    if tenant:
        query = query.where(audit_events.c.tenant == tenant)
    return connection.execute(query.limit(limit)).all()


def to_proto(row: Any) -> operator_pb2.AuditEvent:
    return operator_pb2.AuditEvent(
        sequence=row.sequence,
        time=timestamp(row.time),
        subject=row.subject,
        tenant=row.tenant,
        method=row.method,
        resource=row.resource,
        status_code=row.status_code,
    )
