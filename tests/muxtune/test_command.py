"""The `muxtune` command as a shell sees it: output, JSON, one line per error, exit status."""

import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers import BloomConfig, BloomForCausalLM
from typer.testing import CliRunner, Result

from engine.errors import FieldViolation, InvalidInputError, PermissionDeniedError
from muxtune.cli import main
from muxtune.cli.main import app
from muxtune.cli.spec import read_spec
from muxtune.local.errors import MeshError
from muxtune.local.mesh_state import read_state
from muxtune.v1 import task_pb2
from tests.muxtune.admission_fake import CONFIG, KEY, WEIGHTS, Admission, file_parts
from tests.tiny_backbone import write_backbone

ROOT = Path(__file__).parents[2]
NAME = "tenants/a/tasks/t"
COMMANDS = [
    "up", "demo", "dataset upload", "dataset list", "dataset get", "dataset check", "dataset delete", "task create",
    "task list", "task get", "task watch", "task cancel", "adapter upload", "adapter list", "adapter download",
    "adapter delete", "executor drain", "plan get", "plan explain", "plan whatif", "plan timeline", "plan profile",
    "plan simulate", "key create", "key list", "key revoke", "verify", "certs", "tenant quota", "tenant usage",
    "tenant audit",
]  # fmt: skip
FORMER = {
    "dataset put": "dataset upload", "dataset ls": "dataset list", "dataset rm": "dataset delete",
    "task ls": "task list", "task show": "task get", "adapter push": "adapter upload", "adapter ls": "adapter list",
    "adapter pull": "adapter download", "adapter rm": "adapter delete", "plan show": "plan get", "key ls": "key list",
}  # fmt: skip
READING = {
    "dataset list": ("num_rows", 3),
    "dataset get tenants/a/datasets/d": ("name", "tenants/a/datasets/d"),
    "dataset check tenants/a/datasets/d": ("num_rows", "3"),
    "task list": ("name", "tenants/a/tasks/t0"),
    "adapter list": ("name", "tenants/a/adapters/x0"),
    f"task get {NAME}": ("state", "TASK_STATE_SUCCEEDED"),
    f"task watch {NAME}": ("sequence", "1"),
}


@pytest.fixture
def admission(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Admission]:
    played = Admission()
    monkeypatch.setenv("MUXTUNE_ADDRESS", played.address)
    monkeypatch.setenv("MUXTUNE_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    yield played
    played.close()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    shown = run(*command.split(), "--help")
    assert shown.exit_code == 0
    assert f"muxtune {command}" in " ".join(shown.output.replace("│", " ").split())
    assert "Example" in shown.output


def test_the_list_above_is_complete() -> None:
    visible, hidden = {}, {}
    groups = {f"{group.name} ": group.typer_instance for group in app.registered_groups}
    for prefix, group in {"": app, **groups}.items():
        for command in group.registered_commands if group else ():
            name = prefix + (command.name or command.callback.__name__)
            (hidden if command.hidden else visible)[name] = command.callback
    assert set(visible) == set(COMMANDS)
    assert hidden == {former: visible[name] for former, name in FORMER.items()}


@pytest.mark.parametrize("command", READING)
def test_reading_commands_speak_json(admission: Admission, command: str) -> None:
    admission.num_events = 2
    shown = run(*command.split(), "--json")
    assert shown.exit_code == 0, shown.output
    first = json.loads(shown.output.splitlines()[0])
    field, value = READING[command]
    assert str(first[field]) == str(value)


FLAGS = [
    "--dataset", "tenants/a/datasets/d", "--rank", "8", "--alpha", "16", "--target", "q_proj", "--target", "v_proj",
    "--learning-rate", "1e-3", "--steps", "10", "--seed", "0", "--warmup-steps", "2",
    "--lr-schedule", "cosine", "--set", "labels.team=support",
]  # fmt: skip
FIELDS = {
    "backbone": "smollm2",
    "dataset": "tenants/a/datasets/d",
    "lora": {"rank": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "training": {"learning_rate": 0.001, "num_steps": 10, "warmup_steps": 2, "lr_schedule": "LR_SCHEDULE_COSINE"},
    "labels": {"team": "support"},
}


def test_a_file_and_flags_say_the_same(admission: Admission, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(FIELDS))
    assert run("task", "create", "-f", "task.yaml", "--id", "x").exit_code == 0
    assert run("task", "create", *FLAGS, "--id", "x").exit_code == 0
    from_file, from_flags = admission.requests
    assert from_file.spec == from_flags.spec
    assert from_file.task_id == "x"
    assert from_file.spec.training.warmup_steps == 2


def test_every_field_of_training_has_an_option(admission: Admission) -> None:
    """Options are made from the proto: each sets the field of its name."""
    expected, flags = task_pb2.Training(), list[str]()
    for field in expected.DESCRIPTOR.fields:
        if field.name != "num_epochs":  # one of the two is set
            setattr(expected, field.name, 2 if field.cpp_type != field.CPPTYPE_BOOL else True)
            value = field.enum_type.values_by_number[2].name if field.enum_type else "2"
            option = f"--{field.name.replace('_', '-')}"
            flags += [option] if field.cpp_type == field.CPPTYPE_BOOL else [option, value]
    done = run("task", "create", "--dataset", "tenants/a/datasets/d", *flags)
    assert done.exit_code == 0, done.output
    assert admission.requests[0].spec.training == expected


def test_flags_override_the_file_even_with_nothing(admission: Admission, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({**FIELDS, "lora": {"rank": 8, "dropout": 0.5}}))
    done = run("task", "create", "-f", "task.yaml", "--dropout", "0", "--epochs", "2", "--target", "o_proj")
    assert done.exit_code == 0, done.output
    spec = admission.requests[0].spec
    assert (spec.lora.rank, spec.lora.dropout, list(spec.lora.target_modules)) == (8, 0, ["o_proj"])
    assert (spec.training.num_epochs, spec.training.num_steps) == (2, 0)
    assert spec.backbone == "smollm2"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lorra: {rank: 8}", "lorra"),
        ("lora: {rank: eight}", "rank"),
        ("lora: {rank: 5000000000}", "rank"),
        ("training: {num_steps: 1.5}", "num_steps"),
        ("training: {lr_schedule: WAVY}", "WAVY"),
        ("just words", "mapping"),
        ("a: [", "cannot be read"),
        ("a: " + "[" * 3000 + "]" * 3000, "cannot be read"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_field(
    admission: Admission, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "task.yaml").write_text(text)
    done = run("task", "create", "-f", "task.yaml")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: task.yaml: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert admission.requests == []


@pytest.mark.parametrize("text", ["warmup=2", "training.warmup_steps", "=2", "labels=[", "backbone.name=x"])
def test_a_bad_setting_is_one_line(admission: Admission, text: str) -> None:
    done = run("task", "create", "--set", text)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert admission.requests == []


def test_examples_read() -> None:
    assert read_spec(ROOT / "examples" / "replies.yaml").lora.rank > 0


def test_every_wrong_field_has_its_line(admission: Admission) -> None:
    wrong = [FieldViolation("spec.lora.rank", '"0" must be 1 to 256'), FieldViolation("spec.dataset", "must be named")]
    admission.failures = [InvalidInputError("two", wrong)]
    done = run("task", "create", "--dataset", "d")
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [f"error: {v.field}: {v.description}" for v in wrong]


def test_a_refusal_is_one_line_and_no_traceback(admission: Admission) -> None:
    admission.failures = [PermissionDeniedError('"tenants/b/tasks/t" does not exist, or this key may not see it')]
    done = run("task", "get", "tenants/b/tasks/t")
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)


def test_the_error_without_a_mesh_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MUXTUNE_ADDRESS", "MUXTUNE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    done = run("task", "list", "--data", str(tmp_path))
    assert done.exit_code == 1
    assert "muxtune up" in done.stderr


def test_unknown_states_are_refused(admission: Admission) -> None:
    assert run("task", "list", "--state", "SLEEPING").exit_code == 2
    assert run("task", "ls", "--state", "running").exit_code == 0
    assert list(admission.requests[0].states) == [task_pb2.TASK_STATE_RUNNING]


def test_download_and_upload(admission: Admission, tmp_path: Path) -> None:
    admission.download = [*file_parts(CONFIG, b"{}"), *file_parts(WEIGHTS, b"w")]
    assert run("adapter", "download", NAME, "adapter").exit_code == 0
    assert run("adapter", "upload", "adapter", "--json").exit_code == 0
    assert len(admission.uploads) == 1
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    assert run("adapter", "pull", NAME, "home").exit_code == 1
    assert (tmp_path / "home" / "letter.txt").exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("tiny"))


def start_up(data: Path, tiny: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "muxtune.cli.main", "up", "--data", str(data), "--backbone", f"tiny={tiny}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def read_until(process: "subprocess.Popen[str]", words: str) -> list[str]:
    """Return the lines up to one with `words`. After two minutes the process is killed."""
    assert process.stdout is not None
    lines = []
    late = threading.Timer(120, process.kill)
    late.start()
    try:
        for line in process.stdout:
            lines.append(line)
            if words in line:
                return lines
    finally:
        late.cancel()
    raise AssertionError("".join(lines))


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [descendant for child in children for descendant in (int(child), *descendants(int(child)))]


def wait_gone(pids: list[int]) -> None:
    """Wait until the processes are gone. A zombie counts as gone: its new parent has not reaped it yet."""
    deadline = time.monotonic() + 60
    left = list(pids)
    while left:
        assert time.monotonic() < deadline, f"still there: {left}"
        left = [pid for pid in left if is_alive(pid)]
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_up_passes_on_only_policies_and_the_rotation_of_traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Admission gets the environment's identity provider and limits; addresses and keys there are not passed on."""
    environments: list[dict[str, dict[str, str]]] = []

    def stop_there(
        data: Path, backbones: object, endpoint: str, environment: dict[str, dict[str, str]], ready_seconds: float
    ) -> None:
        environments.append(environment)
        raise MeshError("enough")

    monkeypatch.setattr(main, "Mesh", stop_there)
    variables = {"MUXTUNE_OIDC_ISSUER": "https://issuer.example", "MUXTUNE_MAX_ADAPTER_BYTES": "9"}
    variables["MUXTUNE_KEEP_TASKS_DAYS"] = "90"
    rotation = {"MUXTUNE_TRACE_FILE_BYTES": "1000000", "MUXTUNE_TRACE_FILES": "3"}
    others = {"MUXTUNE_ADDRESS": "x:1", "MUXTUNE_API_KEY": "k", "MUXTUNE_CERTS": "/c", "MUXTUNE_TRACE_FILE": "/t"}
    for name, value in {**variables, **rotation, **others}.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, ["up", "--data", str(tmp_path), "--backbone", f"tiny={tmp_path}"])
    assert done.exit_code == 1 and "enough" in done.output
    assert environments == [{"*": rotation, "admission": variables}]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.thorough),
        pytest.param(signal.SIGTERM, marks=pytest.mark.thorough),  # taken as SIGINT is, by the same line
        pytest.param(signal.SIGHUP, marks=pytest.mark.thorough),
        signal.SIGKILL,
    ],
    ids=lambda n: n.name,
)
def test_up_ends_with_all_its_services(tiny: Path, tmp_path: Path, number: signal.Signals) -> None:
    data = tmp_path / ("a folder [with] a name longer than a line of eighty columns, as those of a CI are" + "." * 20)
    up = start_up(data, tiny)
    lines = read_until(up, f"Logs in {data / 'logs'}. Stop with Ctrl-C")
    services = descendants(up.pid)
    assert len(services) == 5  # four services, and the trainer
    if number is signal.SIGINT:
        listens = "".join(lines)
        state = read_state(data)
        assert all(address in listens for address in state["addresses"].values())
        assert stat.S_IMODE((data / "mesh.json").stat().st_mode) == 0o600
        second = start_up(data, tiny)
        assert f"process {up.pid}" in read_until(second, "error: ")[-1]
        assert second.wait(30) == 1
    up.send_signal(number)
    code = up.wait(60)
    assert code == (-signal.SIGKILL if number is signal.SIGKILL else 0)
    wait_gone(services)
    with (data / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free for the next start


def test_up_refuses_a_backbone_it_cannot_train_exactly(tiny: Path, tmp_path: Path) -> None:
    bloom = shutil.copytree(tiny, tmp_path / "bloom", ignore=shutil.ignore_patterns("*.safetensors"))
    BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(bloom)
    up = start_up(tmp_path / "data", bloom)
    assert "BloomForCausalLM cannot be trained exactly" in read_until(up, "error: ")[-1]
    assert up.wait(60) == 1
