"""Tokens of an OpenID Connect issuer (JWT, RFC 7519), verified with the issuer's published keys (JWKS, RFC 7517)."""

import json
import logging
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt

from engine.errors import InvalidInputError, UnauthenticatedError, UnavailableError
from muxtune.transport import is_loopback
from services.resource_names import check_tenant, tenant_name
from services.rpc.authorization import Principal, Role
from services.rpc.rate_limit import RateLimit
from services.settings import SettingsError

_ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"})
_REFRESH_SECONDS, _FETCH_SECONDS, _LEEWAY_SECONDS = 60.0, 5.0, 30.0
_MAX_KEYS_BYTES = 1 << 20
_log = logging.getLogger(__name__)
_ROLES = {"tenant": Role.TENANT, "viewer": Role.VIEWER}


@dataclass(frozen=True)
class Provider:
    """The one issuer whose tokens are taken. `keys`: a JWKS file, or its https URL. `tenant_claim` names the claim with
    the tenant's id, `role_claim` the one with "tenant" or "viewer" (missing: tenant)."""

    issuer: str
    audience: str
    keys: str
    algorithms: tuple[str, ...] = ("RS256", "ES256")
    tenant_claim: str = "tenant"
    role_claim: str = "muxtune_role"

    def __post_init__(self) -> None:
        """Exits for settings that would let anyone in: an algorithm without a public key, keys fetched in the clear."""
        if not self.audience or not self.keys:
            raise SettingsError("MUXTUNE_OIDC_ISSUER needs MUXTUNE_OIDC_AUDIENCE and MUXTUNE_OIDC_KEYS, too")
        if wrong := set(self.algorithms) - _ALGORITHMS or not self.algorithms:
            raise SettingsError(f"MUXTUNE_OIDC_ALGORITHMS: {wrong} is not among {', '.join(sorted(_ALGORITHMS))}")
        if self.keys.startswith("http://") and not is_loopback(self.keys.removeprefix("http://").split("/")[0]):
            raise SettingsError(f"MUXTUNE_OIDC_KEYS: {self.keys} is not https")


class TokenVerifier:
    """Synchronous. Keys are read again when an unknown one is named, at most once a minute."""

    def __init__(self, provider: Provider, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._provider, self._monotonic = provider, monotonic
        self._keys: dict[str, jwt.PyJWK] = {}
        self._read_at = float("-inf")
        self._told = RateLimit(0.1)  # by cause: strangers must not fill the log

    def principal_of(self, token: str) -> Principal:
        """Raises UnauthenticatedError, alike whatever is wrong, and UnavailableError where the keys cannot be read."""
        provider = self._provider
        try:
            claims: Mapping[str, Any] = jwt.decode(
                token,
                self._key(str(jwt.get_unverified_header(token).get("kid"))),
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
            self._tell(type(error).__name__)
            raise UnauthenticatedError("the token is not valid here: take a new one from the issuer") from error
        return Principal(tenant, role, f"oidc {claims['sub']}")

    def _tell(self, cause: str) -> None:
        """The operator, who may have set an audience wrong; the caller hears nothing of it."""
        if self._told.try_acquire(cause):
            _log.warning("a token was refused: %s", cause)

    def _key(self, key_id: str) -> jwt.PyJWK:
        """Raises KeyError for an unknown one."""
        if key_id not in self._keys and self._monotonic() - self._read_at >= _REFRESH_SECONDS:
            self._read_at = self._monotonic()
            self._keys = _read_keys(self._provider.keys)
        return self._keys[key_id]


def _read_keys(source: str) -> dict[str, jwt.PyJWK]:
    """By their id; keys of a kind we do not know, or not for signatures, are left out."""
    try:
        if source.startswith(("https://", "http://")):
            with urllib.request.urlopen(source, timeout=_FETCH_SECONDS) as answer:
                data = answer.read(_MAX_KEYS_BYTES)
        else:
            data = Path(source).read_bytes()
        keys = jwt.PyJWKSet.from_dict(json.loads(data)).keys
    except (OSError, ValueError, jwt.PyJWTError) as error:
        raise UnavailableError(f"the issuer's keys cannot be read: {type(error).__name__}") from error
    return {key.key_id: key for key in keys if key.key_id and key.public_key_use in (None, "sig")}
