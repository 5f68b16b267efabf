"""The exceptions of muxtune's domain: every refusal and failure is one of these classes.

Services map each class to a gRPC status and a reason in one table (`services/rpc/errors.py`); the client rebuilds the
same kind of error from the reason (`muxtune/errors.py`). A message names the field, the value and the remedy.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FieldViolation:
    """An invalid field of a request: its path (`training.learning_rate`), and the problem with its remedy."""

    field: str
    description: str


class MuxtuneError(Exception):
    """The base of all domain errors. `metadata` may be shown to the tenant: it never contains a row of a dataset."""

    def __init__(self, message: str, **metadata: str | int | float) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = {key: str(value) for key, value in metadata.items()}


class InvalidInputError(MuxtuneError):
    """The request can't succeed unless the caller changes it."""

    def __init__(self, message: str, violations: Sequence[FieldViolation] = (), **metadata: str | int | float) -> None:
        super().__init__(message, **metadata)
        self.violations = tuple(violations)

    @classmethod
    def of_field(cls, field: str, description: str) -> "InvalidInputError":
        return cls.of_fields([FieldViolation(field, description)])

    @classmethod
    def of_fields(cls, violations: Sequence[FieldViolation]) -> "InvalidInputError":
        return cls("; ".join(f"{violation.field}: {violation.description}" for violation in violations), violations)


class MalformedDatasetError(InvalidInputError):
    """A line of a dataset is not valid JSON of a known shape. The message names the line."""


class ChecksumMismatchError(InvalidInputError):
    """An upload's bytes differ from the announced size or hash: they were truncated, reordered or corrupted."""


class RequestIdReusedError(InvalidInputError):
    """An earlier request had the same `request_id` and another body (AIP-155)."""


class UnauthenticatedError(MuxtuneError):
    """The call has no key, an unknown, expired or revoked key, or a wrong mesh secret."""


class PermissionDeniedError(MuxtuneError):
    """The caller may not see or change this name, or it does not exist: both get the same answer (AIP-211)."""


class NotFoundError(MuxtuneError):
    """A name that the caller may access does not exist."""


class AlreadyExistsError(MuxtuneError):
    """A resource with this id and other contents exists already."""


class IllegalTransitionError(MuxtuneError):
    """The state of the task or dataset does not allow this change."""


class ResourceInUseError(IllegalTransitionError):
    """An unfinished task needs the dataset or adapter."""


class QuotaExceededError(MuxtuneError):
    """The request would exceed a limit of the tenant or of the service (bytes, rows, tasks)."""


class WillNeverFitError(InvalidInputError):
    """No executor of the backbone has enough memory for the task, even alone."""


class OverloadedError(MuxtuneError):
    """The service has too many requests now. The same call succeeds later."""


class TransferTooSlowError(MuxtuneError):
    """The client sent a request or an upload too slowly. Nothing is stored: send it again over a faster connection."""


class SupersededError(MuxtuneError):
    """The writer's attempt, lease or plan version is out of date: its write is ignored."""


class LeaseLostError(SupersededError):
    """The executor's lease ended or belongs to another process of the executor."""


class UnavailableError(MuxtuneError):
    """A service, store or executor can't be reached now."""


class BackboneUnsupportedError(MuxtuneError):
    """The engine can't train this model exactly (packed and separate runs differ, or operators are unsupported)."""


class ArtifactCorruptError(MuxtuneError):
    """A checkpoint, dataset or adapter in the store differs from its manifest."""


class ExportMismatchError(MuxtuneError):
    """The exported adapter, loaded again, gives other logits than the training model."""


class NonFiniteError(MuxtuneError):
    """A task's loss or gradient is NaN or Inf. The task ends before its optimizer writes."""
