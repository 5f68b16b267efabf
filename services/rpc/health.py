"""Health check for containers: `python -m services.rpc.health HOST:PORT SERVICE [GRPC_SERVICE]` exits with 0 or 1.

GRPC_SERVICE checks one gRPC service: muxtune.v1.LedgerService is healthy on the admission that leads the ledger.
Uses the certificate in MUXTUNE_CERTS; plain text if that is not set.
"""

import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxtune.transport import proxy_options
from services.rpc.certificates import Certificates, ClientTls

_SECONDS = 2.0


def is_serving(address: str, tls: ClientTls | None = None, grpc_service: str = "") -> bool:
    """Return whether the server, or one gRPC service on it, reports SERVING by grpc.health.v1 (which needs no key)."""
    options = proxy_options(address)
    secure = tls and grpc.secure_channel(address, tls.credentials(), [*options, *tls.channel_options()])
    with secure or grpc.insecure_channel(address, options) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=grpc_service), timeout=_SECONDS)  # type: ignore[attr-defined]
        except grpc.RpcError as error:
            print(f"{address}: {error.code().name}", file=sys.stderr)
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    certs = os.environ.get("MUXTUNE_CERTS")
    client_tls = ClientTls(Certificates(Path(certs)), sys.argv[2]) if certs else None
    sys.exit(not is_serving(sys.argv[1], client_tls, *sys.argv[3:4]))
