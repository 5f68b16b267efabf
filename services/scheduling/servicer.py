"""SchedulingService; protos/muxtune/v1/scheduling.proto documents each RPC."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration

from engine.errors import FieldViolation, InvalidInputError, UnavailableError
from muxtune.v1 import ledger_pb2, ledger_pb2_grpc, plan_pb2, scheduling_pb2_grpc
from muxtune.v1 import scheduling_pb2 as pb
from services.message_parts import HeldPages
from services.rpc.authentication import check_executor, current_principal
from services.scheduling.plan_queries import current_plan, explain, hypothetical_tasks, planner_profile, what_if
from services.scheduling.scheduler import Scheduler

T = TypeVar("T", pb.GetPlanResponse, pb.GetProfileResponse, pb.SimulatePlanResponse)
# Without gRPC's other schemes, such as unix:, dns: and xds:.
_ADDRESS = re.compile(r"([A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")


class SchedulingServicer(scheduling_pb2_grpc.SchedulingServiceServicer):
    """Forwards leases to the ledger and answers queries about the plan; keeps no state."""

    def __init__(
        self, scheduler: Scheduler, ledger: "ledger_pb2_grpc.LedgerServiceAsyncStub", lease_seconds: float
    ) -> None:
        self._scheduler, self._ledger = scheduler, ledger
        self._plans, self._profiles = HeldPages[pb.GetPlanResponse](), HeldPages[pb.GetProfileResponse]()
        self._simulations = HeldPages[pb.SimulatePlanResponse]()
        self._lease = Duration()
        self._lease.FromTimedelta(timedelta(seconds=lease_seconds))

    async def RegisterExecutor(self, request: pb.RegisterExecutorRequest, context: Any) -> pb.RegisterExecutorResponse:
        executor = request.executor
        check_executor(current_principal(), executor.name)
        required = {"name": executor.name, "address": executor.address, "incarnation": executor.incarnation,
                  "backbone.name": executor.backbone.name}  # fmt: skip
        violations = [
            FieldViolation(f"executor.{field}", "is missing") for field, value in required.items() if not value
        ]
        if executor.address and not _ADDRESS.fullmatch(executor.address):
            violations.append(FieldViolation("executor.address", f'"{executor.address}" is not HOST:PORT'))
        if violations:
            raise InvalidInputError.of_fields(violations)
        executor.lease_term = 0
        answer = await self._ledger.PutLease(
            ledger_pb2.PutLeaseRequest(executor=executor, duration=self._lease, history=request.history)
        )
        return pb.RegisterExecutorResponse(lease_term=answer.lease_term, lease_duration=self._lease)

    async def KeepLease(self, request: pb.KeepLeaseRequest, context: Any) -> pb.KeepLeaseResponse:
        check_executor(current_principal(), request.executor)
        if request.lease_term < 1:
            raise InvalidInputError.of_field("lease_term", f"{request.lease_term} is not a lease term; register first")
        executor = plan_pb2.Executor(
            name=request.executor,
            incarnation=request.incarnation,
            lease_term=request.lease_term,
            device=request.device,
            draining=request.draining,
        )
        await self._ledger.PutLease(ledger_pb2.PutLeaseRequest(executor=executor, duration=self._lease))
        return pb.KeepLeaseResponse(lease_duration=self._lease)

    async def EndLease(
        self, request: pb.SchedulingServiceEndLeaseRequest, context: Any
    ) -> pb.SchedulingServiceEndLeaseResponse:
        check_executor(current_principal(), request.executor)
        await self._ledger.EndLease(
            ledger_pb2.EndLeaseRequest(executor=request.executor, incarnation=request.incarnation)
        )
        return pb.SchedulingServiceEndLeaseResponse()

    async def DrainExecutor(self, request: pb.DrainExecutorRequest, context: Any) -> pb.DrainExecutorResponse:
        await self._scheduler.drain(request.executor)
        return pb.DrainExecutorResponse()

    async def ExplainPlan(self, request: pb.ExplainPlanRequest, context: Any) -> pb.ExplainPlanResponse:
        self._refuse_on_standby()
        await self._scheduler.refresh()
        return await asyncio.to_thread(explain, self._scheduler.snapshot, self._scheduler.plan, self._scheduler.limits,
                                       request.task)  # fmt: skip

    async def SimulatePlan(self, request: pb.SimulatePlanRequest, context: Any) -> pb.SimulatePlanResponse:
        self._refuse_on_standby()
        scheduler = self._scheduler

        async def simulate() -> Sequence[pb.SimulatePlanResponse]:
            extra = hypothetical_tasks(request, scheduler.snapshot)
            return await asyncio.to_thread(what_if, scheduler.snapshot, scheduler.limits, extra)

        return await self._page(self._simulations, request.page_token, simulate)

    async def GetProfile(self, request: pb.GetProfileRequest, context: Any) -> pb.GetProfileResponse:
        self._refuse_on_standby()
        scheduler = self._scheduler

        async def record() -> Sequence[pb.GetProfileResponse]:
            snapshot, weights = scheduler.ledger_snapshot, scheduler.tenant_weights
            return await asyncio.to_thread(planner_profile, snapshot, scheduler.limits, weights)

        return await self._page(self._profiles, request.page_token, record)

    async def GetPlan(self, request: pb.GetPlanRequest, context: Any) -> pb.GetPlanResponse:
        self._refuse_on_standby()
        scheduler = self._scheduler

        async def show() -> Sequence[pb.GetPlanResponse]:
            return await asyncio.to_thread(current_plan, scheduler.current_plans(), scheduler.plan)

        return await self._page(self._plans, request.page_token, show)

    async def _page(self, held: HeldPages[T], token: str, answer: Callable[[], Awaitable[Sequence[T]]]) -> T:
        """Return the token's page; without a token, the first page of a new answer."""
        if token:
            page, following = held.page(token)
        else:
            await self._scheduler.refresh()
            page, following = held.hold(await answer())
        page.next_page_token = following
        return page

    def _refuse_on_standby(self) -> None:
        if not self._scheduler.is_running:
            raise UnavailableError("This scheduler stands by and has no plan. Send the call to the leading scheduler.")
