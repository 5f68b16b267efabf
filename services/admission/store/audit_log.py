"""The audit log in the database. Triggers refuse changes, and deletions of entries younger than 30 days."""

import logging
from functools import partial
from typing import Any

import sqlalchemy as sa

from muxtune.v1 import operator_pb2
from services.admission.store.clock import now, to_timestamp
from services.admission.store.database import Database
from services.admission.store.pages import Page, read_page
from services.admission.store.prepared_statements import PreparedStatement
from services.admission.store.tables import audit_events
from services.rpc.audit import Audit, AuditEntry

_INSERT = PreparedStatement(sa.insert(audit_events))
_MAX_SUBJECT_CHARACTERS = 200  # an identity provider chooses the subject of its tokens
_log = logging.getLogger(__name__)


def create_audit_writer(database: Database) -> Audit:
    """Return the function with which the interceptor records a call.

    An entry that cannot be stored goes to the service's log and does not fail the call, whose work is done by then. A
    call that stores something fails by itself while the database is unavailable.
    """

    async def audit(entry: AuditEntry) -> None:
        try:
            await database.commit(partial(insert, entry=entry))
        except Exception:
            _log.exception("audit event not recorded: %s", entry)

    return audit


def insert(connection: sa.Connection, entry: AuditEntry) -> None:
    _INSERT.execute(
        connection,
        time=now(),
        subject=entry.principal.subject[:_MAX_SUBJECT_CHARACTERS],
        tenant=entry.principal.tenant or "",
        method=entry.method,
        resource=entry.resource.replace("\0", ""),  # PostgreSQL cannot store it
        status_code=entry.status_code,
    )


def list_page(connection: sa.Connection, tenant: str, after_sequence: int, size: int) -> Page:
    """Return the events after that sequence number, of one tenant or (empty) of all."""
    query = sa.select(audit_events).where(audit_events.c.sequence > after_sequence).order_by(audit_events.c.sequence)
    if tenant:
        query = query.where(audit_events.c.tenant == tenant)
    return read_page(connection, query, size)


def to_proto(row: Any) -> operator_pb2.AuditEvent:
    return operator_pb2.AuditEvent(
        sequence=row.sequence,
        time=to_timestamp(row.time),
        subject=row.subject,
        tenant=row.tenant,
        method=row.method,
        resource=row.resource,
        status_code=row.status_code,
    )
