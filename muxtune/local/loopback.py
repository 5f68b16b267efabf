"""Addresses of services on loopback: free ports, and an environment in which no HTTP proxy carries this traffic."""

import itertools
import random
import socket
from collections.abc import Iterable, Mapping
from contextlib import ExitStack

from muxtune.local.errors import MeshError

_HOSTS = ("127.0.0.1", "::1")
# Below the ports of outgoing connections (Linux from 32768, macOS from 49152 on): such a connection could take a
# service's port between this choice and the service's start, or while it is down.
_PORTS = range(10_240, 32_768)


def free_addresses(endpoints: Iterable[str], last: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an address on loopback for each endpoint: its last one if that is free. Raises MeshError."""
    host = _loopback_host()
    shuffled = iter(random.SystemRandom().sample(_PORTS, len(_PORTS)))
    addresses = {}
    with ExitStack() as sockets:  # open until the end, so that no two endpoints get one port
        for endpoint in endpoints:
            last_address = (last or {}).get(endpoint)
            candidates = itertools.chain(
                [last_address] if last_address else [], (f"{host}:{port}" for port in shuffled)
            )
            address = next((address for address in candidates if _bind(address, sockets)), None)
            if address is None:
                raise MeshError(f"No port of {host} from {_PORTS[0]} to {_PORTS[-1]} is free: close other programs")
            addresses[endpoint] = address
    return addresses


def without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with loopback added to the hosts that are reached without an HTTP proxy."""
    excluded = [environment.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    hosts = ",".join(filter(None, [*dict.fromkeys(excluded), "localhost", *_HOSTS]))
    return {**environment, "no_proxy": hosts, "NO_PROXY": hosts}


def _loopback_host() -> str:
    """Return the host part of addresses on loopback: IPv4's if this machine has it. Raises MeshError."""
    for host in _HOSTS:
        bracketed = f"[{host}]" if ":" in host else host
        with ExitStack() as sockets:
            if _bind(f"{bracketed}:0", sockets):
                return bracketed
    raise MeshError(f"This machine has no loopback address, neither {' nor '.join(_HOSTS)}: set up the interface `lo`")


def _bind(address: str, sockets: ExitStack) -> bool:
    """Bind the address until `sockets` closes. Returns whether it was free."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        probe = socket.socket(family)
    except OSError:  # the kernel has no such family
        return False
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((host.strip("[]"), int(port)))
    except OSError:
        probe.close()
        return False
    sockets.enter_context(probe)
    return True
