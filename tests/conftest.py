"""Settings of the whole test run: threads, the number of hypothesis's examples, and fast retries of clients."""

import copy
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: pytest's workers are the ones to share cores

import pytest
from hypothesis import settings

settings.register_profile("thorough", deadline=None)  # `make test-all`; see tests/thoroughness.py
settings.register_profile("default", deadline=None)


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make clients retry as often as by default, but milliseconds apart."""
    from muxtune import aio, client, transport  # the engine's tests run where gRPC is not installed

    policy = copy.deepcopy(transport._RETRY_POLICY)
    policy["methodConfig"][0]["retryPolicy"] |= {"initialBackoff": "0.01s", "maxBackoff": "0.01s"}  # type: ignore[index]
    monkeypatch.setattr(transport, "_OPTIONS", [("grpc.service_config", json.dumps(policy)), *transport._OPTIONS[1:]])
    backoffs = [None if seconds is None else 0.01 for seconds in transport.STREAM_BACKOFFS_SECONDS]
    for module in (transport, client, aio):
        monkeypatch.setattr(module, "STREAM_BACKOFFS_SECONDS", tuple(backoffs))
