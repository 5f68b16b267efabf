"""Servicers of AdmissionService (clients), KeyService (operators) and LedgerService (scheduling)."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration

from engine.errors import InvalidInputError, MuxtuneError, UnavailableError
from muxtune.v1 import (
    admission_pb2_grpc,
    alignment_pb2_grpc,
    key_pb2,
    key_pb2_grpc,
    ledger_pb2,
    ledger_pb2_grpc,
    plan_pb2,
)
from services.admission.api import page_tokens
from services.admission.api.adapter_rpcs import AdapterRpcs
from services.admission.api.dataset_rpcs import DatasetRpcs
from services.admission.api.task_rpcs import TaskRpcs
from services.admission.cleanup.dataset_objects import DatasetObjects
from services.admission.ledger.ledger import Ledger
from services.admission.policy.admission_controller import AdmissionController
from services.admission.store.api_keys import KeyStore
from services.admission.store.change_notifier import ANY_CHANGE, ChangeNotifier
from services.admission.store.clock import to_microseconds, to_timestamp
from services.admission.store.database import Database
from services.admission.threads import AdmissionThreads
from services.concurrency.byte_budget import ByteBudget
from services.concurrency.threads import Threads
from services.message_parts import HeldPages
from services.rpc.authorization import Role
from services.rpc.rate_limit import RateLimit
from services.storage.artifact_store import ArtifactStore
from services.storage.scratch_folder import ScratchFolder

_COLLECTED_RESULTS = ("checkpoint_committed", "finished", "failed")
_MAX_LEASE_SECONDS = 86_400.0
_HINT_SECONDS = 0.025  # changes in this time share one message: a message for each new task costs as much as the task
_log = logging.getLogger(__name__)
T = TypeVar("T")


class AdmissionServicer(TaskRpcs, DatasetRpcs, AdapterRpcs, admission_pb2_grpc.AdmissionServiceServicer):
    """Serves clients: AdmissionService is the only one they call. `uploads`: the bytes of uploads in progress."""

    def __init__(
        self,
        database: Database,
        artifacts: ArtifactStore,
        alignment: "alignment_pb2_grpc.AlignmentServiceAsyncStub",
        controller: AdmissionController,
        notifier: ChangeNotifier,
        max_upload_bytes: int,
        threads: AdmissionThreads,
        watch_rate: RateLimit,
        scratch: ScratchFolder,
        uploads: ByteBudget,
    ) -> None:
        self._database, self._artifacts, self._alignment = database, artifacts, alignment
        self._watch_rate = watch_rate
        self._controller, self._notifier, self._max_upload_bytes = controller, notifier, max_upload_bytes
        self._scratch, self._uploads = scratch, uploads
        self._threads, self.dataset_objects = threads, DatasetObjects(database, artifacts, alignment, threads)


class KeyServicer(key_pb2_grpc.KeyServiceServicer):
    """Serves API keys to operators."""

    def __init__(self, keys: KeyStore, threads: Threads) -> None:
        self._keys, self._threads = keys, threads

    async def CreateApiKey(self, request: key_pb2.CreateApiKeyRequest, context: Any) -> key_pb2.CreateApiKeyResponse:
        expires = to_microseconds(request.expire_time, "expire_time") if request.HasField("expire_time") else None
        row, secret = await self._threads.run(self._keys.create, request.tenant, expires, _to_role(request.role))
        return key_pb2.CreateApiKeyResponse(key=_key_to_proto(row), secret=secret)

    async def ListApiKeys(self, request: key_pb2.ListApiKeysRequest, context: Any) -> key_pb2.ListApiKeysResponse:
        read = partial(self._threads.run, partial(self._keys.list_page, request.tenant))
        query = ["keys", request.tenant]
        rows, token = await page_tokens.read_page(request, query, read, lambda row: (row.created, row.id))
        return key_pb2.ListApiKeysResponse(keys=[_key_to_proto(row) for row in rows], next_page_token=token)

    async def RevokeApiKey(self, request: key_pb2.RevokeApiKeyRequest, context: Any) -> key_pb2.RevokeApiKeyResponse:
        row = await self._threads.run(self._keys.revoke, request.id)
        return key_pb2.RevokeApiKeyResponse(key=_key_to_proto(row))


class LedgerServicer(ledger_pb2_grpc.LedgerServiceServicer):
    """Serves the ledger to scheduling, while this replica leads it."""

    def __init__(
        self, notifier: ChangeNotifier, on_recorded: Callable[[Iterable[str]], None], threads: Threads
    ) -> None:
        self._notifier, self._on_recorded, self._threads = notifier, on_recorded, threads
        self._leading: Ledger | None = None
        self._snapshots = HeldPages[ledger_pb2.GetSnapshotResponse]()
        self._commits: set[asyncio.Task[object]] = set()

    @contextmanager
    def serve_ledger(self, ledger: Ledger) -> Iterator[None]:
        """Serve this ledger within the block. Outside it every call is UNAVAILABLE; clients then call the leader."""
        self._leading = ledger
        try:
            yield
        finally:
            self._leading = None
            self._notifier.wake([ANY_CHANGE])  # ends its streams

    @property
    def _ledger(self) -> Ledger:
        if self._leading is None:
            raise UnavailableError(
                "this replica of admission does not lead the ledger: another one does or will soon; try again"
            )
        return self._leading

    async def WatchChanges(
        self, request: ledger_pb2.WatchChangesRequest, context: Any
    ) -> AsyncIterator[ledger_pb2.WatchChangesResponse]:
        revision, ledger = 0, self._ledger
        with self._notifier.subscribe(ANY_CHANGE) as changed:
            while not self._notifier.is_closed and self._leading is ledger:
                changed.clear()
                revision += 1
                yield ledger_pb2.WatchChangesResponse(revision=revision)
                await asyncio.sleep(_HINT_SECONDS)
                await changed.wait()
        raise UnavailableError("this replica of admission is stopping or no longer leads the ledger: watch again")

    async def GetSnapshot(self, request: ledger_pb2.GetSnapshotRequest, context: Any) -> ledger_pb2.GetSnapshotResponse:
        if request.page_token:
            page, token = self._snapshots.page(request.page_token)
        else:
            await self.end_expired_leases()
            page, token = self._snapshots.hold(await self._threads.run(self._ledger.snapshot_pages))
        page.next_page_token = token
        return page

    async def BatchGetTaskSpecs(
        self, request: ledger_pb2.BatchGetTaskSpecsRequest, context: Any
    ) -> ledger_pb2.BatchGetTaskSpecsResponse:
        specs, num_read = await self._threads.run(self._ledger.read_specs, list(request.tasks))
        return ledger_pb2.BatchGetTaskSpecsResponse(specs=specs, num_read=num_read)

    async def CommitPlan(self, request: ledger_pb2.CommitPlanRequest, context: Any) -> ledger_pb2.CommitPlanResponse:
        started = [start.task for start in request.starts]
        commit = partial(self._ledger.commit_plan, request)
        attempts = await self._commit_and_notify(commit, lambda _: self._notifier.notify_tasks(started))
        return ledger_pb2.CommitPlanResponse(attempts=attempts)

    async def CommitResults(
        self, request: ledger_pb2.CommitResultsRequest, context: Any
    ) -> ledger_pb2.CommitResultsResponse:
        results = list(request.results)
        commit = partial(self._ledger.commit_results, request.executor, request.lease_term, results)
        verdicts, _ = await self._commit_and_notify(
            commit, lambda committed: self._notify_watchers(results, committed[1])
        )
        return ledger_pb2.CommitResultsResponse(verdicts=verdicts)

    async def RevokeAttempts(
        self, request: ledger_pb2.RevokeAttemptsRequest, context: Any
    ) -> ledger_pb2.RevokeAttemptsResponse:
        revoke = partial(self._ledger.revoke_attempts, request.executor, list(request.tasks), request.reason)
        revoked = await self._commit_and_notify(revoke, self._notifier.notify)
        return ledger_pb2.RevokeAttemptsResponse(num_revoked=len(revoked))

    async def LeadScheduling(
        self, request: ledger_pb2.LeadSchedulingRequest, context: Any
    ) -> ledger_pb2.LeadSchedulingResponse:
        if not request.scheduler or not request.incarnation:
            field = "incarnation" if request.scheduler else "scheduler"
            raise InvalidInputError.of_field(field, "must name the scheduler and its incarnation")
        seconds = _to_lease_seconds(request.duration)
        acquire = partial(self._ledger.scheduler_lease.acquire, request.scheduler, request.incarnation, seconds)
        leader, incarnation, term = await self._threads.run(acquire)
        return ledger_pb2.LeadSchedulingResponse(leader=leader, incarnation=incarnation, leader_term=term)

    async def PutLease(self, request: ledger_pb2.PutLeaseRequest, context: Any) -> ledger_pb2.PutLeaseResponse:
        seconds = _to_lease_seconds(request.duration)

        def notify(result: tuple[int, list[str]]) -> None:
            term, revoked = result
            if request.executor.lease_term != term or request.executor.draining:
                self._notifier.notify(revoked)

        term, _ = await self._commit_and_notify(
            partial(self._ledger.put_lease, request.executor, seconds, request.history), notify
        )
        return ledger_pb2.PutLeaseResponse(lease_term=term)

    async def EndLease(self, request: ledger_pb2.EndLeaseRequest, context: Any) -> ledger_pb2.EndLeaseResponse:
        end = partial(self._ledger.end_lease, request.executor, request.incarnation)
        await self._commit_and_notify(end, self._notifier.notify)
        return ledger_pb2.EndLeaseResponse()

    async def RecordAuditEvent(
        self, request: ledger_pb2.RecordAuditEventRequest, context: Any
    ) -> ledger_pb2.RecordAuditEventResponse:
        await self._threads.run(self._ledger.record_audit_event, request.event)
        return ledger_pb2.RecordAuditEventResponse()

    async def end_expired_leases(self) -> None:
        """End expired leases, revoke their attempts, and wake the tasks' watchers and scheduling."""
        await self._commit_and_notify(
            self._ledger.end_expired_leases, lambda revoked: self._notifier.notify(revoked) if revoked else None
        )

    async def watch_lease_deadlines(self) -> None:
        """Wake scheduling whenever a lease expires; run until cancelled."""
        while True:
            deadline = self._ledger.next_deadline()
            await asyncio.sleep(1.0 if deadline is None else min(1.0, max(0.05, deadline - time.monotonic())))
            if deadline is not None and deadline <= time.monotonic():
                with _log_and_retry_later("end of expired leases"):
                    await self.end_expired_leases()
                    self._notifier.notify()

    async def _commit_and_notify(self, commit: Callable[[], T], on_committed: Callable[[T], None]) -> T:
        """Run `commit` in a thread and pass its result to `on_committed`, even if the caller is cancelled meanwhile:
        watchers must hear of every change."""

        async def run() -> T:
            result = await self._threads.run(commit)
            on_committed(result)
            return result

        task = asyncio.create_task(run())
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)
        return await asyncio.shield(task)

    def _notify_watchers(self, results: Sequence[plan_pb2.TaskResult], changes_plan: bool) -> None:
        """Wake the watchers of these tasks and, if the plan may have to change, scheduling."""
        self._notifier.notify_tasks({result.task for result in results})
        self._on_recorded({result.task for result in results if result.WhichOneof("result") in _COLLECTED_RESULTS})
        if changes_plan:
            self._notifier.notify()


@contextmanager
def _log_and_retry_later(action: str) -> Iterator[None]:
    try:
        yield
    except MuxtuneError as error:
        _log.warning("%s failed and will be retried: %s", action, error)


def _key_to_proto(row: Any) -> key_pb2.ApiKey:
    return key_pb2.ApiKey(
        id=row.id,
        tenant=row.tenant,
        create_time=to_timestamp(row.created),
        expire_time=to_timestamp(row.expires),
        revoke_time=to_timestamp(row.revoked),
        role=key_pb2.KeyRole.Value(f"KEY_ROLE_{row.role.upper()}"),
    )


def _to_role(role: key_pb2.KeyRole.ValueType) -> Role:
    """Return the role. Raises InvalidInputError for a number that the API does not define."""
    roles = {
        key_pb2.KEY_ROLE_UNSPECIFIED: Role.TENANT,
        key_pb2.KEY_ROLE_TENANT: Role.TENANT,
        key_pb2.KEY_ROLE_VIEWER: Role.VIEWER,
        key_pb2.KEY_ROLE_OPERATOR: Role.OPERATOR,
    }
    if role not in roles:
        raise InvalidInputError.of_field("role", f"{role} must be 1 (tenant), 2 (viewer) or 3 (operator)")
    return roles[role]


def _to_lease_seconds(duration: Duration) -> float:
    """Convert a lease's duration. Raises InvalidInputError outside 0 to a day."""
    seconds = duration.seconds + duration.nanos / 1e9
    if not 0 <= seconds <= _MAX_LEASE_SECONDS:
        raise InvalidInputError.of_field("duration", f"{seconds:g} s must be 0 to {_MAX_LEASE_SECONDS:g} s")
    return seconds
