"""Limits of a task's spec, and its normal form. A spec is stored, planned with and sent to executors, for all tenants
at once, so that its size must have an end."""

from itertools import islice

from engine.errors import InvalidInputError
from muxtune.v1 import task_pb2
from services.message_limits import largest_field, oversized_fields, unknown_fields

MAX_SPEC_BYTES = 16 << 10  # all modules of 32 layers by their full names are 7,200; short names select them, too
_MAX_VIOLATIONS = 10


def check_spec_limits(spec: task_pb2.TaskSpec, path: str = "spec") -> None:
    """Raise InvalidInputError for a spec that is too large, and for one with fields that this version does not know:
    it would be trained without the option that its client set."""
    if (size := spec.ByteSize()) > MAX_SPEC_BYTES:
        field, field_size = largest_field(spec, path)
        known = f"the largest field, {field}, has {field_size}" if field_size else "unknown fields have most of them"
        raise InvalidInputError.of_field(
            path, f"must have at most {MAX_SPEC_BYTES} bytes, has {size} ({known}): shorten it"
        )
    violations = [*unknown_fields(spec, path), *oversized_fields(spec, path)]
    if violations:
        raise InvalidInputError.of_fields(list(islice(violations, _MAX_VIOLATIONS)))


def normalize_spec(spec: task_pb2.TaskSpec) -> task_pb2.TaskSpec:
    """Return a copy in which each list of the method is sorted and names nothing twice. These lists are sets: a method
    looks for the modules that they match in the backbone's own order."""
    normal = task_pb2.TaskSpec()
    normal.CopyFrom(spec)
    if (name := spec.WhichOneof("method")) is not None:
        method = getattr(normal, name)
        for field, values in method.ListFields():
            if field.is_repeated and field.message_type is None:
                getattr(method, field.name)[:] = sorted(set(values))
    return normal
