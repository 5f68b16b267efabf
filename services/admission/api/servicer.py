"""The three services admission serves: to clients, to operators, and to scheduling."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

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
from services.admission.api.adapter_rpcs import AdapterRpcs
from services.admission.api.dataset_rpcs import DatasetRpcs
from services.admission.api.task_rpcs import TaskRpcs
from services.admission.cleanup.dataset_objects import DatasetObjects
from services.admission.ledger.ledger import Ledger
from services.admission.policy.admission_controller import AdmissionController
from services.admission.store.api_keys import KeyStore
from services.admission.store.change_notifier import ANYTHING, ChangeNotifier
from services.admission.store.clock import microseconds, timestamp
from services.admission.store.database import Database
from services.rpc.authorization import Role
from services.storage.artifact_store import ArtifactStore

_RECORDED = ("checkpoint_committed", "finished", "failed")
_MAX_LEASE_SECONDS = 86_400.0
_HINT_SECONDS = 0.025  # what changes meanwhile is told in one: a word for each of many creates costs as much as they do
_log = logging.getLogger(__name__)


class AdmissionServicer(TaskRpcs, DatasetRpcs, AdapterRpcs, admission_pb2_grpc.AdmissionServiceServicer):
    """AdmissionService: the only address a client needs."""

    def __init__(
        self,
        database: Database,
        artifacts: ArtifactStore,
        alignment: "alignment_pb2_grpc.AlignmentServiceAsyncStub",
        admitter: AdmissionController,
        notifier: ChangeNotifier,
        max_upload_bytes: int,
    ) -> None:
        self._database, self._artifacts, self._alignment = database, artifacts, alignment
        self._admitter, self._notifier, self._max_upload_bytes = admitter, notifier, max_upload_bytes
        self.dataset_bytes = DatasetObjects(database, artifacts, alignment)


class KeyServicer(key_pb2_grpc.KeyServiceServicer):
    """KeyService: API keys, for operators."""

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys

    async def CreateApiKey(self, request: key_pb2.CreateApiKeyRequest, context: Any) -> key_pb2.CreateApiKeyResponse:
        expires = microseconds(request.expire_time, "expire_time") if request.HasField("expire_time") else None
        row, secret = await asyncio.to_thread(self._keys.create, request.tenant, expires, _role(request.role))
        return key_pb2.CreateApiKeyResponse(key=_key_to_proto(row), secret=secret)

    async def ListApiKeys(self, request: key_pb2.ListApiKeysRequest, context: Any) -> key_pb2.ListApiKeysResponse:
        rows = await asyncio.to_thread(self._keys.ls, request.tenant)
        return key_pb2.ListApiKeysResponse(keys=[_key_to_proto(row) for row in rows])

    async def RevokeApiKey(self, request: key_pb2.RevokeApiKeyRequest, context: Any) -> key_pb2.RevokeApiKeyResponse:
        row = await asyncio.to_thread(self._keys.revoke, request.id)
        return key_pb2.RevokeApiKeyResponse(key=_key_to_proto(row))


class LedgerServicer(ledger_pb2_grpc.LedgerServiceServicer):
    """LedgerService: the durable side of scheduling."""

    def __init__(self, notifier: ChangeNotifier, on_recorded: Callable[[Iterable[str]], None]) -> None:
        self._notifier, self._on_recorded = notifier, on_recorded
        self._kept: Ledger | None = None

    @contextmanager
    def keeping(self, ledger: Ledger) -> Iterator[None]:
        """Serves it meanwhile; before and after, every call is UNAVAILABLE here, and goes to who keeps it."""
        self._kept = ledger
        try:
            yield
        finally:
            self._kept = None
            self._notifier.wake([ANYTHING])  # its streams end

    @property
    def _ledger(self) -> Ledger:
        if self._kept is None:
            raise UnavailableError("this admission does not keep the ledger: another does, or will soon")
        return self._kept

    async def WatchChanges(
        self, request: ledger_pb2.WatchChangesRequest, context: Any
    ) -> AsyncIterator[ledger_pb2.WatchChangesResponse]:
        revision, ledger = 0, self._ledger
        with self._notifier.waiting(ANYTHING) as changed:
            while not self._notifier.is_closed and self._kept is ledger:
                changed.clear()
                revision += 1
                yield ledger_pb2.WatchChangesResponse(revision=revision)
                await asyncio.sleep(_HINT_SECONDS)
                await changed.wait()
        raise UnavailableError("this admission is stopping, or keeps the ledger no more")

    async def GetSnapshot(self, request: ledger_pb2.GetSnapshotRequest, context: Any) -> ledger_pb2.GetSnapshotResponse:
        await self.end_expired()
        return await asyncio.to_thread(self._ledger.snapshot)

    async def CommitPlan(self, request: ledger_pb2.CommitPlanRequest, context: Any) -> ledger_pb2.CommitPlanResponse:
        started = [start.task for start in request.starts]
        commit = partial(self._ledger.commit_plan, request)
        attempts = await self._notifier.after(commit, lambda _: self._notifier.notify_tasks(started))
        return ledger_pb2.CommitPlanResponse(attempts=attempts)

    async def CommitResults(
        self, request: ledger_pb2.CommitResultsRequest, context: Any
    ) -> ledger_pb2.CommitResultsResponse:
        results = list(request.results)
        commit = partial(self._ledger.commit_results, request.executor, request.lease_term, results)
        verdicts, _ = await self._notifier.after(commit, lambda answer: self._tell_of(results, answer[1]))
        return ledger_pb2.CommitResultsResponse(verdicts=verdicts)

    async def RevokeAttempts(
        self, request: ledger_pb2.RevokeAttemptsRequest, context: Any
    ) -> ledger_pb2.RevokeAttemptsResponse:
        revoke = partial(self._ledger.revoke, request.executor, list(request.tasks), request.reason)
        taken = await self._notifier.after(revoke, self._notifier.notify)
        return ledger_pb2.RevokeAttemptsResponse(num_revoked=len(taken))

    async def LeadScheduling(
        self, request: ledger_pb2.LeadSchedulingRequest, context: Any
    ) -> ledger_pb2.LeadSchedulingResponse:
        if not request.scheduler or not request.incarnation:
            field = "incarnation" if request.scheduler else "scheduler"
            raise InvalidInputError.of_field(field, "is missing: it says who asks")
        seconds = _lease_seconds(request.duration)
        lead = partial(self._ledger.leadership.lead, request.scheduler, request.incarnation, seconds)
        leader, incarnation, term = await asyncio.to_thread(lead)
        return ledger_pb2.LeadSchedulingResponse(leader=leader, incarnation=incarnation, leader_term=term)

    async def PutLease(self, request: ledger_pb2.PutLeaseRequest, context: Any) -> ledger_pb2.PutLeaseResponse:
        seconds = _lease_seconds(request.duration)

        def tell(put: tuple[int, list[str]]) -> None:
            if request.executor.lease_term != put[0] or request.executor.draining:
                self._notifier.notify(put[1])

        term, _ = await self._notifier.after(partial(self._ledger.put_lease, request.executor, seconds), tell)
        return ledger_pb2.PutLeaseResponse(lease_term=term)

    async def EndLease(self, request: ledger_pb2.EndLeaseRequest, context: Any) -> ledger_pb2.EndLeaseResponse:
        end = partial(self._ledger.end_lease, request.executor, request.incarnation)
        await self._notifier.after(end, self._notifier.notify)
        return ledger_pb2.EndLeaseResponse()

    async def RecordAuditEvent(
        self, request: ledger_pb2.RecordAuditEventRequest, context: Any
    ) -> ledger_pb2.RecordAuditEventResponse:
        await asyncio.to_thread(self._ledger.record_audit, request.event)
        return ledger_pb2.RecordAuditEventResponse()

    async def end_expired(self) -> None:
        """Ends leases that ran out and takes their attempts back; tells their watchers and scheduling."""
        await self._notifier.after(
            self._ledger.end_expired, lambda taken: self._notifier.notify(taken) if taken else None
        )

    async def announce_expiries(self) -> None:
        """Hints at a new cycle whenever a lease runs out; runs until cancelled."""
        while True:
            deadline = self._ledger.next_deadline()
            await asyncio.sleep(1.0 if deadline is None else min(1.0, max(0.05, deadline - time.monotonic())))
            if deadline is not None and deadline <= time.monotonic():
                with _retried_later("leases"):
                    await self.end_expired()
                    self._notifier.notify()

    def _tell_of(self, results: Sequence[plan_pb2.TaskResult], changes_plan: bool) -> None:
        """The watchers of these tasks; and scheduling where its plan may change: not at each step."""
        self._notifier.notify_tasks({result.task for result in results})
        self._on_recorded({result.task for result in results if result.WhichOneof("result") in _RECORDED})
        if changes_plan:
            self._notifier.notify()


@contextmanager
def _retried_later(what: str) -> Iterator[None]:
    try:
        yield
    except MuxtuneError as error:
        _log.warning("%s put off: %s", what, error)


def _key_to_proto(row: Any) -> key_pb2.ApiKey:
    return key_pb2.ApiKey(
        id=row.id,
        tenant=row.tenant,
        create_time=timestamp(row.created),
        expire_time=timestamp(row.expires),
        revoke_time=timestamp(row.revoked),
        role=key_pb2.KeyRole.Value(f"KEY_ROLE_{row.role.upper()}"),
    )


def _role(role: key_pb2.KeyRole.ValueType) -> Role:
    """Raises InvalidInputError for one that is not in the contract."""
    roles = {
        key_pb2.KEY_ROLE_UNSPECIFIED: Role.TENANT,
        key_pb2.KEY_ROLE_TENANT: Role.TENANT,
        key_pb2.KEY_ROLE_VIEWER: Role.VIEWER,
        key_pb2.KEY_ROLE_OPERATOR: Role.OPERATOR,
    }
    if role not in roles:
        raise InvalidInputError.of_field("role", f"{role} is no role: 1 tenant, 2 viewer, 3 operator")
    return roles[role]


def _lease_seconds(duration: Duration) -> float:
    """Raises InvalidInputError."""
    seconds = duration.seconds + duration.nanos / 1e9
    if not 0 <= seconds <= _MAX_LEASE_SECONDS:
        raise InvalidInputError.of_field("duration", f"{seconds:g} s must be 0 to {_MAX_LEASE_SECONDS:g}")
    return seconds
