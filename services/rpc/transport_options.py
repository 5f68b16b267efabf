"""gRPC options of the mesh's servers and channels: message size, keep-alive, retries, load balancing.

Both ends are set together: a server ends a connection with GOAWAY if its client pings more often than it allows.
"""

import json
from typing import Any

from muxtune.v1 import admission_pb2, alignment_pb2, execution_pb2, ledger_pb2

MAX_MESSAGE_BYTES = 16 << 20
SERVER_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second server on this port must fail, not share it silently
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Bytes of a stream that gRPC holds before they are read. By default they grow with the client's bandwidth: eight
    # uploads of 200 MiB held 500 MiB (measured on loopback, grpcio 1.85).
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 20),
    # Bytes that are read of a connection before they are parsed. By default gRPC reads as fast as they come: 4 callers
    # without a key who sent frames of any kind, such as SETTINGS, took 600 MB.
    ("grpc.experimental.tcp_max_read_buffer_size", 64 << 10),
    # Calls that gRPC has received and the service has not yet: refused above the second number, at random above the
    # first. By default (1,000 and 3,000) a client that opens many calls at once had its neighbours' calls cancelled.
    ("grpc.server.max_pending_requests", 8192),
    ("grpc.server.max_pending_requests_hard_limit", 8192),
    # Allow the pings that channels send every 10 or 30 s, also on idle connections. The server pings too, so that a
    # stream whose client vanished ends soon and not after gRPC's default of two hours.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 2),  # a connection that pings more often ends
]
_RETRY_POLICY = {
    "maxAttempts": 5,
    "initialBackoff": "0.1s",  # gRPC adds a jitter of a fifth
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],  # gRPC itself answers CANCELLED while a server closes
}


def service_config(health_service: str = "") -> str:
    """Return gRPC's service config: retries for unary calls, none for streams, calls spread over replicas.

    The callers of streams open them again themselves: gRPC cannot repeat a client's stream, and a server's stream that
    it repeats sometimes hangs for good when the server is killed (grpcio 1.85; tests/test_mesh_kills.py).
    With `health_service`, calls go only to replicas that report this service as SERVING.
    """
    modules = (admission_pb2, alignment_pb2, execution_pb2, ledger_pb2)
    services = (s for m in modules for s in m.DESCRIPTOR.services_by_name.values())
    streams = [
        {"service": service.full_name, "method": method.name}
        for service in services
        for method in service.methods
        if method.client_streaming or method.server_streaming
    ]
    config: dict[str, Any] = {
        "methodConfig": [{"name": [{}], "retryPolicy": _RETRY_POLICY}, {"name": streams}],
        "loadBalancingConfig": [{"round_robin": {}}],
    }
    return json.dumps(config | ({"healthCheckConfig": {"serviceName": health_service}} if health_service else {}))


def channel_options(health_service: str = "") -> list[tuple[str, Any]]:
    return [
        ("grpc.service_config", service_config(health_service)),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # Shorter where health decides: a replica whose process is paused sends no change of its health.
        ("grpc.keepalive_time_ms", 10_000 if health_service else 30_000),
        ("grpc.keepalive_timeout_ms", 5_000 if health_service else 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),  # by default gRPC stops after two pings on an idle stream
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.dns_min_time_between_resolutions_ms", 2_000),  # replicas start and stop
        ("grpc.use_local_subchannel_pool", 1),
    ]
