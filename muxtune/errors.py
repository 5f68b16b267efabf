"""Errors that calls raise, rebuilt from the reason that the service sent: decide by class or reason, never by text."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "muxtune"


class MuxtuneError(Exception):
    """Base of all errors. `reason` is a value of `muxtune.v1.ErrorReason` without prefix, or "" if none was sent."""

    reason = ""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        violations: "tuple[FieldViolation, ...]" = (),
        metadata: Mapping[str, str] | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.code, self.violations = message, code, violations
        self.metadata = dict(metadata or {})
        self.retry_after_seconds = retry_after_seconds


# Written by tools/client_code.py from engine/errors.py.


@dataclass(frozen=True)
class FieldViolation:
    """An invalid field of a request: its path (`training.learning_rate`), and the problem with its remedy."""

    field: str
    description: str


class InvalidInputError(MuxtuneError):
    """The request can't succeed unless the caller changes it."""

    reason = "INVALID_INPUT"


class MalformedDatasetError(InvalidInputError):
    """A line of a dataset is not valid JSON of a known shape. The message names the line."""

    reason = "MALFORMED_DATASET"


class ChecksumMismatchError(InvalidInputError):
    """An upload's bytes differ from the announced size or hash: they were truncated, reordered or corrupted."""

    reason = "CHECKSUM_MISMATCH"


class RequestIdReusedError(InvalidInputError):
    """An earlier request had the same `request_id` and another body (AIP-155)."""

    reason = "REQUEST_ID_REUSED"


class UnauthenticatedError(MuxtuneError):
    """The call has no key, an unknown, expired or revoked key, or a wrong mesh secret."""

    reason = "UNAUTHENTICATED"


class PermissionDeniedError(MuxtuneError):
    """The caller may not see or change this name, or it does not exist: both get the same answer (AIP-211)."""

    reason = "PERMISSION_DENIED"


class NotFoundError(MuxtuneError):
    """A name that the caller may access does not exist."""

    reason = "NOT_FOUND"


class AlreadyExistsError(MuxtuneError):
    """A resource with this id and other contents exists already."""

    reason = "ALREADY_EXISTS"


class IllegalTransitionError(MuxtuneError):
    """The state of the task or dataset does not allow this change."""

    reason = "ILLEGAL_TRANSITION"


class ResourceInUseError(IllegalTransitionError):
    """An unfinished task needs the dataset or adapter."""

    reason = "RESOURCE_IN_USE"


class QuotaExceededError(MuxtuneError):
    """The request would exceed a limit of the tenant or of the service (bytes, rows, tasks)."""

    reason = "QUOTA_EXCEEDED"


class WillNeverFitError(InvalidInputError):
    """No executor of the backbone has enough memory for the task, even alone."""

    reason = "WILL_NEVER_FIT"


class OverloadedError(MuxtuneError):
    """The service has too many requests now. The same call succeeds later."""

    reason = "OVERLOADED"


class TransferTooSlowError(MuxtuneError):
    """The client sent a request or an upload too slowly. Nothing is stored: send it again over a faster connection."""

    reason = "TRANSFER_TOO_SLOW"


class SupersededError(MuxtuneError):
    """The writer's attempt, lease or plan version is out of date: its write is ignored."""

    reason = "SUPERSEDED"


class LeaseLostError(SupersededError):
    """The executor's lease ended or belongs to another process of the executor."""

    reason = "LEASE_LOST"


class UnavailableError(MuxtuneError):
    """A service, store or executor can't be reached now."""

    reason = "UNAVAILABLE"


class BackboneUnsupportedError(MuxtuneError):
    """The engine can't train this model exactly (packed and separate runs differ, or operators are unsupported)."""

    reason = "BACKBONE_UNSUPPORTED"


class ArtifactCorruptError(MuxtuneError):
    """A checkpoint, dataset or adapter in the store differs from its manifest."""

    reason = "ARTIFACT_CORRUPT"


class ExportMismatchError(MuxtuneError):
    """The exported adapter, loaded again, gives other logits than the training model."""

    reason = "EXPORT_MISMATCH"


class NonFiniteError(MuxtuneError):
    """A task's loss or gradient is NaN or Inf. The task ends before its optimizer writes."""

    reason = "NON_FINITE"


# End of what tools/client_code.py writes.


class InternalError(MuxtuneError):
    """The service failed unexpectedly; its operators find the cause by `metadata["trace_id"]`."""

    reason = "INTERNAL"


BY_CODE = {
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: UnavailableError,
    grpc.StatusCode.CANCELLED: UnavailableError,  # the service cancelled the call, as it shuts down
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: QuotaExceededError,  # from gRPC itself: a message over its size limit
}


# Remedies by gRPC's text about a failed connection, for people; no error's class depends on a text.
_CA_REMEDY = "Set MUXTUNE_CA (or ca=...) to the file of its CA: `muxtune up` writes certs/ca.crt in its data folder"
_NO_TLS = "The server there does not speak TLS, or asks for a certificate: use admission's address for clients"
_NOT_CONNECTED = ("failed to connect", "connections to all backends failing")  # of one address, of several
_REMEDIES = {
    "Socket closed": f"The server there does not accept plain text; a mesh speaks TLS. {_CA_REMEDY}",
    "CERTIFICATE_VERIFY_FAILED": f"The server's certificate is from an unknown CA. {_CA_REMEDY}",
    "Hostname Verification": "The server's certificate is for other addresses: run `muxtune certs FOLDER --host NAME`",
    "Handshake read failed": _NO_TLS,
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "Connection refused": "Nothing listens there: start the mesh, or set MUXTUNE_ADDRESS to admission's address",
}


def by_reason() -> dict[str, type[MuxtuneError]]:
    """Return the error classes by reason."""
    classes, waiting = {}, [MuxtuneError]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        if cls.reason:
            classes[cls.reason] = cls
    return classes


@dataclass(frozen=True)
class Failure:
    """Status and details of a failed call. `reason` is "" if it has no ErrorInfo of muxtune."""

    code: grpc.StatusCode
    reason: str
    message: str
    violations: tuple[FieldViolation, ...] = ()
    metadata: Mapping[str, str] | None = None
    retry_after_seconds: float | None = None


def read_failure(error: grpc.RpcError) -> Failure:
    """Return the status of a failed call with its google.rpc details."""
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    text = (error.details() if hasattr(error, "details") else "") or code.name
    status = _read_status(error)
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for packed in status.details if status is not None else ():
        for detail in (info, bad, retry):
            packed.Unpack(detail)
    if info.domain != DOMAIN:
        return Failure(code, "", f"{code.name}: {text}{_remedy(text)}")
    return Failure(
        code=code,
        reason=info.reason,
        message=text,
        violations=tuple(FieldViolation(v.field, v.description) for v in bad.field_violations),
        metadata=dict(info.metadata),
        retry_after_seconds=(retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9) or None,
    )


def _remedy(text: str) -> str:
    """Return the remedy for a connection that was never established, or "" for any other failure."""
    if not any(words in text for words in _NOT_CONNECTED):
        return ""
    return next((f". {remedy}" for words, remedy in _REMEDIES.items() if words in text), "")


def _read_status(error: grpc.RpcError) -> status_pb2.Status | None:
    """Return the google.rpc.Status in the call's trailers, or None if it is missing or does not fit the call."""
    if not hasattr(error, "trailing_metadata"):
        return None
    try:
        return rpc_status.from_call(error)  # type: ignore[arg-type]
    except (DecodeError, ValueError):
        return None


def from_rpc_error(error: grpc.RpcError) -> MuxtuneError:
    """Return the exception for a failed call."""
    failure = read_failure(error)
    cls = by_reason().get(failure.reason) or BY_CODE.get(failure.code, MuxtuneError)
    return cls(
        failure.message,
        code=failure.code,
        violations=failure.violations,
        metadata=failure.metadata,
        retry_after_seconds=failure.retry_after_seconds,
    )


@contextmanager
def raising() -> Iterator[None]:
    """Raise a grpc.RpcError of the block as a MuxtuneError."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
