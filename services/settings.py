"""Settings of a service: one frozen class each, built once in its `__main__.py`, every field from the environment."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from engine.errors import UnavailableError
from muxtune.transport import is_loopback
from services.rpc.certificates import Certificates, Trust

PREFIX = "MUXTUNE_"
T = typing.TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What every service needs. `listen` "host:0" takes a free port, which `ready_file` then tells.

    `stop_with_parent`: as SIGTERM does, when the process that started this one is gone: no orphans of `muxtune up`.
    More calls than `max_calls` at once, or streams than `max_streams`, are refused: RESOURCE_EXHAUSTED, later again.
    `certs`: folder with this service's tls.crt, tls.key and ca.crt: peers prove themselves by theirs. Without, on
    loopback only, callers prove themselves by `mesh_secret`. `reflection` describes the RPCs to whoever asks.
    """

    certs: Path | None = None
    mesh_secret: str = dataclasses.field(default="", repr=False)
    listen: str = "127.0.0.1:0"
    reflection: bool = False
    ready_file: Path | None = None
    otlp_endpoint: str | None = None
    trace_file: Path | None = None
    prometheus_port: int | None = None
    log_level: str = "INFO"
    stop_with_parent: bool = False
    max_calls: int = 256
    max_streams: int = 1024

    def trust(self, peer: str) -> Trust | None:
        """How a channel to that service proves itself; None where the mesh secret does. Exits without a certificate."""
        return Trust(self._certificates(self.certs), peer) if self.certs else None

    def ports(self) -> list[tuple[str, grpc.ServerCredentials | None]]:
        """Where to listen, and with what; the first is the service's address. Exits where that would be open to all."""
        if bool(self.certs) == bool(self.mesh_secret):
            raise SettingsError("set MUXTUNE_CERTS (a folder of `muxtune certs`), or MUXTUNE_MESH_SECRET on loopback")
        if self.certs is None:
            if not is_loopback(self.listen):
                raise SettingsError(f"MUXTUNE_LISTEN: {self.listen} is no loopback address: that takes MUXTUNE_CERTS")
            return [(self.listen, None)]
        return self.secure_ports(self._certificates(self.certs))

    @staticmethod
    def _certificates(folder: Path) -> Certificates:
        try:
            Certificates(folder).read()
        except UnavailableError as error:
            raise SettingsError(f"MUXTUNE_CERTS: {error}") from error
        return Certificates(folder)

    def secure_ports(self, certificates: Certificates) -> list[tuple[str, grpc.ServerCredentials | None]]:
        return [(self.listen, certificates.for_server(is_mutual=True))]


class SettingsError(SystemExit):
    """A setting is missing or does not read; exits with a sentence that names it."""


def from_environment(cls: type[T], environ: Mapping[str, str]) -> T:
    """`field` comes from `MUXTUNE_FIELD`; an empty value counts as unset. Exits, naming all that is wrong."""
    hints = typing.get_type_hints(cls)
    values, wrong = {}, []
    for spec in dataclasses.fields(cls):  # type: ignore[arg-type]
        name = PREFIX + spec.name.upper()
        text = environ.get(name, "")
        if text:
            try:
                values[spec.name] = _read(hints[spec.name], text)
            except ValueError as error:
                wrong.append(f"{name}: {error}")
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            wrong.append(f"{name} is not set")
    if wrong:
        raise SettingsError(f"{cls.__name__}: " + "; ".join(wrong))
    return cls(**values)


def environment_of(settings: Any) -> dict[str, str]:
    """The inverse: variables from which `from_environment` builds an equal object."""
    pairs = ((f.name, getattr(settings, f.name)) for f in dataclasses.fields(settings))
    return {PREFIX + name.upper(): str(value) for name, value in pairs if value is not None}


def _read(hint: Any, text: str) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f'"{text}" is neither true nor false')
        return text.lower() in ("true", "1")
    return hint(text)
