"""Calls that prove nothing: limited by the address they come from, and counted for the audit log.

Behind an address may be many, good and bad: who brings a token that was good before is never held up. Behind a proxy
all have the proxy's address, so that only the proxy can limit them; what it says of them in metadata is not believed.
"""

import asyncio
import hashlib
import ipaddress
import logging
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
_MAX_ADDRESSES = 100  # of an audit's minute: at most so many lines and one more, whoever calls
_AUDIT_SECONDS = 60.0
_log = logging.getLogger(__name__)


@dataclass
class _Refused:
    method: str
    num_calls: int = 0


class UnauthenticatedCallLimiter:
    """One for each server. Without arguments it limits nothing."""

    def __init__(self, limit: RateLimit | None = None, audit: Audit | None = None) -> None:
        self._limit, self._audit = limit or RateLimit(0), audit
        self._good: OrderedDict[bytes, None] = OrderedDict()  # hashes of tokens that were
        self._refused: dict[str, _Refused] = {}  # by address, since the last audit

    async def prove(
        self, peer: str, method: str, metadata: Iterable[tuple[str, str | bytes]], authenticate: Authenticate
    ) -> Principal:
        """Who calls. Raises UnauthenticatedError, and OverloadedError where too many calls from there prove nothing:
        a token is looked up then only if it was good before."""
        address = client_address(peer)
        try:
            token = bearer_token(metadata)
            digest = hashlib.sha256(token.encode()).digest()
            is_new = digest not in self._good
            if is_new:
                self._limit.take(address, f"too many calls from {address} bring no valid key: wait")
        except (UnauthenticatedError, OverloadedError):
            self._note(address, method)
            raise
        try:
            principal = await authenticate(method, token)
        except UnauthenticatedError:
            self._good.pop(digest, None)
            self._note(address, method)
            raise
        except MuxtuneError:  # its tenant is over a limit, or nobody can tell now
            if is_new:
                self._limit.give_back(address)
            raise
        if is_new:
            self._limit.give_back(address)
        self._remember(digest)
        return principal

    def _remember(self, digest: bytes) -> None:
        self._good[digest] = None
        self._good.move_to_end(digest)
        while len(self._good) > _MAX_TOKENS:
            self._good.popitem(last=False)

    def _note(self, address: str, method: str) -> None:
        if self._audit is not None:
            known = address in self._refused or len(self._refused) < _MAX_ADDRESSES
            refused = self._refused.setdefault(address if known else "elsewhere", _Refused(method))
            refused.num_calls += 1

    async def run(self) -> None:
        """Writes once a minute, until cancelled, and then what is left."""
        try:
            while True:
                await asyncio.sleep(_AUDIT_SECONDS)
                await self.tell()
        finally:
            await self.tell()

    async def tell(self) -> None:
        """A line in the audit log for each address: how many of its calls proved nothing; the method of the first."""
        refused, self._refused = self._refused, {}
        for address, those in refused.items():
            subject = f"nobody, {those.num_calls} calls from {address}"
            entry = AuditEntry(Principal(None, Role.ANYONE, subject), those.method, "", "UNAUTHENTICATED")
            if self._audit is not None:
                await self._audit(entry)


@lru_cache(4096)
def client_address(peer: str) -> str:
    """Of what gRPC calls the peer, "ipv4:192.0.2.1:5000", without its port. Of IPv6 the network (/64): whoever has an
    address there has all of them."""
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
