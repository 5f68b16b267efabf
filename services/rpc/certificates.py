"""A certificate of the mesh's private CA as gRPC's credentials. Files may be replaced while the service runs: a server
reads them at each handshake, a channel dials anew (services/rpc/client_channel.py). `muxtune certs` makes them."""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc

from engine.errors import UnavailableError

Channel = TypeVar("Channel")
CERTIFICATE, KEY, CA = "tls.crt", "tls.key", "ca.crt"  # as a Kubernetes TLS secret names them


@dataclass(frozen=True)
class Certificates:
    """A folder with tls.crt, tls.key and ca.crt."""

    folder: Path

    def version(self) -> tuple[int, ...]:
        """Another one when a file was replaced. Raises UnavailableError where one is missing."""
        try:
            stats = [(self.folder / name).stat() for name in (CERTIFICATE, KEY, CA)]
        except OSError as error:
            raise UnavailableError(f"{error.filename}: no certificate there: run `muxtune certs`") from error
        return tuple(number for stat in stats for number in (stat.st_mtime_ns, stat.st_ino, stat.st_size))

    def read(self) -> tuple[bytes, bytes, bytes]:
        """(key, chain, roots) in PEM. Raises UnavailableError where they are no pair: one is just being replaced."""
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.folder / CERTIFICATE, self.folder / KEY)
            key, chain, roots = ((self.folder / name).read_bytes() for name in (KEY, CERTIFICATE, CA))
        except (OSError, ssl.SSLError) as error:
            raise UnavailableError(f"{self.folder}: no certificate with its key: {error}") from error
        return key, chain, roots

    def for_server(self, *, is_mutual: bool) -> grpc.ServerCredentials:
        """`is_mutual`: only peers with a certificate of the same CA get in; others are not asked for one."""
        served: list[tuple[int, ...]] = []

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            try:
                version = self.version()
                if version in served:
                    return None  # as it is
                key, chain, roots = self.read()
            except UnavailableError:
                if served:
                    return None
                raise
            served[:] = [version]
            return grpc.ssl_server_certificate_configuration([(key, chain)], roots if is_mutual else None)

        first: Any = fetch()
        unchanged_is_none: Any = fetch  # which grpc's stubs do not know
        return grpc.dynamic_ssl_server_credentials(first, unchanged_is_none, is_mutual)


@dataclass(frozen=True)
class ClientTls:
    """What a channel shows, and whom it expects: the peer's certificate must name the service, wherever it answers."""

    certificates: Certificates
    peer: str

    def options(self) -> list[tuple[str, str]]:
        return [("grpc.ssl_target_name_override", self.peer)]

    def credentials(self) -> grpc.ChannelCredentials:
        key, chain, roots = self.certificates.read()
        return grpc.ssl_channel_credentials(roots, key, chain)


class RotatingChannel(Generic[Channel]):  # Python 3.11 has no other way
    """The newest channel: another one once the certificates were replaced. Calls under way stay on theirs; the channel
    before is closed when the next follows."""

    def __init__(self, dial: Callable[[], Channel], trust: ClientTls | None) -> None:
        self._dial, self._trust = dial, trust
        self._version = trust.certificates.version() if trust else ()
        self.channel = dial()
        self.previous: Channel | None = None

    def renew(self) -> Channel | None:
        """Dials where the certificates changed: the channel to be closed then, if there is one.

        Where the files are no certificate just now, the channel there is stays.
        """
        try:
            if self._trust is None or (version := self._trust.certificates.version()) == self._version:
                return None
            fresh = self._dial()
        except UnavailableError:
            return None
        outdated, self.previous, self.channel, self._version = self.previous, self.channel, fresh, version
        return outdated
