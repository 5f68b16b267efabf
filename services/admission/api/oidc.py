"""Verifies tokens of an OpenID Connect issuer (JWT, RFC 7519) with its published keys."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jwt

from engine.errors import InvalidInputError, UnauthenticatedError
from muxtune.transport import is_loopback
from services.admission.api.issuer_keys import IssuerKeys
from services.resource_names import check_tenant, tenant_name
from services.rpc.authorization import Principal, Role
from services.rpc.rate_limit import RateLimit
from services.settings import SettingsError

_ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"})
_LEEWAY_SECONDS = 30.0
_log = logging.getLogger(__name__)
_ROLES = {"tenant": Role.TENANT, "viewer": Role.VIEWER}


@dataclass(frozen=True)
class OidcProvider:
    """The only issuer whose tokens are accepted. `keys`: a JWKS file, or its https URL. `tenant_claim` names the claim
    that holds the tenant's id, `role_claim` the claim that holds "tenant" or "viewer" (missing: tenant)."""

    issuer: str
    audience: str
    keys: str
    algorithms: tuple[str, ...] = ("RS256", "ES256")
    tenant_claim: str = "tenant"
    role_claim: str = "muxtune_role"

    def __post_init__(self) -> None:
        """Raises SettingsError for settings that would admit anyone: a symmetric algorithm, keys over plain http."""
        if not self.audience or not self.keys:
            raise SettingsError("MUXTUNE_OIDC_ISSUER needs MUXTUNE_OIDC_AUDIENCE and MUXTUNE_OIDC_KEYS: set both")
        if unknown := set(self.algorithms) - _ALGORITHMS or not self.algorithms:
            raise SettingsError(f"MUXTUNE_OIDC_ALGORITHMS: {unknown} must be among {', '.join(sorted(_ALGORITHMS))}")
        if self.keys.startswith("http://") and not is_loopback(self.keys.removeprefix("http://").split("/")[0]):
            raise SettingsError(f"MUXTUNE_OIDC_KEYS: {self.keys} must be an https URL or a file")


class TokenVerifier:
    """Verifies tokens, on the event loop: without waiting for the issuer's keys it takes 0.1 ms."""

    def __init__(self, provider: OidcProvider, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._provider, self._keys = provider, IssuerKeys(provider.keys, monotonic)
        self._log_limit = RateLimit(0.1)  # by cause: unauthenticated callers must not fill the log

    async def verify(self, token: str) -> Principal:
        """Return the token's principal. Raises the same UnauthenticatedError for every defect, and UnavailableError if
        the keys cannot be read."""
        provider = self._provider
        try:
            claims: Mapping[str, Any] = jwt.decode(
                token,
                await self._key(token),
                algorithms=list(provider.algorithms),
                audience=provider.audience,
                issuer=provider.issuer,
                leeway=_LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub", provider.tenant_claim]},
            )
            tenant = str(claims[provider.tenant_claim])
            tenant = check_tenant(tenant_name(tenant))
            role = _ROLES[str(claims.get(provider.role_claim, "tenant"))]
        except (jwt.PyJWTError, InvalidInputError, KeyError, ValueError, RecursionError) as error:
            self._log_refusal(type(error).__name__)
            raise UnauthenticatedError("the token is invalid or expired: get a new one from the issuer") from error
        return Principal(tenant, role, f"oidc {claims['sub']}")

    async def _key(self, token: str) -> jwt.PyJWK:
        """Return the issuer's key that the token names. Raises KeyError if the issuer has no such key."""
        key_id = str(jwt.get_unverified_header(token).get("kid"))
        if (key := await self._keys.find(key_id)) is None:
            raise KeyError("unknown key id")
        return key

    def _log_refusal(self, cause: str) -> None:
        """Log the cause for the operator, whose settings may be wrong; the caller does not learn it."""
        if self._log_limit.try_acquire(cause):
            _log.warning("token refused: %s", cause)
