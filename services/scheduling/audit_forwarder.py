"""The audit log is admission's: what scheduling has to say goes there before the caller hears the answer."""

import logging

from engine.errors import MuxtuneError, OverloadedError
from muxtune.v1 import ledger_pb2, ledger_pb2_grpc, operator_pb2
from services.rpc.audit import Audit, AuditEntry
from services.rpc.rate_limit import RateLimit

_REFUSALS_PER_SECOND = 0.1  # of one caller's: an executor that is refused comes again and again
_log = logging.getLogger(__name__)


def audit_through_ledger(ledger: "ledger_pb2_grpc.LedgerServiceAsyncStub", limit: RateLimit | None = None) -> Audit:
    """What the gate calls. What cannot be recorded is in the service's log, and no error of the caller's."""
    refusals = limit or RateLimit(_REFUSALS_PER_SECOND)

    async def audit(entry: AuditEntry) -> None:
        if entry.status_code == "PERMISSION_DENIED":
            try:
                refusals.take(entry.principal.subject, "")
            except OverloadedError:
                return
        event = operator_pb2.AuditEvent(
            subject=entry.principal.subject,
            tenant=entry.principal.tenant or "",
            method=entry.method,
            resource=entry.resource,
            status_code=entry.status_code,
        )
        try:
            await ledger.RecordAuditEvent(ledger_pb2.RecordAuditEventRequest(event=event))
        except MuxtuneError:
            _log.exception("audit: not recorded: %s", entry)

    return audit
