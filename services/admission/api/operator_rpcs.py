"""OperatorService: quotas, usage and the audit log. protos/muxtune/v1/operator.proto specifies each RPC."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from muxtune.v1 import operator_pb2 as pb
from muxtune.v1 import operator_pb2_grpc
from services.admission.api import page_tokens
from services.admission.policy import quotas
from services.admission.store import audit_log
from services.admission.store.change_notifier import ChangeNotifier
from services.admission.store.database import Database
from services.concurrency.threads import Threads
from services.resource_names import check_tenant


class OperatorServicer(operator_pb2_grpc.OperatorServiceServicer):
    """Serves quotas, usage and the audit log. `default`: the quota of tenants that have none set."""

    def __init__(self, database: Database, default: pb.Quota, notifier: ChangeNotifier, threads: Threads) -> None:
        self._database, self._default, self._notifier, self._threads = database, default, notifier, threads

    async def SetQuota(self, request: pb.SetQuotaRequest, context: Any) -> pb.SetQuotaResponse:
        tenant = check_tenant(request.tenant)
        quota = await self._threads.run(self._set_quota, tenant, request.quota, request.update_mask.paths)
        self._notifier.notify()  # tasks that waited for a limit may continue
        return pb.SetQuotaResponse(quota=quota)

    async def GetQuota(self, request: pb.GetQuotaRequest, context: Any) -> pb.GetQuotaResponse:
        return pb.GetQuotaResponse(quota=await self._threads.run(self._quota, check_tenant(request.tenant)))

    async def ListUsage(self, request: pb.ListUsageRequest, context: Any) -> pb.ListUsageResponse:
        read = partial(self._threads.run, partial(self._usage, request.tenant))
        query = ["usage", request.tenant]
        rows, token = await page_tokens.read_page(request, query, read, lambda row: (row.day, row.tenant))
        return pb.ListUsageResponse(days=[quotas.usage_to_proto(row) for row in rows], next_page_token=token)

    async def ListAuditEvents(self, request: pb.ListAuditEventsRequest, context: Any) -> pb.ListAuditEventsResponse:
        size = page_tokens.resolve_size(request.page_size)
        page = await self._threads.run(self._events, request.tenant, request.after_sequence, size)
        return pb.ListAuditEventsResponse(events=[audit_log.to_proto(row) for row in page.rows])

    def _set_quota(self, tenant: str, quota: pb.Quota, fields: Sequence[str]) -> pb.Quota:
        with self._database.write() as connection:
            quotas.set_quota(connection, tenant, quota, fields)
            return quotas.get_quota(connection, tenant, self._default)

    def _quota(self, tenant: str) -> pb.Quota:
        with self._database.read() as connection:
            return quotas.get_quota(connection, tenant, self._default)

    def _usage(self, tenant: str, before: tuple[int, str] | None, limit: int) -> Any:
        with self._database.read() as connection:
            return quotas.list_usage(connection, _check_filter(tenant), before, limit)

    def _events(self, tenant: str, after_sequence: int, limit: int) -> Any:
        with self._database.read() as connection:
            return audit_log.list_page(connection, _check_filter(tenant), after_sequence, limit)


def _check_filter(tenant: str) -> str:
    """Return a list's filter: empty, or a tenant's name. Raises InvalidInputError for anything else."""
    return check_tenant(tenant) if tenant else ""
