"""An HTTP proxy that serves nobody: it counts who connects, and closes the connection."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
_EXCEPTIONS = ("no_proxy", "no_grpc_proxy")


class CountingProxy:
    """Listens on loopback until it is closed."""

    def __init__(self) -> None:
        self.num_connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._count, daemon=True)
        self._thread.start()

    def _count(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            connection.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@contextmanager
def counting_proxy() -> Iterator[CountingProxy]:
    """Set all variables of the environment that name a proxy, and none that excepts a host."""
    proxy = CountingProxy()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in _VARIABLES:
                patch.setenv(name, proxy.url)
                patch.setenv(name.upper(), proxy.url)
            for name in _EXCEPTIONS:
                patch.delenv(name, raising=False)
                patch.delenv(name.upper(), raising=False)
            yield proxy
    finally:
        proxy.close()
