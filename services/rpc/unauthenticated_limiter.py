"""Limits calls without a valid key by the address they come from, and counts them for the audit log.

Many callers may share an address: one whose token was valid before is never limited. Behind a proxy all callers have
the proxy's address, so only the proxy can limit them; forwarding headers are not trusted.
"""

import asyncio
import hashlib
import ipaddress
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote

from engine.errors import MuxtuneError, OverloadedError, UnauthenticatedError
from services.rpc.audit import Audit, AuditEntry
from services.rpc.authentication import Authenticate, bearer_token
from services.rpc.authorization import Principal, Role
from services.rpc.rate_limit import RateLimit

_MAX_TOKENS = 10_000
_MAX_ADDRESSES = 100  # audit entries a minute: one for each of these addresses, and one for all others
_AUDIT_SECONDS = 60.0


@dataclass
class _RefusedCalls:
    """Calls of one address since the last audit; `method` is the first one's."""

    method: str
    num_calls: int = 0


class UnauthenticatedCallLimiter:
    """Authenticates the token calls of one server. Without arguments it limits and records nothing."""

    def __init__(self, limit: RateLimit | None = None, audit: Audit | None = None) -> None:
        self._limit, self._audit = limit or RateLimit(0), audit
        self._valid_digests: OrderedDict[bytes, None] = OrderedDict()  # hashes of tokens that were valid
        self._refused: dict[str, _RefusedCalls] = {}  # by address, since the last audit

    async def authenticate(
        self, peer: str, method: str, metadata: Iterable[tuple[str, str | bytes]], authenticate: Authenticate
    ) -> Principal:
        """Return the caller's principal. Raises UnauthenticatedError.

        Raises OverloadedError after too many unauthenticated calls from the address; then only tokens that were valid
        before are looked up.
        """
        address = client_address(peer)
        try:
            token = bearer_token(metadata)
            digest = hashlib.sha256(token.encode()).digest()
            is_new = digest not in self._valid_digests
            if is_new:
                self._limit.acquire(address, f"Too many unauthenticated calls from {address}.")
        except (UnauthenticatedError, OverloadedError):
            self._count(address, method)
            raise
        try:
            principal = await authenticate(method, token)
        except UnauthenticatedError:
            self._valid_digests.pop(digest, None)
            self._count(address, method)
            raise
        except MuxtuneError:  # the tenant is over a limit, or the key store is unavailable
            if is_new:
                self._limit.refund(address)
            raise
        if is_new:
            self._limit.refund(address)
        self._remember(digest)
        return principal

    def _remember(self, digest: bytes) -> None:
        self._valid_digests[digest] = None
        self._valid_digests.move_to_end(digest)
        while len(self._valid_digests) > _MAX_TOKENS:
            self._valid_digests.popitem(last=False)

    def _count(self, address: str, method: str) -> None:
        if self._audit is not None:
            is_counted_alone = address in self._refused or len(self._refused) < _MAX_ADDRESSES
            self._refused.setdefault(address if is_counted_alone else "elsewhere", _RefusedCalls(method)).num_calls += 1

    async def run(self) -> None:
        """Write audit entries once a minute until cancelled, and then the remaining ones."""
        try:
            while True:
                await asyncio.sleep(_AUDIT_SECONDS)
                await self.write_audit_entries()
        finally:
            await self.write_audit_entries()

    async def write_audit_entries(self) -> None:
        """Write one audit entry for each address: its number of unauthenticated calls and the first one's method."""
        refused, self._refused = self._refused, {}
        for address, calls in refused.items():
            subject = f"nobody, {calls.num_calls} calls from {address}"
            entry = AuditEntry(Principal(None, Role.ANYONE, subject), calls.method, "", "UNAUTHENTICATED")
            if self._audit is not None:
                await self._audit(entry)


@lru_cache(4096)
def client_address(peer: str) -> str:
    """Return the host of gRPC's peer name: "192.0.2.1" for "ipv4:192.0.2.1:5000".

    For IPv6 return the /64 network: a host has all addresses of its network.
    """
    kind, _, rest = unquote(peer).partition(":")  # gRPC writes ipv6:%5B::1%5D:5000
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    if kind != "ipv6":
        return host if kind == "ipv4" else kind
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        return kind
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address, 64), strict=False))
