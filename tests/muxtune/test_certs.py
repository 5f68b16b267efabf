"""`muxtune certs` issues certificates that independent verifiers accept for their role and for nothing else."""

import datetime
import os
import ssl
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from typer.testing import CliRunner

from muxtune.cli.main import app
from muxtune.local.certificate_authority import NAMES, issue, issue_where_due

FOLDERS = {**{name: name for name in NAMES}, "executors/local": "execution"}  # and whose certificate is in it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    certs = tmp_path_factory.mktemp("certs") / "made by it"
    done = CliRunner().invoke(app, ["certs", str(certs), "--host", "muxtune.example.com", "--host", "192.0.2.7"])
    assert done.exit_code == 0, done.output
    assert all(str(certs / name) in done.output for name in FOLDERS)
    return certs


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def roots(folder: Path) -> Store:
    return Store([load(folder / "ca.crt")])


@pytest.mark.parametrize("name", FOLDERS)
def test_each_certificate_is_valid_for_its_role_only(folder: Path, name: str) -> None:
    certificate, role = load(folder / name / "tls.crt"), FOLDERS[name]
    client = PolicyBuilder().store(roots(folder)).build_client_verifier().verify(certificate, [])
    assert client.subjects is not None and x509.DNSName(role) in client.subjects
    uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert (ExtendedKeyUsageOID.SERVER_AUTH in uses) == (name != "operator")
    for other in (*FOLDERS.values(), "local.execution", "other.execution"):
        verifier = PolicyBuilder().store(roots(folder)).build_server_verifier(x509.DNSName(other))
        if other == role != "operator" or (role, other) == ("execution", "local.execution"):
            verifier.verify(certificate, [])
        else:
            with pytest.raises(VerificationError):
                verifier.verify(certificate, [])


def test_each_executor_has_a_certificate_of_its_own_name(tmp_path: Path) -> None:
    issue(tmp_path, executors=["gpu-0", "gpu-1"])
    first = {path.name: load(path / "tls.crt") for path in (tmp_path / "executors").iterdir()}
    assert set(first) == {"gpu-0", "gpu-1"}
    done = CliRunner().invoke(app, ["certs", str(tmp_path), "--executor", "gpu-2"])
    assert done.exit_code == 0, done.output
    for name in ("gpu-0", "gpu-1", "gpu-2"):
        folder = tmp_path / "executors" / name
        certificate = load(folder / "tls.crt")
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["execution", f"{name}.execution"]
        assert name not in first or certificate.serial_number != first[name].serial_number  # renewed with the others
        assert str(folder) in done.output


@pytest.mark.parametrize("name", ["", "Local", "a.b", "a/b", "..", "-a", "a-", "a" * 64, "ä", "*", "a\n"])
def test_an_invalid_executor_name_gets_no_certificate(tmp_path: Path, name: str) -> None:
    done = CliRunner().invoke(app, ["certs", str(tmp_path / "made"), "--executor", name])
    assert done.exit_code == 1 and f'executor "{name}": use lower-case letters' in done.output
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "muxtune.example.com", "192.0.2.7"])
def test_openssl_finds_the_hosts_in_admissions_and_in_no_other(folder: Path, host: str) -> None:
    kind = "-verify_ip" if host[-1].isdigit() else "-verify_hostname"
    for name in FOLDERS:
        command = ["openssl", "verify", "-CAfile", folder / "ca.crt", kind, host, folder / name / "tls.crt"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == (name == "admission"), done.stderr


def test_keys_fit_and_are_their_owners_alone(folder: Path) -> None:
    for name in FOLDERS:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(folder / name / "tls.crt", folder / name / "tls.key")
    for path in (*folder.rglob("*.key"), *folder.rglob("*.crt")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys = {path.read_bytes() for path in folder.rglob("*.key")}
    assert len(keys) == len(FOLDERS) + 1
    assert not list(folder.rglob(".partial-*"))


def test_another_run_renews_under_the_same_ca(tmp_path: Path) -> None:
    issue(tmp_path)
    ca, first = (tmp_path / "ca.crt").read_bytes(), load(tmp_path / "executors" / "local" / "tls.crt")
    issue(tmp_path, days=5)
    second = load(tmp_path / "executors" / "local" / "tls.crt")
    assert (tmp_path / "ca.crt").read_bytes() == ca == (tmp_path / "executors" / "local" / "ca.crt").read_bytes()
    assert second.serial_number != first.serial_number
    left = second.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=4) < left <= datetime.timedelta(days=5)


def test_a_start_renews_what_ends_soon_and_nothing_else(tmp_path: Path) -> None:
    issue_where_due(tmp_path)
    certificates = {path: path.read_bytes() for path in tmp_path.rglob("tls.crt")}
    assert len(certificates) == len(FOLDERS)
    issue_where_due(tmp_path)
    assert certificates == {path: path.read_bytes() for path in certificates}
    issue(tmp_path, days=29)
    issue_where_due(tmp_path)
    assert len({load(path).serial_number for path in certificates}) == len(certificates)
    for path in certificates:
        left = load(path).not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        assert left > datetime.timedelta(days=80)


@pytest.mark.parametrize("missing", ["ca.crt", "ca.key"])
def test_half_a_ca_is_refused_and_not_replaced(tmp_path: Path, missing: str) -> None:
    issue(tmp_path)
    os.remove(tmp_path / missing)
    done = CliRunner().invoke(app, ["certs", str(tmp_path)])
    assert done.exit_code == 1 and missing in done.output
    assert not (tmp_path / missing).exists()
