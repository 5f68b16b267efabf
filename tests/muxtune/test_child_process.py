"""A child process ends with its parent, however early or suddenly that ends; not with the thread that started it."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The parent starts a child with the module `work`, writes its process id, and waits.
PARENT = """
import subprocess, sys, threading
from muxtune.child_process import child_command
started, command = [], child_command("work", "an argument")
command[1:3] = {interpreter}
thread = threading.Thread(target=lambda: started.append(subprocess.Popen(command)))
thread.start()
thread.join()
print(started[0].pid, flush=True)
sys.stdin.read()
"""
WORK = """
import pathlib, sys, threading
pathlib.Path(__file__).with_name("began").write_text(str(sys.argv[1:]))
print("working", flush=True)
threading.Event().wait()
"""
NORMAL = ["-m", "muxtune.child_process"]
IMPATIENT = ["-c", "import muxtune.child_process as child; child._STOP_SECONDS = 1; child.main()"]
IGNORES_SIGTERM = "import signal; signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\n" + WORK


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "work.py").write_text(WORK)
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}


def start_parent(environment: dict[str, str], interpreter: list[str] = NORMAL) -> tuple["subprocess.Popen[str]", int]:
    """Return the parent, and the descriptor of its child, which becomes readable when the child ends."""
    command = [sys.executable, "-c", PARENT.format(interpreter=interpreter)]
    parent = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    return parent, os.pidfd_open(int(parent.stdout.readline()))


def wait_ended(child: int, seconds: float = 20.0) -> None:
    assert select.select([child], [], [], seconds)[0], "the child still runs"
    os.close(child)


def test_a_child_that_works_ends_with_its_parent_and_not_with_the_thread_that_started_it(
    environment: dict[str, str], tmp_path: Path
) -> None:
    parent, child = start_parent(environment)
    assert parent.stdout is not None and parent.stdout.readline() == "working\n"
    assert (tmp_path / "began").read_text() == "['an argument']"
    parent.kill()
    wait_ended(child)
    parent.communicate()


def test_a_child_that_starts_ends_with_its_parent(environment: dict[str, str]) -> None:
    for _ in range(5):
        parent, child = start_parent(environment)
        parent.kill()
        wait_ended(child)
        parent.communicate()


def test_a_child_whose_parent_is_gone_does_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [sys.executable, "-m", "muxtune.child_process", str(gone.pid), "work"]
    assert subprocess.run(command, env=environment, timeout=20, check=False).returncode == -signal.SIGTERM


def test_a_child_that_does_not_stop_is_ended(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(IGNORES_SIGTERM)
    parent, child = start_parent(environment, IMPATIENT)
    assert parent.stdout is not None and parent.stdout.readline() == "working\n"
    parent.kill()
    assert parent.stdout.readline() == "asked\n"
    wait_ended(child)
    parent.communicate()
