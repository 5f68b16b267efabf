"""Whether a service is healthy: `python -m services.rpc.health HOST:PORT SERVICE`, exit status 0 or 1, for containers.
One more argument asks for one of its gRPC services: muxtune.v1.LedgerService says which admission keeps the ledger.

With the certificate in MUXTUNE_CERTS; in plain text where that is not set.
"""

import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.rpc.certificates import Certificates, ClientTls

_SECONDS = 2.0


def is_serving(address: str, trust: ClientTls | None = None, of: str = "") -> bool:
    """`of`: of one gRPC service there; else of all. By grpc.health.v1, which wants no key."""
    secure = trust and grpc.secure_channel(address, trust.credentials(), trust.options())
    with secure or grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=of), timeout=_SECONDS)  # type: ignore[attr-defined]
        except grpc.RpcError as error:
            print(f"{address}: {error.code().name}", file=sys.stderr)
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    certs = os.environ.get("MUXTUNE_CERTS")
    proof = ClientTls(Certificates(Path(certs)), sys.argv[2]) if certs else None
    sys.exit(not is_serving(sys.argv[1], proof, *sys.argv[3:4]))
