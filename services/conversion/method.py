"""Converts a task's method between protobuf and its dataclass."""

from typing import Any

from engine.errors import FieldViolation
from engine.methods import METHODS
from engine.methods.base import Method
from muxtune.v1 import task_pb2
from services.conversion.fields import fields_to_domain, fields_to_proto


def method_to_domain(spec: task_pb2.TaskSpec, path: str, violations: list[FieldViolation]) -> Method | None:
    """Return the method. If it is missing, append a violation and return None."""
    name = spec.WhichOneof("method")
    if name is None or name not in METHODS:
        violations.append(FieldViolation(f"{path}.method", f"is missing; set one of {', '.join(METHODS)}"))
        return None
    return METHODS[name](**fields_to_domain(getattr(spec, name), METHODS[name], f"{path}.{name}", violations))


def method_to_proto(method: Method) -> Any:
    """Return the message that `method_to_domain` converts back to `method`."""
    return fields_to_proto(method, type(getattr(task_pb2.TaskSpec(), method.name)))
