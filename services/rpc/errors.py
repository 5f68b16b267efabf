"""Maps domain errors to gRPC statuses and back: one table, keyed by reason, never by text.

Source: google.rpc.Status with error details (AIP-193); the reasons are `muxtune.v1.ErrorReason`.
"""

import logging
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from opentelemetry import trace

from engine import errors
from engine.errors import FieldViolation, InvalidInputError, MuxtuneError
from muxtune.errors import BY_CODE, DOMAIN, read_failure
from muxtune.v1 import errors_pb2

_RETRY_SECONDS = 1
# A status travels in HTTP/2 headers, its text twice; clients accept at most 8 KiB of headers.
_MAX_TEXT_BYTES, _MAX_VIOLATIONS_BYTES = 700, 2_000
_MAX_FAILURE_BYTES = 4_000  # a failure is stored with its task, in an event and in every list
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MappedError:
    """The gRPC status and the ErrorInfo reason of a domain error."""

    code: grpc.StatusCode
    reason: str


_CODE = grpc.StatusCode
TABLE: Mapping[type[MuxtuneError], MappedError] = {
    errors.MuxtuneError: MappedError(_CODE.INTERNAL, "INTERNAL"),
    errors.InvalidInputError: MappedError(_CODE.INVALID_ARGUMENT, "INVALID_INPUT"),
    errors.MalformedDatasetError: MappedError(_CODE.INVALID_ARGUMENT, "MALFORMED_DATASET"),
    errors.ChecksumMismatchError: MappedError(_CODE.INVALID_ARGUMENT, "CHECKSUM_MISMATCH"),
    errors.RequestIdReusedError: MappedError(_CODE.INVALID_ARGUMENT, "REQUEST_ID_REUSED"),
    errors.WillNeverFitError: MappedError(_CODE.INVALID_ARGUMENT, "WILL_NEVER_FIT"),
    errors.UnauthenticatedError: MappedError(_CODE.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.PermissionDeniedError: MappedError(_CODE.PERMISSION_DENIED, "PERMISSION_DENIED"),
    errors.NotFoundError: MappedError(_CODE.NOT_FOUND, "NOT_FOUND"),
    errors.AlreadyExistsError: MappedError(_CODE.ALREADY_EXISTS, "ALREADY_EXISTS"),
    errors.IllegalTransitionError: MappedError(_CODE.FAILED_PRECONDITION, "ILLEGAL_TRANSITION"),
    errors.ResourceInUseError: MappedError(_CODE.FAILED_PRECONDITION, "RESOURCE_IN_USE"),
    errors.QuotaExceededError: MappedError(_CODE.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"),
    errors.OverloadedError: MappedError(_CODE.RESOURCE_EXHAUSTED, "OVERLOADED"),
    errors.TransferTooSlowError: MappedError(_CODE.DEADLINE_EXCEEDED, "TRANSFER_TOO_SLOW"),
    errors.SupersededError: MappedError(_CODE.ABORTED, "SUPERSEDED"),
    errors.LeaseLostError: MappedError(_CODE.ABORTED, "LEASE_LOST"),
    errors.UnavailableError: MappedError(_CODE.UNAVAILABLE, "UNAVAILABLE"),
    errors.BackboneUnsupportedError: MappedError(_CODE.FAILED_PRECONDITION, "BACKBONE_UNSUPPORTED"),
    errors.ArtifactCorruptError: MappedError(_CODE.DATA_LOSS, "ARTIFACT_CORRUPT"),
    errors.ExportMismatchError: MappedError(_CODE.FAILED_PRECONDITION, "EXPORT_MISMATCH"),
    errors.NonFiniteError: MappedError(_CODE.FAILED_PRECONDITION, "NON_FINITE"),
}
_BY_REASON = {mapped.reason: cls for cls, mapped in TABLE.items()}
_BY_CODE = {code: _BY_REASON[error.reason] for code, error in BY_CODE.items()}


def mapped(error: MuxtuneError) -> MappedError:
    """Return the table's row for the error's class, or for its nearest base class."""
    return next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)


def to_failure(error: MuxtuneError) -> errors_pb2.TaskFailure:
    """Return the reason that a task failed, as its tenant reads it."""
    reason = errors_pb2.ErrorReason.Value("ERROR_REASON_" + mapped(error).reason)
    metadata = {key: _shortened(value) for key, value in error.metadata.items()}
    return errors_pb2.TaskFailure(
        reason=reason, message=_shortened(error.message, _MAX_FAILURE_BYTES), metadata=metadata
    )


def to_status(error: MuxtuneError) -> status_pb2.Status:
    """Return the status with ErrorInfo and, where they apply, the details of AIP-193 for its kind of error."""
    row = mapped(error)
    metadata = {key: _shortened(value) for key, value in error.metadata.items()}
    info = error_details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN, metadata=metadata)
    details: list[Message] = [info, *_extras(error)]
    status = status_pb2.Status(code=row.code.value[0], message=_shortened(error.message))
    for detail in details:
        status.details.add().Pack(detail)
    return status


def status_of(error: Exception) -> status_pb2.Status:
    """Return the status of any exception that a servicer raised.

    An unexpected one becomes INTERNAL with the trace id only. The log gets its class and its stack but not its text,
    which may quote a tenant's row.
    """
    if isinstance(error, grpc.RpcError):
        error = from_rpc_error(error)
    if isinstance(error, MuxtuneError):
        return to_status(error)
    trace_id = format(trace.get_current_span().get_span_context().trace_id, "032x")
    stack = "".join(traceback.format_tb(error.__traceback__))
    _log.error("Unhandled %s:\n%s", type(error).__name__, stack)
    return to_status(MuxtuneError("Internal error. Report the trace id to the operators.", trace_id=trace_id))


def from_rpc_error(error: grpc.RpcError) -> MuxtuneError:
    """Rebuild the domain error that a peer raised, by its reason, or by its status code if it has no reason."""
    failure = read_failure(error)
    cls = _BY_REASON.get(failure.reason) if failure.reason else _BY_CODE.get(failure.code)
    rebuilt = (cls or MuxtuneError)(failure.message)
    if isinstance(rebuilt, InvalidInputError):
        rebuilt.violations = tuple(FieldViolation(v.field, v.description) for v in failure.violations)
    rebuilt.metadata = dict(failure.metadata or {})
    return rebuilt


def _extras(error: MuxtuneError) -> list[Message]:
    subject = error.metadata.get("subject", "")
    if isinstance(error, InvalidInputError) and error.violations:
        return [_bad_request(error.violations)]
    if isinstance(error, errors.QuotaExceededError):
        quota = error_details_pb2.QuotaFailure.Violation(subject=subject, description=_shortened(error.message))
        return [error_details_pb2.QuotaFailure(violations=[quota])]
    if isinstance(error, errors.IllegalTransitionError):
        kind = error.metadata.get("state", mapped(error).reason)
        condition = error_details_pb2.PreconditionFailure.Violation(
            type=kind, subject=error.metadata.get("task", subject), description=_shortened(error.message)
        )
        return [error_details_pb2.PreconditionFailure(violations=[condition])]
    if isinstance(error, errors.OverloadedError | errors.UnavailableError):
        return [error_details_pb2.RetryInfo(retry_delay=Duration(seconds=_RETRY_SECONDS))]
    return []


def _bad_request(violations: Sequence[FieldViolation]) -> error_details_pb2.BadRequest:
    """Return as many violations as fit into the headers; a last one counts those left out."""
    bad, left = error_details_pb2.BadRequest(), _MAX_VIOLATIONS_BYTES
    for index, violation in enumerate(violations):
        field, description = _shortened(violation.field), _shortened(violation.description)
        left -= len(field.encode()) + len(description.encode())
        if left < 0:
            bad.field_violations.add(field="...", description=f"and {len(violations) - index} more")
            return bad
        bad.field_violations.add(field=field, description=description)
    return bad


def _shortened(text: str, max_bytes: int = _MAX_TEXT_BYTES) -> str:
    raw = text.encode()
    return text if len(raw) <= max_bytes else raw[: max_bytes - 3].decode(errors="ignore") + "..."
