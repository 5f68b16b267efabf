"""Forwards audit entries of scheduling to admission, which has the audit log, before the caller gets its answer."""

import logging

from engine.errors import MuxtuneError
from muxtune.v1 import ledger_pb2, ledger_pb2_grpc, operator_pb2
from services.rpc.audit import Audit, AuditEntry
from services.rpc.rate_limit import RateLimit

_REFUSALS_PER_SECOND = 0.1  # entries a caller: an executor that is refused retries without end
_log = logging.getLogger(__name__)


def audit_through_ledger(ledger: "ledger_pb2_grpc.LedgerServiceAsyncStub", limit: RateLimit | None = None) -> Audit:
    """Return a function that records entries through the ledger.

    An entry that cannot be recorded is written to the service's log; the call still succeeds.
    """
    refusals = limit or RateLimit(_REFUSALS_PER_SECOND)

    async def audit(entry: AuditEntry) -> None:
        if entry.status_code == "PERMISSION_DENIED" and not refusals.try_acquire(entry.principal.subject):
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
            _log.exception("Audit entry not recorded: %s", entry)

    return audit
