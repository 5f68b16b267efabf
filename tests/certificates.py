"""One private CA for the whole test run, as `muxtune certs` makes it."""

import tempfile
from functools import cache
from pathlib import Path

from muxtune.local.certificate_authority import issue
from services.rpc.certificates import Certificates, ClientTls

_FOLDER = tempfile.TemporaryDirectory(prefix="muxtune-test-ca-")


@cache
def ca_folder() -> Path:
    folder = Path(_FOLDER.name) / "ca"
    issue(folder)
    return folder


def certificates(name: str) -> Certificates:
    """Return the certificates of a service; "execution" is executors/local."""
    return Certificates(ca_folder() / ("executors/local" if name == "execution" else name))


def trust(name: str, peer: str) -> ClientTls:
    """Return the TLS settings with which `name` connects to `peer`."""
    return ClientTls(certificates(name), peer)
