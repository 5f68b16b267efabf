"""An issuer that is away, slow or hostile delays its own tokens and nobody else, and no valid token is refused."""

import asyncio
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from engine.errors import UnauthenticatedError, UnavailableError
from services.admission.api.issuer_keys import IssuerKeys
from services.admission.api.oidc import OidcProvider, TokenVerifier
from services.admission.api.token_authenticator import create_authenticator
from tests.services.admission.admission_mesh import Admission
from tests.services.admission.api.test_token_authenticator import AUDIENCE, EC_KEY, ISSUER, RSA_KEY, jwks, token


class Issuer(http.server.ThreadingHTTPServer):
    """Publishes `keys` at /keys; at other paths it misbehaves until `may_end` is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Publisher)
        self.keys, self.num_requests = jwks(one=RSA_KEY), 0
        self.has_request, self.may_end = threading.Event(), threading.Event()

    def url(self, path: str = "keys") -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, request: object, client_address: object) -> None: ...  # the client has left


class Publisher(http.server.BaseHTTPRequestHandler):
    server: Issuer

    def do_GET(self) -> None:
        self.server.num_requests += 1
        self.server.has_request.set()
        misbehave = getattr(self, self.path[1:].replace("-", "_"), None)
        if misbehave is not None:
            return misbehave()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.keys.encode())

    def silent(self) -> None:
        self.server.may_end.wait()

    def slow_body(self) -> None:
        self.send_response(200)
        self.end_headers()
        self._drip(b" ")

    def slow_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        self._drip(b"x")

    def endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(b" " * 65536)

    def redirect(self) -> None:
        self.send_response(302)
        self.send_header("Location", f"ftp://127.0.0.1:{self.server.server_port}/keys")
        self.end_headers()

    def html(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>" + b"[" * 100_000)

    def deep(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"[" * 100_000)

    def away(self) -> None:
        self.send_error(503)

    def _drip(self, byte: bytes) -> None:
        while not self.server.may_end.wait(0.05):
            self.wfile.write(byte)
            self.wfile.flush()

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.may_end.set()
        server.shutdown()


@pytest.fixture
def seconds() -> list[float]:
    return [0.0]


def verifier_of(source: str, seconds: list[float]) -> TokenVerifier:
    return TokenVerifier(OidcProvider(ISSUER, AUDIENCE, source), lambda: seconds[0])


async def test_keys_that_are_away_at_the_start_are_asked_for_again_within_seconds(
    tmp_path: Path, seconds: list[float]
) -> None:
    """Every valid token was once UNAUTHENTICATED for a minute after the first reading failed."""
    file = tmp_path / "jwks.json"
    verifier = verifier_of(str(file), seconds)
    for seconds[0] in (0.0, 0.5, 0.9, 1.0, 2.0, 3.1, 7.5):
        for unreadable in (token(), token(EC_KEY, "two", "ES256"), token(aud="other")):
            with pytest.raises(UnavailableError, match="issuer's keys"):
                await verifier.verify(unreadable)
    file.write_text(jwks(one=RSA_KEY))
    seconds[0] += 8.0  # the fifth wait, and 10 s at most
    assert (await verifier.verify(token())).tenant == "tenants/acme"


async def test_a_new_key_is_read_and_unknown_ones_once_a_minute(issuer: Issuer, seconds: list[float]) -> None:
    verifier = verifier_of(issuer.url(), seconds)
    await verifier.verify(token())
    for number in range(50):
        with pytest.raises(UnauthenticatedError):
            await verifier.verify(token(key_id=f"unknown-{number}"))
    assert issuer.num_requests == 1
    issuer.keys = jwks(new=EC_KEY)
    seconds[0] = 61.0
    await verifier.verify(token(EC_KEY, "new", "ES256"))
    with pytest.raises(UnauthenticatedError):  # withdrawn by its issuer
        await verifier.verify(token())
    assert issuer.num_requests == 2


async def test_tokens_of_known_keys_stay_valid_while_the_issuer_is_away(tmp_path: Path, seconds: list[float]) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(jwks(one=RSA_KEY))
    verifier = verifier_of(str(file), seconds)
    await verifier.verify(token())
    file.unlink()
    seconds[0] = 61.0
    for number in range(3):  # it may be a new key: nobody can tell
        with pytest.raises(UnavailableError):
            await verifier.verify(token(EC_KEY, f"new-{number}", "ES256"))
        await verifier.verify(token())
        with pytest.raises(UnauthenticatedError):
            await verifier.verify(token(rsa.generate_private_key(65537, 2048)))
    file.write_text(jwks(one=RSA_KEY))
    seconds[0] = 62.0
    with pytest.raises(UnauthenticatedError):
        await verifier.verify(token(EC_KEY, "new-0", "ES256"))


async def test_a_flood_of_unknown_keys_asks_an_issuer_that_is_away_once_in_ten_seconds(
    issuer: Issuer, seconds: list[float]
) -> None:
    keys = IssuerKeys(issuer.url("away"), lambda: seconds[0])
    for tenths in range(300):
        seconds[0] = tenths / 10
        with pytest.raises(UnavailableError):
            await keys.find(f"unknown-{tenths}")
    assert issuer.num_requests == 6  # after 0, 1, 3, 7, 15 and 25 s


async def test_callers_that_come_at_once_share_one_reading(issuer: Issuer) -> None:
    keys = IssuerKeys(issuer.url())
    found = await asyncio.gather(*(keys.find("one" if number % 2 else "unknown") for number in range(50)))
    assert [key is not None for key in found] == [False, True] * 25
    assert issuer.num_requests == 1


@pytest.mark.parametrize("path", ["silent", "slow-body", "slow-headers", "endless", "redirect", "html", "deep"])
async def test_a_reading_ends_whatever_the_issuer_answers(issuer: Issuer, path: str) -> None:
    """A byte a second once held callers for a minute: the time was limited for each read of the socket."""
    keys, started = IssuerKeys(issuer.url(path), read_seconds=1.0), time.monotonic()
    with pytest.raises(UnavailableError):
        await keys.find("one")
    assert time.monotonic() - started < 20


async def test_an_issuer_that_hangs_delays_no_key_and_no_token_that_is_known(
    admission: Admission, issuer: Issuer, seconds: list[float], tmp_path: Path
) -> None:
    verifier = verifier_of(issuer.url(), seconds)
    await verifier.verify(token())
    verifier._keys._source, verifier._keys._read_seconds = issuer.url("silent"), 60.0
    issuer.has_request.clear()
    seconds[0] = 61.0
    authenticate = create_authenticator(admission.key_store, "", verifier)
    waiting = [asyncio.create_task(authenticate("/x/Y", token(EC_KEY, f"new-{n}", "ES256"))) for n in range(100)]
    await asyncio.to_thread(issuer.has_request.wait, 20)
    key = admission.key_store.create("tenants/globex", None)[1]
    assert (await authenticate("/x/Y", key)).tenant == "tenants/globex"
    assert (await authenticate("/x/Y", token())).tenant == "tenants/acme"
    assert not any(task.done() for task in waiting)
    issuer.may_end.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {UnavailableError}
    assert issuer.num_requests == 2
