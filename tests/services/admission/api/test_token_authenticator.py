"""Authentication by API keys and by tokens of an identity provider; the rate limit of a tenant."""

import base64
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from google.rpc import error_details_pb2

from engine.errors import OverloadedError, UnauthenticatedError
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import key_pb2
from services.admission.__main__ import AdmissionSettings
from services.admission.api.oidc import OidcProvider, TokenVerifier
from services.admission.api.token_authenticator import create_authenticator
from services.admission.store.api_keys import KeyStore
from services.rpc.authorization import Role
from services.rpc.rate_limit import RateLimit
from services.settings import SettingsError, from_environment
from tests.services.admission.admission_mesh import Admission, dataset_parts, refused

ISSUER, AUDIENCE = "https://issuer.example", "muxtune"
DENIED = (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
RSA_KEY, EC_KEY = rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256R1())


def jwks(**keys: Any) -> str:
    """Return the public keys as an issuer publishes them."""
    algorithms = {"rsa": jwt.algorithms.RSAAlgorithm, "ec": jwt.algorithms.ECAlgorithm}
    public_keys = []
    for key_id, key in keys.items():
        kind = "rsa" if isinstance(key, rsa.RSAPrivateKey) else "ec"
        public = json.loads(algorithms[kind].to_jwk(key.public_key()))
        public_keys.append({**public, "kid": key_id, "use": "sig"})
    return json.dumps({"keys": public_keys})


@pytest.fixture
def provider(tmp_path: Path) -> OidcProvider:
    (tmp_path / "jwks.json").write_text(jwks(one=RSA_KEY, two=EC_KEY))
    return OidcProvider(ISSUER, AUDIENCE, str(tmp_path / "jwks.json"))


def token(key: Any = RSA_KEY, key_id: str | None = "one", algorithm: str = "RS256", **changes: Any) -> str:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "tenant": "acme", "exp": int(time.time()) + 300}
    claims = {name: value for name, value in {**claims, **changes}.items() if value is not None}
    return jwt.encode(claims, key, algorithm, headers={"kid": key_id} if key_id else {})


def unsigned(**claims: Any) -> str:
    parts = [{"alg": "none", "kid": "one"}, {"iss": ISSUER, "aud": AUDIENCE, "sub": "x", "tenant": "acme", **claims}]
    return ".".join(base64.urlsafe_b64encode(json.dumps(p).encode()).rstrip(b"=").decode() for p in parts) + "."


async def test_a_token_of_the_issuer_is_its_tenants(provider: OidcProvider) -> None:
    verifier = TokenVerifier(provider)
    for valid in (token(), token(EC_KEY, "two", "ES256"), token(tenant="tenants/acme"), token(aud=["x", AUDIENCE])):
        principal = await verifier.verify(valid)
        assert (principal.tenant, principal.role, principal.subject) == ("tenants/acme", Role.TENANT, "oidc ada")
    assert (await verifier.verify(token(muxtune_role="viewer"))).role is Role.VIEWER


FORGED: dict[str, Callable[[], str]] = {
    "expired": lambda: token(exp=int(time.time()) - 60),
    "not yet": lambda: token(nbf=int(time.time()) + 3600),
    "without an end": lambda: token(exp=None),
    "another issuer": lambda: token(iss="https://other.example"),
    "another audience": lambda: token(aud="other"),
    "without audience": lambda: token(aud=None),
    "without subject": lambda: token(sub=None),
    "without tenant": lambda: token(tenant=None),
    "a tenant that is none": lambda: token(tenant="../rival"),
    "a tenant that is a list": lambda: token(tenant=["acme"]),
    "an operator by its own word": lambda: token(muxtune_role="operator"),
    "an unknown key": lambda: token(key_id="three"),
    "no key named": lambda: token(key_id=None),
    "another's key": lambda: token(rsa.generate_private_key(65537, 2048)),
    "an algorithm not allowed": lambda: token(algorithm="RS512"),
    "no signature": lambda: unsigned(exp=int(time.time()) + 60),
    # The public key, which anyone has, as the secret of a symmetric algorithm.
    "a symmetric algorithm": lambda: hmac_token(),
    "nonsense": lambda: "a.b.c",
    "deep": lambda: ".".join([base64.urlsafe_b64encode(b"[" * 5000).decode()] * 3),
}


def hmac_token() -> str:
    header = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"one"}').rstrip(b"=")
    body = token().split(".")[1].encode()
    algorithm = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    public = json.dumps(json.loads(jwks(one=RSA_KEY))["keys"][0]).encode()
    signature = base64.urlsafe_b64encode(algorithm.sign(header + b"." + body, public)).rstrip(b"=")
    return b".".join([header, body, signature]).decode()


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED.keys())
async def test_every_forged_token_gets_the_same_refusal(provider: OidcProvider, forged: Callable[[], str]) -> None:
    with pytest.raises(UnauthenticatedError, match="the token is invalid or expired: get a new one"):
        await TokenVerifier(provider).verify(forged())


async def test_the_reason_is_logged_for_the_operator_at_a_limited_rate(
    provider: OidcProvider, caplog: pytest.LogCaptureFixture
) -> None:
    """The log holds no part of the token, which may be valid elsewhere."""
    verifier = TokenVerifier(provider)
    for _ in range(20):
        for forged in (token(aud="secret-audience"), token(iss="https://secret.example"), token(tenant="Secret Inc.")):
            with pytest.raises(UnauthenticatedError):
                await verifier.verify(forged)
    causes = [record.getMessage() for record in caplog.records]
    wrong = ("InvalidAudienceError", "InvalidIssuerError", "InvalidInputError")
    assert causes == [f"token refused: {cause}" for cause in wrong]
    assert "secret" not in caplog.text.lower()


@pytest.mark.parametrize(
    "wrong",
    [
        {"algorithms": ("HS256",)},
        {"algorithms": ("RS256", "none")},
        {"algorithms": ()},
        {"audience": ""},
        {"keys": ""},
        {"keys": "http://issuer.example/keys"},
    ],
    ids=str,
)
def test_a_provider_that_would_let_anyone_in_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="MUXTUNE_OIDC"):
        OidcProvider(**{"issuer": ISSUER, "audience": AUDIENCE, "keys": "https://issuer.example/keys", **wrong})


async def test_keys_and_tokens_stand_side_by_side(admission: Admission, provider: OidcProvider) -> None:
    authenticate = create_authenticator(admission.key_store, "", TokenVerifier(provider))
    key = admission.key_store.create("tenants/acme", None)[1]
    assert (await authenticate("/x/Y", key)).tenant == (await authenticate("/x/Y", token())).tenant == "tenants/acme"
    for nobody in ("", "x", "mesh_of-the-tests", token(aud="other"), key + "x"):
        with pytest.raises(UnauthenticatedError):
            await authenticate("/x/Y", nobody)
    with pytest.raises(UnauthenticatedError):  # no issuer, no tokens
        await create_authenticator(admission.key_store, "")("/x/Y", token())


async def test_the_services_settings_name_the_issuer(admission: Admission, provider: OidcProvider) -> None:
    environment = {
        "MUXTUNE_DATABASE_URL": "sqlite:///x", "MUXTUNE_ARTIFACT_URL": "x", "MUXTUNE_ALIGNMENT_ADDRESS": "x:1",
        "MUXTUNE_OIDC_ISSUER": ISSUER, "MUXTUNE_OIDC_AUDIENCE": AUDIENCE, "MUXTUNE_OIDC_KEYS": provider.keys,
        "MUXTUNE_OIDC_TENANT_CLAIM": "org", "MUXTUNE_OIDC_ALGORITHMS": "ES256, RS256",
    }  # fmt: skip
    authenticate = from_environment(AdmissionSettings, environment).authenticate(admission.key_store)
    assert (await authenticate("/x/Y", token(org="globex"))).tenant == "tenants/globex"
    with pytest.raises(UnauthenticatedError):
        await authenticate("/x/Y", token(algorithm="RS384", org="globex"))
    with pytest.raises(SettingsError, match="HS256"):
        from_environment(AdmissionSettings, {**environment, "MUXTUNE_OIDC_ALGORITHMS": "HS256"}).authenticate(
            admission.key_store
        )


async def test_a_viewer_reads_and_changes_nothing(admission: Admission) -> None:
    dataset = await admission.upload()
    viewer = admission.with_token(admission.key_store.create("tenants/acme", None, Role.VIEWER)[1])
    assert (await viewer.GetDataset(pb.GetDatasetRequest(name=dataset.name))).dataset == dataset
    assert len((await viewer.ListTasks(pb.ListTasksRequest())).tasks) == 0
    for call in (
        viewer.DeleteDataset(pb.DeleteDatasetRequest(name=dataset.name)),
        viewer.CreateTask(pb.CreateTaskRequest()),
        viewer.CancelTask(pb.CancelTaskRequest(name="tenants/acme/tasks/t")),
        viewer.UploadDataset(dataset_parts(b'{"text": "x"}\n')),
    ):
        with refused(*DENIED):
            await call
    stranger = admission.with_token(admission.key_store.create("tenants/other", None, Role.VIEWER)[1])
    with refused(*DENIED):
        await stranger.GetDataset(pb.GetDatasetRequest(name=dataset.name))


async def test_operators_make_keys_and_tenants_do_not(admission: Admission) -> None:
    request = key_pb2.CreateApiKeyRequest(role=key_pb2.KEY_ROLE_OPERATOR)
    operator = (await admission.keys().CreateApiKey(request)).secret
    created = await admission.keys(operator).CreateApiKey(
        key_pb2.CreateApiKeyRequest(tenant="tenants/acme", role=key_pb2.KEY_ROLE_VIEWER)
    )
    assert created.key.role == key_pb2.KEY_ROLE_VIEWER
    tenant = admission.key_store.create("tenants/acme", None)[1]
    for secret in (tenant, created.secret):
        with refused(*DENIED):
            await admission.keys(secret).ListApiKeys(key_pb2.ListApiKeysRequest())
    with refused(*DENIED):  # nor is an operator a tenant
        await admission.with_token(operator).ListTasks(pb.ListTasksRequest())
    for wrong, field in (
        (key_pb2.CreateApiKeyRequest(tenant="tenants/acme", role=key_pb2.KEY_ROLE_OPERATOR), "tenant"),
        (key_pb2.CreateApiKeyRequest(tenant="tenants/acme", role=17), "role"),
    ):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT") as refusal:
            await admission.keys().CreateApiKey(wrong)
        assert refusal.fields == [field]


@pytest.fixture
def seconds() -> Iterator[list[float]]:
    yield [0.0]


async def test_a_tenant_that_calls_too_often_waits_and_others_do_not(
    admission: Admission, seconds: list[float]
) -> None:
    authenticate = create_authenticator(admission.key_store, "", None, RateLimit(5, lambda: seconds[0]))
    a, b = (admission.key_store.create(f"tenants/{name}", None)[1] for name in "ab")
    for _ in range(10):
        await authenticate("/x/Y", a)
    for _ in range(3):
        with pytest.raises(OverloadedError, match="tenants/a makes more than 5 calls"):
            await authenticate("/x/Y", a)
    await authenticate("/x/Y", b)
    seconds[0] = 1.0  # what RetryInfo promises
    for _ in range(5):
        await authenticate("/x/Y", a)
    with pytest.raises(OverloadedError):
        await authenticate("/x/Y", a)


async def test_a_tenant_over_its_rate_gets_a_retry_time(admission: Admission) -> None:
    admission.requests_per_second = 0.01
    await admission.restart()
    acme = admission.tenant()
    await acme.ListTasks(pb.ListTasksRequest())
    for _ in range(3):
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED") as refusal:
            await acme.ListTasks(pb.ListTasksRequest())
        (retry,) = (d for d in refusal.details if isinstance(d, error_details_pb2.RetryInfo))
        assert retry.retry_delay.seconds >= 1
    await admission.keys().ListApiKeys(key_pb2.ListApiKeysRequest())  # operators are not limited


async def test_the_limit_holds_whatever_key_is_used(admission: Admission, seconds: list[float]) -> None:
    keys = KeyStore(admission.database)
    authenticate = create_authenticator(keys, "", None, RateLimit(1, lambda: seconds[0]))
    secrets = [keys.create("tenants/acme", None)[1] for _ in range(3)]
    for key in secrets[:2]:
        await authenticate("/x/Y", key)
    with pytest.raises(OverloadedError):
        await authenticate("/x/Y", secrets[2])
