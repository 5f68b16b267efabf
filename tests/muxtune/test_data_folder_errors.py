"""A data folder that cannot be used is one line, which names the path and the remedy, from every command."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from muxtune.cli.main import app
from muxtune.local import loopback
from muxtune.local.certificate_authority import issue, issue_where_due
from muxtune.local.errors import MeshError
from muxtune.local.loopback import free_addresses

ROOT = Path(__file__).parents[2]
BROKEN_STATES = {
    "empty": b"",
    "cut off": b'{"addresses": {"admission": "127.0.',
    "zeros": bytes(300),
    "not UTF-8": b'\xff\xfe{"api_key": 1}',
    "a list": b"[]",
    "a number for a key": b'{"api_key": 5}',
    "a list for addresses": b'{"addresses": []}',
    "an address without a port": b'{"addresses": {"admission": "127.0.0.1"}}',
    "a port that is no number": b'{"addresses": {"admission": "127.0.0.1:x"}}',
    "a port that is too large": b'{"addresses": {"admission": "127.0.0.1:99999"}}',
    "deep": b"[" * 100_000,
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MUXTUNE_ADDRESS", "MUXTUNE_API_KEY", "MUXTUNE_CERTS", "MUXTUNE_ADMISSION_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def error_of(*command: object) -> str:
    """Return the only line of a command that fails without a traceback."""
    done = CliRunner().invoke(app, [str(argument) for argument in command])
    assert (done.exit_code, done.stdout.removeprefix(f"starting on {command[2]} ...\n")) == (1, ""), done.output
    assert isinstance(done.exception, SystemExit)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def commands(data: Path, backbone: Path) -> Iterator[list[object]]:
    yield ["up", "--data", data, "--backbone", f"tiny={backbone}"]
    yield ["task", "list", "--data", data]
    yield ["key", "list", "--data", data]


def test_a_file_is_not_a_data_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear diary")
    for data in (tmp_path / "file", tmp_path / "file" / "below"):
        for command in commands(data, tmp_path):
            if command[0] == "up" or data.name == "file":
                assert f"{data} is a file" in error_of(*command)
    assert (tmp_path / "file").read_text() == "dear diary"


@pytest.mark.parametrize("content", BROKEN_STATES.values(), ids=BROKEN_STATES)
def test_a_damaged_mesh_json_is_named_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mesh.json").write_bytes(content)
    for command in commands(tmp_path, tmp_path):
        line = error_of(*command)
        assert f"{tmp_path / 'mesh.json'} is damaged" in line and "Delete it" in line
    assert (tmp_path / "mesh.json").read_bytes() == content


def test_a_folder_instead_of_mesh_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mesh.json").mkdir()
    for command in commands(tmp_path, tmp_path):
        assert str(tmp_path / "mesh.json") in error_of(*command)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN CERTIFICATE-----\nMII\n-----END CERTIFICATE-----\n"])
@pytest.mark.parametrize(
    "path", ["ca.crt", "ca.key", "admission/ca.crt", "admission/tls.crt", "operator/tls.key", "executors/local/tls.key"]
)
def test_a_damaged_certificate_is_named_with_what_to_do(tmp_path: Path, path: str, content: bytes) -> None:
    issue(tmp_path / "certs", executors=["local"])
    (tmp_path / "certs" / path).write_bytes(content)
    line = error_of(*next(commands(tmp_path, tmp_path)))
    assert str((tmp_path / "certs" / path).parent) in line and "damaged" in line and re.search("delete|restore", line)


def test_a_key_of_another_certificate_is_damage(tmp_path: Path) -> None:
    issue(tmp_path / "certs", executors=["local"])
    (tmp_path / "certs" / "alignment" / "tls.key").write_bytes((tmp_path / "certs/admission/tls.key").read_bytes())
    assert "certs/alignment" in error_of(*next(commands(tmp_path, tmp_path)))


def test_a_missing_certificate_is_issued_again(tmp_path: Path) -> None:
    issue_where_due(tmp_path)
    for path in ("alignment/tls.key", "operator/tls.crt", "executors/local/ca.crt"):
        (tmp_path / path).unlink()
        issue_where_due(tmp_path)
        assert (tmp_path / path).exists()


def test_an_operator_without_a_certificate_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mesh.json").write_text(json.dumps({"addresses": {"admission_internal": "127.0.0.1:1"}}))
    (tmp_path / "certs" / "operator").mkdir(parents=True)
    assert str(tmp_path / "certs" / "operator" / "tls.key") in error_of("key", "list", "--data", tmp_path)


def test_a_trace_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mesh.json").write_text(json.dumps({"addresses": {"admission": "127.0.0.1:1"}, "api_key": "k"}))
    (tmp_path / "traces").write_text("a file")
    assert str(tmp_path / "traces") in error_of("task", "list", "--data", tmp_path)


def test_probes_of_ports_that_are_taken_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """More ports are tried than this process may have files open."""
    monkeypatch.setattr(loopback, "_loopback_host", lambda: "192.0.2.1")  # no address of this machine
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    try:
        with pytest.raises(MeshError, match=re.escape("No port of 192.0.2.1")):
            free_addresses(["alignment"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_machine_with_ipv6_alone_gets_addresses_there() -> None:
    only_ipv6 = "ip link set lo up && ip addr del 127.0.0.1/8 dev lo && exec "
    program = "from muxtune.local.loopback import free_addresses; print(free_addresses('ab'))"
    command = ["unshare", "-rn", "sh", "-c", f'{only_ipv6} "$0" -c "$1"', sys.executable, program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "ip:" in done.stderr:
        pytest.skip(f"no network namespace can be made here: {done.stderr}")
    assert done.stdout.count("[::1]:") == 2, done.stderr
