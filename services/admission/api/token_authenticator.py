"""Authenticates tokens: API keys of tenants and operators, tokens of an identity provider, the mesh secret."""

from engine.errors import UnauthenticatedError
from services.admission.api.oidc import TokenVerifier
from services.admission.store.api_keys import KeyStore
from services.rpc.authentication import Authenticate, mesh_authenticator
from services.rpc.authorization import Principal, Role, rule_for
from services.rpc.rate_limit import RateLimit


def create_authenticator(
    keys: KeyStore,
    mesh_secret: str,
    verifier: TokenVerifier | None = None,
    limit: RateLimit | None = None,
) -> Authenticate:
    """Return the function that authenticates by the token's form: an API key, a JWT, or else the mesh secret, which
    services without certificates use."""
    mesh = mesh_authenticator(mesh_secret)

    async def authenticate(method: str, token: str) -> Principal:
        if token.startswith("mxt_"):
            principal = await keys.authenticate(token)
        elif verifier is not None and token.count(".") == 2:
            principal = await verifier.verify(token)
        elif Role.TENANT in rule_for(method).roles:
            raise UnauthenticatedError("the API key is unknown, expired or revoked")  # the mesh secret has no tenant
        else:
            return await mesh(method, token)
        if limit is not None and principal.tenant is not None:
            limit.acquire(
                principal.tenant, f"{principal.tenant} makes more than {limit.per_second:g} calls per second."
            )
        return principal

    return authenticate
