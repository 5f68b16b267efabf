"""RunPlan streams, one to each executor: send plans, commit results to the ledger, then acknowledge them."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc

from engine.errors import MuxtuneError
from muxtune.v1 import execution_pb2, execution_pb2_grpc, ledger_pb2, ledger_pb2_grpc, plan_pb2
from services.backoff import Backoff
from services.conversion.plan_parts import split_plan
from services.failpoints import failpoint
from services.resource_names import executor_host
from services.rpc.certificates import ClientTls
from services.rpc.client_channel import open_channel
from services.rpc.server import start_critical_task

_log = logging.getLogger(__name__)


class RunPlanRequests:
    """The next request of a RunPlan stream. Newer contents replace older ones, so that one request is kept at most."""

    def __init__(self, lease_term: int, leader_term: int) -> None:
        self._lease_term, self._leader_term = lease_term, leader_term
        self._plan: plan_pb2.ExecutorPlan | None = None
        self._acknowledged = 0
        self._stale: set[str] = set()
        self._ready = asyncio.Event()
        self._is_closed = False

    def put_plan(self, plan: plan_pb2.ExecutorPlan) -> None:
        self._plan = plan
        self._ready.set()

    def put_acknowledgement(self, sequence: int, stale: set[str]) -> None:
        self._acknowledged = sequence
        self._stale |= stale
        self._ready.set()

    def close(self) -> None:
        self._is_closed = True
        self._ready.set()

    async def stream(self) -> AsyncIterator[execution_pb2.RunPlanRequest]:
        """Yield the requests of one stream: first the newest plan, then each change."""
        sent: plan_pb2.ExecutorPlan | None = None
        self._ready.set()
        while True:
            await self._ready.wait()
            self._ready.clear()
            if self._is_closed:
                return
            new_plan = self._plan if self._plan is not sent else None
            sent, stale, self._stale = self._plan, self._stale, set()
            request = execution_pb2.RunPlanRequest(
                lease_term=self._lease_term,
                leader_term=self._leader_term,
                acknowledged_sequence=self._acknowledged,
                stale_tasks=sorted(stale),
            )
            for part in split_plan(new_plan) if new_plan is not None else ():
                if request.HasField("plan"):
                    request.plan_continues = True
                    yield request
                    request = execution_pb2.RunPlanRequest()
                request.plan.CopyFrom(part)
            yield request


def executor_channel(executor: plan_pb2.Executor, secret: str, tls: ClientTls | None) -> grpc.aio.Channel:
    """Open a channel to the executor's address; with TLS, its certificate must have the executor's name."""
    return open_channel(executor.address, secret, tls and replace(tls, peer=executor_host(executor.name)))


class ExecutorStream:
    """Keeps a RunPlan stream to one incarnation of an executor open until `close`."""

    def __init__(
        self,
        executor: plan_pb2.Executor,
        leader_term: int,
        secret: str,
        ledger: "ledger_pb2_grpc.LedgerServiceAsyncStub",
        tls: ClientTls | None = None,
    ) -> None:
        self.executor = executor
        self.requests = RunPlanRequests(executor.lease_term, leader_term)
        self._secret, self._ledger, self._tls = secret, ledger, tls
        self._task = start_critical_task(self._run(), f"stream to {executor.name}")

    async def close(self) -> None:
        """Finish committing results that were received, then end the stream."""
        self.requests.close()
        _, pending = await asyncio.wait([self._task], timeout=2)
        for task in pending:
            task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        channel = executor_channel(self.executor, self._secret, self._tls)
        stub: execution_pb2_grpc.ExecutionServiceAsyncStub = execution_pb2_grpc.ExecutionServiceStub(channel)
        backoff = Backoff(first_seconds=0.1, max_seconds=2.0)
        async with channel:
            while True:
                call = stub.RunPlan(self.requests.stream())
                try:
                    async for response in call:
                        await self._commit(response)
                        backoff.reset()
                    return  # the executor has drained, or `close` was called
                # Retry LEASE_LOST too: the executor may not know its lease yet. If the lease is lost, the next cycle
                # sees that in its snapshot and closes this stream.
                except MuxtuneError as error:
                    _log.warning("The stream to %s broke: %s", self.executor.name, error)
                finally:
                    call.cancel()
                await backoff.wait()

    async def _commit(self, response: execution_pb2.RunPlanResponse) -> None:
        stale: set[str] = set()
        if response.results:
            failpoint("results.before")
            answer = await self._ledger.CommitResults(
                ledger_pb2.CommitResultsRequest(
                    executor=self.executor.name, lease_term=self.executor.lease_term, results=response.results
                )
            )
            failpoint("results.after")
            pairs = zip(response.results, answer.verdicts, strict=True)
            stale = {result.task for result, verdict in pairs if verdict == ledger_pb2.RESULT_VERDICT_STALE}
        self.requests.put_acknowledgement(response.sequence, stale)
