"""Who calls admission with a token: a tenant or operator by API key, a tenant by its identity provider's token."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

from engine.errors import OverloadedError, UnauthenticatedError
from services.access import Role, rule_of
from services.admission.keys import KeyStore
from services.admission.oidc import TokenVerifier
from services.auth import Authenticate, Principal, mesh_authenticator

_MAX_BUCKETS = 10_000


class RateLimit:
    """A token bucket for each tenant: `per_second` calls, and as many in one burst as two seconds have. 0: no limit."""

    def __init__(self, per_second: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._monotonic = per_second, monotonic
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # (calls left, when)

    def take(self, tenant: str) -> None:
        """Raises OverloadedError where the bucket is empty; a second later it is not, at a rate of one or more."""
        if not self._per_second:
            return
        most, moment = max(1.0, 2 * self._per_second), self._monotonic()
        left, since = self._buckets.pop(tenant, (most, moment))
        left = min(most, left + (moment - since) * self._per_second)
        self._buckets[tenant] = (left - 1 if left >= 1 else left, moment)
        while len(self._buckets) > _MAX_BUCKETS:
            self._buckets.popitem(last=False)
        if left < 1:
            raise OverloadedError(f"{tenant} makes more than {self._per_second:g} calls a second: wait", subject=tenant)


def authenticator(
    keys: KeyStore,
    mesh_secret: str,
    verifier: TokenVerifier | None = None,
    limit: RateLimit | None = None,
) -> Authenticate:
    """By what the token looks like: an API key, a JWT, else the mesh secret where services have no certificates."""
    mesh = mesh_authenticator(mesh_secret)

    async def authenticate(method: str, token: str) -> Principal:
        if token.startswith("mxt_"):
            principal = await keys.principal_of(token)
        elif verifier is not None and token.count(".") == 2:
            principal = await asyncio.to_thread(verifier.principal_of, token)
        elif Role.TENANT in rule_of(method).roles:
            raise UnauthenticatedError("the API key is unknown, expired or revoked")  # the mesh is no tenant
        else:
            return await mesh(method, token)
        if limit is not None and principal.tenant is not None:
            limit.take(principal.tenant)
        return principal

    return authenticate
