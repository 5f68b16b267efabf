"""Domain errors as gRPC statuses and back: one table, decided by reason, never by text.

Source: google.rpc.Status with error details (AIP-193); the reasons are `muxtune.v1.ErrorReason`.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from opentelemetry import trace

from engine import errors
from engine.errors import FieldViolation, InvalidInputError, MuxtuneError
from muxtune.v1 import errors_pb2

DOMAIN = "muxtune"
_RETRY_SECONDS = 1
D = TypeVar("D", bound=Message)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mapped:
    """The gRPC status and the ErrorInfo reason of a domain error."""

    code: grpc.StatusCode
    reason: str


_CODE = grpc.StatusCode
TABLE: Mapping[type[MuxtuneError], Mapped] = {
    errors.MuxtuneError: Mapped(_CODE.INTERNAL, "INTERNAL"),
    errors.InvalidInputError: Mapped(_CODE.INVALID_ARGUMENT, "INVALID_INPUT"),
    errors.MalformedDatasetError: Mapped(_CODE.INVALID_ARGUMENT, "MALFORMED_DATASET"),
    errors.ChecksumMismatchError: Mapped(_CODE.INVALID_ARGUMENT, "CHECKSUM_MISMATCH"),
    errors.RequestIdReusedError: Mapped(_CODE.INVALID_ARGUMENT, "REQUEST_ID_REUSED"),
    errors.WillNeverFitError: Mapped(_CODE.INVALID_ARGUMENT, "WILL_NEVER_FIT"),
    errors.UnauthenticatedError: Mapped(_CODE.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.PermissionDeniedError: Mapped(_CODE.PERMISSION_DENIED, "PERMISSION_DENIED"),
    errors.NotFoundError: Mapped(_CODE.NOT_FOUND, "NOT_FOUND"),
    errors.AlreadyExistsError: Mapped(_CODE.ALREADY_EXISTS, "ALREADY_EXISTS"),
    errors.IllegalTransitionError: Mapped(_CODE.FAILED_PRECONDITION, "ILLEGAL_TRANSITION"),
    errors.ResourceInUseError: Mapped(_CODE.FAILED_PRECONDITION, "RESOURCE_IN_USE"),
    errors.QuotaExceededError: Mapped(_CODE.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"),
    errors.OverloadedError: Mapped(_CODE.RESOURCE_EXHAUSTED, "OVERLOADED"),
    errors.StaleEpochError: Mapped(_CODE.ABORTED, "STALE_EPOCH"),
    errors.LeaseLostError: Mapped(_CODE.ABORTED, "LEASE_LOST"),
    errors.UnavailableError: Mapped(_CODE.UNAVAILABLE, "UNAVAILABLE"),
    errors.BackboneUnsupportedError: Mapped(_CODE.FAILED_PRECONDITION, "BACKBONE_UNSUPPORTED"),
    errors.ArtifactCorruptError: Mapped(_CODE.DATA_LOSS, "ARTIFACT_CORRUPT"),
    errors.ExportMismatchError: Mapped(_CODE.FAILED_PRECONDITION, "EXPORT_MISMATCH"),
    errors.NonFiniteError: Mapped(_CODE.FAILED_PRECONDITION, "NON_FINITE"),
}
_BY_REASON = {mapped.reason: cls for cls, mapped in TABLE.items()}
_BY_CODE = {
    _CODE.UNAVAILABLE: errors.UnavailableError,
    _CODE.DEADLINE_EXCEEDED: errors.UnavailableError,
    _CODE.RESOURCE_EXHAUSTED: errors.OverloadedError,
    _CODE.UNAUTHENTICATED: errors.UnauthenticatedError,
}


def mapped(error: MuxtuneError) -> Mapped:
    """The table's row for the error's class, or the nearest of its bases."""
    return next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)


def to_failure(error: MuxtuneError) -> errors_pb2.TaskFailure:
    """Why a task ended, as its tenant will read it."""
    reason = errors_pb2.ErrorReason.Value("ERROR_REASON_" + mapped(error).reason)
    return errors_pb2.TaskFailure(reason=reason, message=error.message, metadata=error.metadata)


def to_status(error: MuxtuneError) -> status_pb2.Status:
    """The status with ErrorInfo and, where they apply, BadRequest, QuotaFailure, PreconditionFailure, RetryInfo."""
    row = mapped(error)
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN, metadata=error.metadata),
        *_extras(error),
    ]
    status = status_pb2.Status(code=row.code.value[0], message=error.message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def to_status_of_bug(error: Exception) -> status_pb2.Status:
    """INTERNAL for what we did not foresee: logged whole here, answered with nothing but the trace id."""
    context = trace.get_current_span().get_span_context()
    trace_id = format(context.trace_id, "032x")
    _log.error("unhandled %s", type(error).__name__, exc_info=error)
    return to_status(MuxtuneError("internal error: the operators find it by its trace id", trace_id=trace_id))


def from_rpc_error(error: grpc.RpcError) -> MuxtuneError:
    """The domain error that a peer raised, rebuilt by its reason; by its code where it carries none of ours."""
    status = rpc_status.from_call(error) if hasattr(error, "trailing_metadata") else None  # type: ignore[arg-type]
    info = _unpack(status, error_details_pb2.ErrorInfo)
    code = error.code() if hasattr(error, "code") else _CODE.UNKNOWN
    text = (error.details() if hasattr(error, "details") else None) or str(code)
    if info is None or info.domain != DOMAIN:
        return _BY_CODE.get(code, MuxtuneError)(f"{code.name}: {text}")
    cls, metadata = _BY_REASON.get(info.reason, MuxtuneError), dict(info.metadata)
    if issubclass(cls, InvalidInputError):
        bad = _unpack(status, error_details_pb2.BadRequest)
        fields = [FieldViolation(v.field, v.description) for v in (bad.field_violations if bad else [])]
        rebuilt: MuxtuneError = cls(text, fields)
    else:
        rebuilt = cls(text)
    rebuilt.metadata = metadata
    return rebuilt


def _extras(error: MuxtuneError) -> list[Message]:
    subject = error.metadata.get("subject", "")
    if isinstance(error, InvalidInputError) and error.violations:
        fields = [
            error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
            for v in error.violations
        ]
        return [error_details_pb2.BadRequest(field_violations=fields)]
    if isinstance(error, errors.QuotaExceededError):
        quota = error_details_pb2.QuotaFailure.Violation(subject=subject, description=error.message)
        return [error_details_pb2.QuotaFailure(violations=[quota])]
    if isinstance(error, errors.IllegalTransitionError):
        kind = error.metadata.get("state", type(error).__name__)
        condition = error_details_pb2.PreconditionFailure.Violation(
            type=kind, subject=error.metadata.get("task", subject), description=error.message
        )
        return [error_details_pb2.PreconditionFailure(violations=[condition])]
    if isinstance(error, errors.OverloadedError | errors.UnavailableError):
        return [error_details_pb2.RetryInfo(retry_delay=Duration(seconds=_RETRY_SECONDS))]
    return []


def _unpack(status: status_pb2.Status | None, kind: type[D]) -> D | None:
    for packed in status.details if status is not None else []:
        if packed.Is(kind.DESCRIPTOR):
            detail = kind()
            packed.Unpack(detail)
            return detail
    return None
