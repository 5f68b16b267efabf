"""Settings that every service shares: its address, its certificate, its limits and its telemetry."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import grpc

from engine.errors import UnavailableError
from muxtune.transport import is_loopback
from services.rpc.call_limits import CallLimits
from services.rpc.certificates import Certificates, ClientTls
from services.settings import SettingsError
from services.telemetry import TelemetrySettings


@dataclass(frozen=True, kw_only=True)
class ServerSettings(TelemetrySettings):
    """Settings of any service. `listen` "host:0" selects a free port; the service writes it to `ready_file`.

    `certs`: folder with this service's tls.crt, tls.key and ca.crt; callers then authenticate by their certificates.
    Without it, and on loopback only, callers authenticate by `mesh_secret`.
    `max_calls`, `max_uploads`, `max_streams`: unary calls, uploads and streams of responses of all tenants that are in
    progress at once. More are refused with RESOURCE_EXHAUSTED, and so is a tenant's next one when it has an eighth of
    those that are still free. `max_internal_calls`: the same, each, of one role of services or operators, which are
    counted apart. `max_unauthenticated_calls`: calls whose keys are being checked, and health checks.
    `max_connection_calls`: calls of one connection that the server accepts at once; more wait at the client.
    `request_seconds`: a message must arrive within that time. `min_upload_bytes_per_second`: the least rate of an
    upload, on average over `request_seconds`. `max_upload_seconds`: the longest that an upload may take.
    `upload_messages_per_second`: messages of up to 128 KiB that all uploads of a tenant may send, or their bytes in
    larger ones; later ones wait.
    `reflection`: serve descriptions of the RPCs to any caller.
    """

    certs: Path | None = None
    mesh_secret: str = dataclasses.field(default="", repr=False)
    reflection: bool = False
    ready_file: Path | None = None
    max_calls: int = CallLimits.max_calls
    max_uploads: int = CallLimits.max_uploads
    max_streams: int = CallLimits.max_streams
    max_internal_calls: int = CallLimits.max_internal_calls
    max_unauthenticated_calls: int = CallLimits.max_unauthenticated_calls
    max_connection_calls: int = 4096
    request_seconds: float = CallLimits.request_seconds
    min_upload_bytes_per_second: float = CallLimits.min_upload_bytes_per_second
    max_upload_seconds: float = CallLimits.max_upload_seconds
    upload_messages_per_second: float = CallLimits.upload_messages_per_second

    def call_limits(self) -> CallLimits:
        return CallLimits(*(getattr(self, field.name) for field in dataclasses.fields(CallLimits)))

    def client_tls(self, peer: str) -> ClientTls | None:
        """Return the TLS identity for calls to the service `peer`; None where the mesh secret authenticates.

        Raises SettingsError if the certificate cannot be read.
        """
        return ClientTls(self._certificates(self.certs), peer) if self.certs else None

    def ports(self) -> list[tuple[str, grpc.ServerCredentials | None]]:
        """Return the (address, credentials) pairs to listen on; the first is the service's own address.

        Raises SettingsError for settings that would accept unauthenticated callers from other machines.
        """
        if bool(self.certs) == bool(self.mesh_secret):
            raise SettingsError(
                "Set either MUXTUNE_CERTS (a folder made by `muxtune certs`) or, on loopback, MUXTUNE_MESH_SECRET."
            )
        if self.certs is None:
            if not is_loopback(self.listen):
                raise SettingsError(
                    f"MUXTUNE_LISTEN: {self.listen} is not a loopback address. Set MUXTUNE_CERTS to listen there."
                )
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
        """Return the ports of a service with certificates: one, which requires a client certificate."""
        return [(self.listen, certificates.for_server(is_mutual=True))]
