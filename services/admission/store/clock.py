"""Wall time as the database keeps it: integer microseconds since the epoch."""

import time

from google.protobuf.timestamp_pb2 import Timestamp

from engine.errors import InvalidInputError


def now() -> int:
    return time.time_ns() // 1000


def microseconds(stamp: Timestamp, field: str) -> int:
    """Raises InvalidInputError for a time out of protobuf's range (years 1 to 9999)."""
    try:
        return stamp.ToMicroseconds()
    except ValueError as error:
        raise InvalidInputError.of_field(field, f"is no time: {error}") from error


def timestamp(microseconds: int | None) -> Timestamp | None:
    """None stays None: an unset field."""
    if microseconds is None:
        return None
    result = Timestamp()
    result.FromMicroseconds(microseconds)
    return result
