"""TLS certificates of the mesh's private CA as gRPC credentials; `muxtune certs` makes the files.

The files may be replaced while a service runs: a server reads them at each handshake, a channel connects again.
"""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc

from engine.errors import UnavailableError

Channel = TypeVar("Channel")
CERTIFICATE, KEY, CA = "tls.crt", "tls.key", "ca.crt"  # the names in a Kubernetes TLS secret


@dataclass(frozen=True)
class Certificates:
    """A folder with tls.crt, tls.key and ca.crt."""

    folder: Path

    def version(self) -> tuple[int, ...]:
        """Return a value that changes when a file is replaced. Raises UnavailableError if a file is missing."""
        try:
            stats = [(self.folder / name).stat() for name in (CERTIFICATE, KEY, CA)]
        except OSError as error:
            raise UnavailableError(
                f"The certificate file {error.filename} is missing. Make it with `muxtune certs`."
            ) from error
        return tuple(number for stat in stats for number in (stat.st_mtime_ns, stat.st_ino, stat.st_size))

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Return (key, chain, roots) in PEM.

        Raises UnavailableError if key and certificate do not match, as during a replacement.
        """
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.folder / CERTIFICATE, self.folder / KEY)
            key, chain, roots = ((self.folder / name).read_bytes() for name in (KEY, CERTIFICATE, CA))
        except (OSError, ssl.SSLError) as error:
            raise UnavailableError(f"{self.folder} has no certificate with a matching key: {error}") from error
        return key, chain, roots

    def for_server(self, *, is_mutual: bool) -> grpc.ServerCredentials:
        """Return server credentials. `is_mutual`: clients must show a certificate of the same CA."""
        served: list[tuple[int, ...]] = []

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            try:
                version = self.version()
                if version in served:
                    return None  # unchanged
                key, chain, roots = self.read()
            except UnavailableError:
                if served:
                    return None
                raise
            served[:] = [version]
            return grpc.ssl_server_certificate_configuration([(key, chain)], roots if is_mutual else None)

        first: Any = fetch()
        may_return_none: Any = fetch  # None keeps the certificate; grpc's type stubs do not know that
        return grpc.dynamic_ssl_server_credentials(first, may_return_none, is_mutual)


@dataclass(frozen=True)
class ClientTls:
    """TLS of a client channel: its own certificate, and the service that the peer's certificate must name."""

    certificates: Certificates
    peer: str

    def channel_options(self) -> list[tuple[str, str]]:
        return [("grpc.ssl_target_name_override", self.peer)]

    def credentials(self) -> grpc.ChannelCredentials:
        key, chain, roots = self.certificates.read()
        return grpc.ssl_channel_credentials(roots, key, chain)


class RotatingChannel(Generic[Channel]):  # Python 3.11 has no other way
    """A channel that is replaced when the certificates are.

    Running calls stay on the channel they began on; a replaced channel is closed at the next replacement.
    """

    def __init__(self, connect: Callable[[], Channel], tls: ClientTls | None) -> None:
        self._connect, self._tls = connect, tls
        self._version = tls.certificates.version() if tls else ()
        self.channel = connect()
        self.previous: Channel | None = None

    def renew(self) -> Channel | None:
        """Connect again if the certificates changed, and return the channel to close, if any.

        The present channel stays while the files are not a valid certificate.
        """
        try:
            if self._tls is None or (version := self._tls.certificates.version()) == self._version:
                return None
            fresh = self._connect()
        except UnavailableError:
            return None
        outdated, self.previous, self.channel, self._version = self.previous, self.channel, fresh, version
        return outdated
