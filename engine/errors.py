"""Every way muxtune refuses or fails, as exceptions of the domain.

Services map each class to a gRPC status and a reason in one table (`services/rpc/errors.py`); the client rebuilds the
same kind of error from the reason (`muxtune/errors.py`). A message names the field, the value and the remedy.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FieldViolation:
    """One offending field: its path in the request (`training.learning_rate`), and what is wrong and what to do."""

    field: str
    description: str


class MuxtuneError(Exception):
    """Base of all domain errors. `metadata` is safe to show to the tenant: it never holds a row of a dataset."""

    def __init__(self, message: str, **metadata: str | int | float) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = {key: str(value) for key, value in metadata.items()}


class InvalidInputError(MuxtuneError):
    """The request can never succeed as it stands."""

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
    """A dataset's bytes are not what JSON Lines of a known shape should be; names the line."""


class ChecksumMismatchError(InvalidInputError):
    """Bytes received are not the bytes announced (truncated, reordered or corrupted upload)."""


class RequestIdReusedError(InvalidInputError):
    """A `request_id` was sent before with another body (AIP-155)."""


class UnauthenticatedError(MuxtuneError):
    """No key, an unknown, expired or revoked key, or a wrong mesh secret."""


class PermissionDeniedError(MuxtuneError):
    """The caller may not see or change this name, or it does not exist: both answer alike (AIP-211)."""


class NotFoundError(MuxtuneError):
    """A name inside the caller's own reach does not exist."""


class AlreadyExistsError(MuxtuneError):
    """A resource of that id exists already with other contents."""


class IllegalTransitionError(MuxtuneError):
    """The task or dataset is in a state in which this can't be done."""


class ResourceInUseError(IllegalTransitionError):
    """The dataset or adapter is needed by an unfinished task."""


class QuotaExceededError(MuxtuneError):
    """A limit of the tenant or of the service (bytes, rows, tasks) would be passed."""


class WillNeverFitError(InvalidInputError):
    """No executor of that backbone could hold the task even alone."""


class OverloadedError(MuxtuneError):
    """Too much at once; the same call will be taken later."""


class SupersededError(MuxtuneError):
    """The writer's attempt epoch, lease or plan version has been superseded: what it sent does not count."""


class LeaseLostError(SupersededError):
    """The executor's lease ended or belongs to another incarnation."""


class UnavailableError(MuxtuneError):
    """A service, store or executor is away for now."""


class BackboneUnsupportedError(MuxtuneError):
    """The model cannot be trained exactly by this engine (packed and separate runs differ, unsupported operators)."""


class ArtifactCorruptError(MuxtuneError):
    """A checkpoint, dataset or adapter in the store does not match its manifest."""


class ExportMismatchError(MuxtuneError):
    """The exported adapter, loaded again, does not answer like the training model."""


class NonFiniteError(MuxtuneError):
    """A task's loss or gradient is NaN or Inf: quarantined before its optimizer wrote."""
