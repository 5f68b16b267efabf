"""OperatorService: quotas, accounts, audit log. What each RPC promises stands in protos/muxtune/v1/operator.proto."""

import asyncio
from collections.abc import Sequence
from typing import Any

from muxtune.v1 import operator_pb2 as pb
from muxtune.v1 import operator_pb2_grpc
from services.admission import accounts, audit, pages
from services.admission.database import Database
from services.admission.names import check_tenant
from services.admission.notifier import Notifier


class OperatorServicer(operator_pb2_grpc.OperatorServiceServicer):
    """`default`: what holds for tenants without a quota of their own."""

    def __init__(self, database: Database, default: pb.Quota, notifier: Notifier) -> None:
        self._database, self._default, self._notifier = database, default, notifier

    async def SetQuota(self, request: pb.SetQuotaRequest, context: Any) -> pb.SetQuotaResponse:
        tenant = check_tenant(request.tenant)
        quota = await asyncio.to_thread(self._set_quota, tenant, request.quota, request.update_mask.paths)
        self._notifier.notify()  # tasks that waited may go on
        return pb.SetQuotaResponse(quota=quota)

    async def GetQuota(self, request: pb.GetQuotaRequest, context: Any) -> pb.GetQuotaResponse:
        return pb.GetQuotaResponse(quota=await asyncio.to_thread(self._quota, check_tenant(request.tenant)))

    async def ListUsage(self, request: pb.ListUsageRequest, context: Any) -> pb.ListUsageResponse:
        size, query = pages.size(request.page_size), ["usage", request.tenant]
        start = pages.start(query, request.page_token)
        rows = await asyncio.to_thread(self._usage, request.tenant, start, size + 1)
        shown = rows[:size]
        more = pages.token(query, shown[-1].day, shown[-1].tenant) if len(rows) > size else ""
        return pb.ListUsageResponse(days=[accounts.to_proto(row) for row in shown], next_page_token=more)

    async def ListAuditEvents(self, request: pb.ListAuditEventsRequest, context: Any) -> pb.ListAuditEventsResponse:
        size = pages.size(request.page_size)
        rows = await asyncio.to_thread(self._events, request.tenant, request.after_sequence, size)
        return pb.ListAuditEventsResponse(events=[audit.to_proto(row) for row in rows])

    def _set_quota(self, tenant: str, quota: pb.Quota, only: Sequence[str]) -> pb.Quota:
        with self._database.write() as connection:
            accounts.set_quota(connection, tenant, quota, only)
            return accounts.quota_of(connection, tenant, self._default)

    def _quota(self, tenant: str) -> pb.Quota:
        with self._database.read() as connection:
            return accounts.quota_of(connection, tenant, self._default)

    def _usage(self, tenant: str, before: tuple[int, str] | None, limit: int) -> Any:
        with self._database.read() as connection:
            return accounts.page(connection, _plain(tenant), before, limit)

    def _events(self, tenant: str, after_sequence: int, limit: int) -> Any:
        with self._database.read() as connection:
            return audit.page(connection, _plain(tenant), after_sequence, limit)


def _plain(tenant: str) -> str:
    """A filter of lists: empty, or a tenant's name. Raises InvalidInputError for anything else."""
    return check_tenant(tenant) if tenant else ""
