"""Processes of services: each ends with the process that started it, and writes to a log of its own."""

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from muxtune.child_process import child_command
from muxtune.local.data_folder import PRIVATE_UMASK, open_log
from muxtune.local.loopback import without_proxy

_STOP_SECONDS = 60.0
_NUM_LOG_LINES, _MAX_TAIL_BYTES = 5, 1 << 16


def start_service(service: str, settings: Mapping[str, str], log: Path, lock: int) -> "subprocess.Popen[bytes]":
    """Start a service with these MUXTUNE_* settings; others are not inherited. It inherits the descriptor `lock`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MUXTUNE_")}
    with open_log(log) as output:
        return subprocess.Popen(
            child_command(f"services.{service}"),
            env=without_proxy({**inherited, **settings}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[lock],
            start_new_session=True,  # Ctrl-C reaches this process only; it stops them in order
            umask=PRIVATE_UMASK,
        )


def stop_process(process: "subprocess.Popen[bytes]") -> int:
    """Stop a process by SIGTERM, or by SIGKILL if that takes too long. Returns its exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def describe_end(service: str, code: int, log: Path) -> str:
    """Return a line on a service that has ended: its exit status, or signal, and the end of its log."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _MAX_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()[-_NUM_LOG_LINES:]
    except OSError as error:
        lines = [f"cannot be read: {error.strerror}"]
    return f"{service} {how}; the end of {log}: " + " | ".join(lines)
