"""One RunPlan stream to each executor: plans go out, results come in and are committed before they are acknowledged."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc

from engine.errors import MuxtuneError
from muxtune.v1 import execution_pb2, execution_pb2_grpc, ledger_pb2, ledger_pb2_grpc, plan_pb2
from services.backoff import Backoff
from services.failpoints import failpoint
from services.resource_names import executor_host
from services.rpc.certificates import ClientTls
from services.rpc.client_channel import open_channel
from services.rpc.server import start_critical_task

_log = logging.getLogger(__name__)


class RunPlanRequests:
    """What the executor should know next. Newer replaces older, so it holds one message at most."""

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

    async def requests(self) -> AsyncIterator[execution_pb2.RunPlanRequest]:
        """For one stream: first the lease with the newest plan, then what is new."""
        sent: plan_pb2.ExecutorPlan | None = None
        self._ready.set()
        while True:
            await self._ready.wait()
            self._ready.clear()
            if self._is_closed:
                return
            fresh = self._plan if self._plan is not sent else None
            sent, stale, self._stale = self._plan, self._stale, set()
            yield execution_pb2.RunPlanRequest(
                lease_term=self._lease_term,
                leader_term=self._leader_term,
                plan=fresh,
                acknowledged_sequence=self._acknowledged,
                stale_tasks=sorted(stale),
            )


def executor_channel(executor: plan_pb2.Executor, secret: str, trust: ClientTls | None) -> grpc.aio.Channel:
    """To where it said it is, if who answers there has its name."""
    return open_channel(executor.address, secret, trust and replace(trust, peer=executor_host(executor.name)))


class ExecutorStream:
    """Keeps the stream to one executor's incarnation open until closed."""

    def __init__(
        self,
        executor: plan_pb2.Executor,
        leader_term: int,
        secret: str,
        ledger: "ledger_pb2_grpc.LedgerServiceAsyncStub",
        trust: ClientTls | None = None,
    ) -> None:
        self.executor = executor
        self.mailbox = RunPlanRequests(executor.lease_term, leader_term)
        self._secret, self._ledger, self._trust = secret, ledger, trust
        self._task = start_critical_task(self._run(), f"stream to {executor.name}")

    async def close(self) -> None:
        """Finishes committing what was received, then ends the stream."""
        self.mailbox.close()
        _, pending = await asyncio.wait([self._task], timeout=2)
        for task in pending:
            task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        channel = executor_channel(self.executor, self._secret, self._trust)
        stub: execution_pb2_grpc.ExecutionServiceAsyncStub = execution_pb2_grpc.ExecutionServiceStub(channel)
        backoff = Backoff(first_seconds=0.1, max_seconds=2.0)
        async with channel:
            while True:
                call = stub.RunPlan(self.mailbox.requests())
                try:
                    async for response in call:
                        await self._commit(response)
                        backoff.reset()
                    return  # the executor has drained, or we closed
                # LEASE_LOST too: the executor may not have heard of its lease yet. If it is lost, the next cycle's
                # snapshot says so and closes this stream.
                except MuxtuneError as error:
                    _log.warning("stream to %s broke: %s", self.executor.name, error)
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
        self.mailbox.put_acknowledgement(response.sequence, stale)
