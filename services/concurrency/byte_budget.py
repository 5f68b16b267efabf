"""Bytes that tenants may take at once of something that all of them share: a disk, memory."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import OverloadedError, QuotaExceededError


class ByteBudget:
    """At most `max_bytes` in all and `max_tenant_bytes` of one tenant. For one thread.

    A tenant may take more only while it then holds no more than what is left over. So one tenant alone gets half, and
    the next one always finds about as much free as each of the others holds. Source: the dynamic thresholds of shared
    buffers (Choudhury and Hahne, 1998).
    """

    def __init__(self, what: str, max_bytes: int, max_tenant_bytes: int) -> None:
        self._what, self._max_bytes, self._max_tenant_bytes = what, max_bytes, max_tenant_bytes
        self._bytes = Counter[tuple[str, str]]()  # by tenant and kind

    def taken(self, tenant: str, kind: str) -> int:
        return self._bytes[tenant, kind]

    @contextmanager
    def take(self, tenant: str, kind: str, num_bytes: int) -> Iterator[None]:
        """Take the bytes until the end of the block.

        Raises QuotaExceededError if the tenant takes too many at once, OverloadedError if all tenants do.
        """
        self._check(tenant, num_bytes)
        self._bytes[tenant, kind] += num_bytes
        try:
            yield
        finally:
            self._bytes[tenant, kind] -= num_bytes
            if not self._bytes[tenant, kind]:
                del self._bytes[tenant, kind]

    def _check(self, tenant: str, num_bytes: int) -> None:
        before = sum(taken for (owner, _), taken in self._bytes.items() if owner == tenant)
        if before + num_bytes > self._max_tenant_bytes:
            raise QuotaExceededError(
                f"{tenant} has {before} bytes of {self._what} and adds {num_bytes}; at most {self._max_tenant_bytes} "
                "at once: wait until some have ended, or cancel them.",
                subject=tenant,
            )
        if before + num_bytes > self._max_bytes - self._bytes.total():
            raise OverloadedError(
                f"All tenants have {self._bytes.total()} bytes of {self._what}; at most {self._max_bytes} at once, and "
                f"{tenant}, which has {before}, cannot add {num_bytes}. Retry later."
            )
