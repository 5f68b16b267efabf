"""Settings are read from the environment; an error names every missing or invalid variable."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from services.rpc.server_settings import ServerSettings
from services.settings import SettingsError, environment_of, from_environment


@dataclass(frozen=True, kw_only=True)
class Settings(ServerSettings):
    database_url: str
    lease_seconds: float = 15.0
    is_fast: bool = False
    max_bytes: int | None = None


REQUIRED = {"MUXTUNE_MESH_SECRET": "mesh_s", "MUXTUNE_DATABASE_URL": "sqlite:///x"}


def test_defaults() -> None:
    settings = from_environment(Settings, REQUIRED)
    assert settings == Settings(mesh_secret="mesh_s", database_url="sqlite:///x")
    assert settings.ready_file is None and settings.lease_seconds == 15.0


def test_every_type_reads() -> None:
    variables = {
        "MUXTUNE_READY_FILE": "/tmp/ready.json",
        "MUXTUNE_LEASE_SECONDS": "2.5",
        "MUXTUNE_IS_FAST": "true",
        "MUXTUNE_MAX_BYTES": "1024",
        "MUXTUNE_PROMETHEUS_PORT": "",
        "UNRELATED": "x",
    }
    settings = from_environment(Settings, {**REQUIRED, **variables})
    assert settings.ready_file == Path("/tmp/ready.json")
    assert (settings.lease_seconds, settings.is_fast, settings.max_bytes) == (2.5, True, 1024)
    assert settings.prometheus_port is None


def test_all_invalid_variables_are_named() -> None:
    invalid = {"MUXTUNE_MESH_SECRET": "s", "MUXTUNE_LEASE_SECONDS": "soon", "MUXTUNE_IS_FAST": "maybe"}
    with pytest.raises(SettingsError) as caught:
        from_environment(Settings, invalid)
    for part in ("MUXTUNE_DATABASE_URL is not set", "MUXTUNE_LEASE_SECONDS", "soon", "MUXTUNE_IS_FAST", "maybe"):
        assert part in str(caught.value)


def test_a_child_process_gets_equal_settings() -> None:
    settings = Settings(mesh_secret="m", database_url="d", is_fast=True, max_bytes=7, trace_file=Path("/x"))
    assert from_environment(Settings, environment_of(settings)) == settings


def test_the_secret_is_not_shown() -> None:
    assert "mesh_s" not in repr(from_environment(Settings, REQUIRED))
