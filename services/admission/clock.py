"""Wall time as the database keeps it: integer microseconds since the epoch."""

import time

from google.protobuf.timestamp_pb2 import Timestamp


def now() -> int:
    return time.time_ns() // 1000


def timestamp(microseconds: int | None) -> Timestamp | None:
    """None stays None: an unset field."""
    if microseconds is None:
        return None
    result = Timestamp()
    result.FromMicroseconds(microseconds)
    return result
