"""What rows, names, labels, arguments and errors contain is shown by every command and obeyed by no terminal."""

import json
import os
import socket
import struct
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from rich.text import Text
from typer.testing import CliRunner, Result

from muxtune.cli import context
from muxtune.cli.main import app
from muxtune.cli.terminal import Terminal, format_json, visible
from muxtune.errors import DOMAIN
from tests.muxtune.test_command import COMMANDS

EVIL = "a\x1b[31m\x1b]0;title\x07\x08\r\x9b2J\x7f\u202eb\u2066\u2028\x00\x85é\U0001f642"
ARGUMENT = EVIL.replace("\x00", "")  # the system passes none in an argument
HARMLESS = {"\n", "\t", "\u200d"}


def unsafe(text: str) -> set[str]:
    """Return the characters that a terminal may obey: controls, formats such as bidirectional overrides, separators."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - HARMLESS


def filled(message: Message) -> Message:
    """Fill a message with hostile text, numbers and one element of each list."""
    for field in message.DESCRIPTOR.fields:
        if field.name == "next_page_token" or field.cpp_type == field.CPPTYPE_ENUM:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            pairs = getattr(message, field.name)
            is_text = field.message_type.fields_by_name["value"].cpp_type == field.CPPTYPE_STRING
            pairs[EVIL if field.message_type.fields_by_name["key"].cpp_type == field.CPPTYPE_STRING else 1] = (
                EVIL if is_text else 1
            )
        elif field.message_type is not None:
            filled(getattr(message, field.name).add() if field.is_repeated else getattr(message, field.name))
        else:
            kinds = {field.CPPTYPE_STRING: b"x" if field.type == field.TYPE_BYTES else EVIL, field.CPPTYPE_BOOL: True}
            value = kinds.get(field.cpp_type, 3)
            if field.is_repeated:
                getattr(message, field.name).append(value)
            else:
                setattr(message, field.name, value)
    return message


def every_choice(message: Message) -> Iterator[Message]:
    """Yield the filled message with each field of its oneofs in turn."""
    yield filled(message)
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and not field.is_repeated:
            for oneof in field.message_type.oneofs:
                for choice in oneof.fields:
                    other = filled(type(message)())
                    if choice.message_type is not None:
                        getattr(getattr(other, field.name), choice.name).SetInParent()
                        filled(getattr(getattr(other, field.name), choice.name))
                        yield other


class HostileServer(grpc.GenericRpcHandler):
    """Answers every method of the mesh with hostile text; with `fails`, as an error."""

    fails = False

    def service(self, details: Any) -> Any:
        service, _, name = details.method.lstrip("/").partition("/")
        method = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
        answers = list(every_choice(message_factory.GetMessageClass(method.output_type)()))
        is_stream = method.server_streaming

        def answer(_: Any, call: grpc.ServicerContext) -> Any:
            if self.fails:
                call.abort_with_status(self._status())
            return iter(answers) if is_stream else answers[0]

        kind = ("stream" if method.client_streaming else "unary") + ("_stream" if is_stream else "_unary")
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(answer, response_serializer=lambda message: message.SerializeToString())

    @staticmethod
    def _status() -> Any:
        status = status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message=EVIL)
        info = error_details_pb2.ErrorInfo(reason="INVALID_INPUT", domain=DOMAIN, metadata={"a": EVIL})
        status.details.add().Pack(info)
        violation = error_details_pb2.BadRequest.FieldViolation(field=EVIL, description=EVIL)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
        return rpc_status.to_status(status)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[HostileServer, str]]:
    hostile = HostileServer()
    serving = grpc.server(futures.ThreadPoolExecutor(4), handlers=[hostile])
    address = f"127.0.0.1:{serving.add_insecure_port('127.0.0.1:0')}"
    serving.start()
    yield hostile, address
    serving.stop(None)


@pytest.fixture
def hostile(
    server: tuple[HostileServer, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[HostileServer]:
    hostile, address = server
    hostile.fails = False
    monkeypatch.setenv("MUXTUNE_ADDRESS", address)
    monkeypatch.setenv("MUXTUNE_API_KEY", "mxt_key")
    monkeypatch.setattr(context, "operator_access", lambda data, service: (address, tmp_path))
    monkeypatch.setattr(context, "secure_channel", lambda *_: grpc.insecure_channel(address))
    monkeypatch.chdir(tmp_path)
    Path("rows").write_text('{"text": "a"}\n')
    Path("task.yaml").write_text("{dataset: tenants/a/datasets/d, training: {num_steps: 3}}")
    folder = Path("adapter")
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")
    Path("mine").mkdir()
    Path("mine", "file").touch()
    yield hostile


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


A = ARGUMENT
CALLS: dict[str, list[str]] = {
    "up": ["--backbone", A],
    "demo": ["--data", "mine"],
    "verify": ["--steps", A],
    "certs": [f"certs-{A}"],
    "dataset upload": ["rows", "--id", A],
    "dataset list": [],
    "dataset get": [A],
    "dataset check": [A, "--backbone", A],
    "dataset delete": [A],
    "task create": ["--dataset", A, "--steps", "3", "--set", f"labels.x={A}"],
    "task list": [],
    "task get": [A],
    "task watch": [A],
    "task cancel": [A],
    "adapter upload": ["adapter", "--id", A],
    "adapter list": [],
    "adapter download": [A, "there"],
    "adapter delete": [A],
    "executor drain": [A],
    "plan get": [],
    "plan explain": [A],
    "plan whatif": ["task.yaml"],
    "plan timeline": ["-o", f"{A}.svg"],
    "plan profile": [],
    "plan simulate": ["--trace", A],
    "key create": [A],
    "key list": ["--tenant", A],
    "key revoke": [A],
    "tenant quota": [A],
    "tenant usage": ["--tenant", A],
    "tenant audit": ["--tenant", A],
}


def test_all_commands_are_here() -> None:
    assert set(CALLS) == set(COMMANDS)


@pytest.mark.parametrize("fails", [False, True], ids=["answers", "errors"])
@pytest.mark.parametrize("command", CALLS)
def test_no_command_writes_a_control_character(hostile: HostileServer, command: str, fails: bool) -> None:
    hostile.fails = fails
    arguments = [*command.split(), *CALLS[command]]
    for flags in ([], ["--json"]):
        done = run(*arguments, *flags)
        assert unsafe(done.output) == set(), done.output
        assert isinstance(done.exception, SystemExit | None), done.exception  # none that would print a traceback
        if fails and done.exit_code == 1 and command not in ("demo", "task create"):
            assert done.stderr == f"error: {visible(EVIL)}: {visible(EVIL)}\n"
        if flags and done.exit_code == 0 and command != "tenant quota":  # which has numbers alone
            assert EVIL in strings([json.loads(line) for line in done.stdout.splitlines()])


def strings(value: Any) -> Iterator[str]:
    """Yield the strings in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    for part in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(part)


@pytest.mark.parametrize(
    "arguments",
    [[A], [f"--{A}"], ["task", A], ["task", "list", A], ["task", "list", f"--{A}"], ["task", "list", "--state", A],
     ["task", "create", "-f", A], ["task", "create", "--steps", A], ["task", "create", "--set", A],
     ["dataset", "upload", A], ["dataset", "check", "x", "-f", A], ["plan", "simulate", "--profile", A],
     ["adapter", "upload", A], ["up", "--data", "rows"], ["up", "--backbone", f"{A}={A}"]],
    ids=ascii,
)  # fmt: skip
def test_errors_show_the_arguments_that_they_quote(hostile: HostileServer, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.exit_code != 0
    assert unsafe(done.output) == set(), done.output


def test_controls_are_shown_and_other_text_is_unchanged() -> None:
    assert visible("\x1b[1m\x9b\u202e\r") == r"\x1b[1m\x9b\u202e\x0d"
    assert visible("\udcff") == r"\udcff"
    for text in ("tab\tand\nline", "naïve", "日本語", "👨\u200d👩\u200d👧", "[bold]x[/bold]", r"\x1b"):
        assert visible(text) == text
    assert json.loads(format_json({EVIL: EVIL})) == {EVIL: EVIL} and unsafe(format_json({EVIL: EVIL})) == set()


def test_a_terminal_still_has_colours(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal._force_terminal, terminal._color_system = True, Terminal(stderr=False)._color_system
    terminal.print(Text("x\x1b[8m", style="bold"))
    assert capsys.readouterr().out.replace("\x1b[1m", "").replace("\x1b[0m", "") == "x\\x1b[8m\n"


def test_a_servers_farewell_reaches_no_terminal(tmp_path: Path) -> None:
    """gRPC itself logs the text of a GOAWAY to standard error."""
    farewell = struct.pack(">II", 0, 11) + b"\x1b[31mtoo_many_pings"
    frames = b"\0\0\0\4\0\0\0\0\0" + len(farewell).to_bytes(3, "big") + b"\7\0\0\0\0\0" + farewell
    with socket.create_server(("127.0.0.1", 0)) as listener:
        environment = {**os.environ, "MUXTUNE_ADDRESS": f"127.0.0.1:{listener.getsockname()[1]}"}
        environment |= {"MUXTUNE_API_KEY": "mxt_key", "PYTHONPATH": os.pathsep.join(sys.path)}
        environment.pop("GRPC_VERBOSITY", None)
        command = [sys.executable, "-m", "muxtune.cli.main", "task", "list", "--data", str(tmp_path / "none")]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
            for _ in range(5):  # it tries again and again
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1024)
                    connection.sendall(frames)
            process.kill()
            assert process.stderr is not None and process.stderr.read() == b""
