"""Issues certificates of services, executors and the operator from a mesh's private CA, in a folder each.

An executor's certificate names it: it is valid for "execution" and "NAME.execution". Only its holder may register under
that name, and scheduling accepts no other server at that executor's address.
"""

import datetime
import ipaddress
import os
import re
import ssl
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from muxtune.errors import InvalidInputError
from muxtune.resource_names import executor_host

NAMES = ("admission", "scheduling", "alignment", "operator")
EXECUTORS, DEFAULT_EXECUTOR = "executors", "local"  # the default of MUXTUNE_EXECUTOR_NAME
CERTIFICATE, KEY, CA, CA_KEY = "tls.crt", "tls.key", "ca.crt", "ca.key"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
DAYS, _CA_DAYS, _RENEW_DAYS = 90, 3650, 30
_BACKDATED = datetime.timedelta(minutes=5)  # as clocks differ
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # of a DNS name, RFC 1123


def issue(
    folder: Path, hosts: Sequence[str] = LOOPBACK, days: float = DAYS, executors: Sequence[str] = ()
) -> list[Path]:
    """Issue a new certificate for each service, executor and the operator. Returns their folders.

    Each folder gets tls.key, tls.crt and ca.crt; a file is written whole or not at all. The CA is created if there is
    none. Executors that have a folder get a new certificate, too; without any, DEFAULT_EXECUTOR gets one. Raises
    InvalidInputError for a name that an executor cannot have, and for a CA without its key.
    """
    for name in executors:
        if not _LABEL.fullmatch(name):
            raise InvalidInputError(
                f'executor "{name}": use lower-case letters, digits, and hyphens between them, at most 63'
            )
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    authority, folders = _authority(folder), []
    for name in NAMES:
        alternatives = (name, *hosts) if name == "admission" else (name,)
        folders.append(_issue_one(folder, folder / name, name, alternatives, days, authority))
    for name in sorted({*executors, *_executors(folder)}) or [DEFAULT_EXECUTOR]:
        alternatives = ("execution", executor_host(name))
        folders.append(_issue_one(folder, folder / EXECUTORS / name, "execution", alternatives, days, authority))
    return folders


def issue_where_due(folder: Path) -> None:
    """Issue certificates if one is missing or expires within a month; `muxtune up` calls this at its start.

    Raises InvalidInputError for a file that cannot be used.
    """
    names = (*NAMES, f"{EXECUTORS}/{DEFAULT_EXECUTOR}")
    if not (folder / CA).exists() or any(_is_due(folder / name) for name in names):
        issue(folder, executors=[DEFAULT_EXECUTOR])
    else:
        _authority(folder)  # clients have this CA


def _is_due(folder: Path) -> bool:
    """Return whether a folder's certificate is missing or expires soon. Raises InvalidInputError if it is damaged."""
    if not all((folder / name).exists() for name in (CERTIFICATE, KEY, CA)):
        return True
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(folder / CERTIFICATE, folder / KEY, password="")
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(folder / CA)
        expires = x509.load_pem_x509_certificate((folder / CERTIFICATE).read_bytes()).not_valid_after_utc
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{folder}: {CERTIFICATE}, {KEY} or {CA} is damaged ({error}): delete the folder, and `muxtune up` "
            "issues a new certificate"
        ) from error
    return expires < datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=_RENEW_DAYS)


def _executors(folder: Path) -> list[str]:
    """Return the names of executors that have a folder."""
    return [path.name for path in (folder / EXECUTORS).glob("*") if _LABEL.fullmatch(path.name)]


def _issue_one(
    folder: Path,
    dest: Path,
    role: str,
    alternatives: Sequence[str],
    days: float,
    authority: tuple[ec.EllipticCurvePrivateKey, x509.Certificate],
) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _signed(role, key, authority, days, alternatives)
    dest.parent.mkdir(mode=0o700, exist_ok=True)
    dest.mkdir(mode=0o700, exist_ok=True)
    _write(dest / KEY, _pem(key))
    _write(dest / CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))
    _write(dest / CA, (folder / CA).read_bytes())
    return dest


def _authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Return the CA's key and certificate; create them if both are missing.

    Raises InvalidInputError if one is missing, or a file is damaged.
    """
    if (folder / CA).exists() != (folder / CA_KEY).exists():
        raise InvalidInputError(
            f"{folder} has only one of {CA} and {CA_KEY}: restore the other, or choose another folder"
        )
    if not (folder / CA_KEY).exists():
        key = ec.generate_private_key(ec.SECP256R1())
        _write(folder / CA_KEY, _pem(key))
        _write(folder / CA, _self_signed(key).public_bytes(serialization.Encoding.PEM))
    try:
        loaded = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((folder / CA).read_bytes())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidInputError(
            f"{folder}: {CA} or {CA_KEY} is damaged ({error}): restore it, or delete {folder} for a new CA, whose {CA} "
            "all clients need"
        ) from error
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise InvalidInputError(f"{folder / CA_KEY} is not an elliptic-curve key: choose another folder")
    if loaded.public_key() != certificate.public_key():
        raise InvalidInputError(f"{folder}: {CA_KEY} is not the key of {CA}: restore the one that belongs to the other")
    return loaded, certificate


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = _named("muxtune private CA")
    return (
        _builder(name, name, key, key, _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(is_ca=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def _signed(
    role: str,
    key: ec.EllipticCurvePrivateKey,
    authority: tuple[ec.EllipticCurvePrivateKey, x509.Certificate],
    days: float,
    alternatives: Sequence[str],
) -> x509.Certificate:
    """Return a certificate: its common name is the caller's role, its DNS names are the server's.

    The operator's certificate is not valid for a server.
    """
    ca_key, ca = authority
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH] + ([] if role == "operator" else [ExtendedKeyUsageOID.SERVER_AUTH])
    return (
        _builder(_named(role), ca.subject, key, ca_key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(is_ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectAlternativeName(list(map(_alternative, alternatives))), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    days: float,
) -> x509.CertificateBuilder:
    """Return a builder with the fields that RFC 5280 requires of every certificate."""
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(authority, critical=False)
    )


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca, key_cert_sign=is_ca, crl_sign=is_ca, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, readable by its owner only."""
    number, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-")  # mode 0600
    with os.fdopen(number, "wb") as file:
        file.write(data)
    Path(partial).replace(path)
