"""Wall-clock time as the database stores it: integer microseconds since the epoch."""

import time

from google.protobuf.timestamp_pb2 import Timestamp

from engine.errors import InvalidInputError


def now() -> int:
    """Return the current time in microseconds since the epoch."""
    return time.time_ns() // 1000


def to_microseconds(timestamp: Timestamp, field: str) -> int:
    """Convert a protobuf time. Raises InvalidInputError, naming the field, outside the years 1 to 9999."""
    try:
        return timestamp.ToMicroseconds()
    except ValueError as error:
        raise InvalidInputError.of_field(field, f"must be a time of the years 1 to 9999: {error}") from error


def to_timestamp(microseconds: int | None) -> Timestamp | None:
    """Convert a time of the database to protobuf; None stays None, which leaves a field unset."""
    if microseconds is None:
        return None
    result = Timestamp()
    result.FromMicroseconds(microseconds)
    return result
