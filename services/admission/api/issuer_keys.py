"""Published keys of a token issuer (JWKS, RFC 7517), read from a file or a URL by one reader for all callers."""

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jwt

from engine.errors import UnavailableError
from muxtune.transport import url_proxy_options
from services.backoff import Backoff
from services.concurrency.threads import Threads

_REFRESH_SECONDS, _RETRY_SECONDS, _MAX_RETRY_SECONDS = 60.0, 1.0, 10.0
_MAX_BYTES = 1 << 20
_log = logging.getLogger(__name__)


class IssuerKeys:
    """Keys by their id. They are read for the first token, and again for an unknown id.

    The next reading is a minute after one that succeeded, and 1, 2, 4, 8, then every 10 s after those that failed,
    however many tokens come. Each ends after `read_seconds`.
    """

    def __init__(self, source: str, monotonic: Callable[[], float] = time.monotonic, read_seconds: float = 5.0) -> None:
        self._source, self._monotonic, self._read_seconds = source, monotonic, read_seconds
        self._keys: dict[str, jwt.PyJWK] = {}
        self._was_read = False  # the last time
        self._next_reading = float("-inf")
        self._reading: asyncio.Task[None] | None = None
        self._backoff = Backoff(_RETRY_SECONDS, _MAX_RETRY_SECONDS)
        self._threads = Threads("issuer keys", 1)

    async def find(self, key_id: str) -> jwt.PyJWK | None:
        """Return the key, or None if the issuer has none of this id. Raises UnavailableError if that is not known,
        because the last reading failed."""
        if key_id not in self._keys:
            if self._reading is None and self._monotonic() >= self._next_reading:
                self._reading = asyncio.create_task(self._read(), name="issuer keys")
            if self._reading is not None:
                await asyncio.shield(self._reading)
            if not self._was_read and key_id not in self._keys:
                raise UnavailableError("the issuer's keys cannot be read now: try again")
        return self._keys.get(key_id)

    async def _read(self) -> None:
        try:
            self._keys = await self._threads.run(_read_keys, self._source, self._read_seconds)
            self._was_read, seconds = True, _REFRESH_SECONDS
            self._backoff.reset()
        except (OSError, ValueError, RecursionError, jwt.PyJWTError) as error:
            self._was_read, seconds = False, self._backoff.next_seconds()
            _log.warning("MUXTUNE_OIDC_KEYS %s cannot be read, again in %g s: %s", self._source, seconds, error)
        self._next_reading = self._monotonic() + seconds
        self._reading = None


def _read_keys(source: str, seconds: float) -> dict[str, jwt.PyJWK]:
    """Return the signature keys of known kinds. Raises OSError, ValueError, RecursionError or PyJWTError."""
    data = _download(source, seconds) if source.startswith(("https://", "http://")) else Path(source).read_bytes()
    keys = jwt.PyJWKSet.from_dict(json.loads(data)).keys
    return {key.key_id: key for key in keys if key.key_id and key.public_key_use in (None, "sig")}


def _download(url: str, seconds: float) -> bytes:
    command = [sys.executable, "-m", "services.admission.api.download", url, str(seconds), str(_MAX_BYTES)]
    environment = {**os.environ, "no_proxy": "*"} if url_proxy_options(url) else None
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, env=environment)
    if done.returncode < 0:
        raise TimeoutError(f"the answer takes longer than {seconds:g} s")
    if done.returncode:
        raise OSError(done.stderr.decode(errors="replace").strip().rpartition("\n")[2])
    return done.stdout
