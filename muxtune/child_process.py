"""Runs a module in a process that ends with its parent: `python -m muxtune.child_process PARENT MODULE [ARGUMENT...]`.

PARENT is the parent's process id, as the parent itself knows it: a parent that was killed before this process ran its
first line is noticed, too. When the parent ends, this process gets SIGTERM, and has time to stop as on any SIGTERM.

A thread waits for the parent's end. Linux's PR_SET_PDEATHSIG is not used, because its signal comes when the thread ends
that started the process; a mesh may be started by any thread.
"""

import os
import runpy
import select
import signal
import sys
import threading
import time

_POLL_SECONDS = 0.5
_STOP_SECONDS = 60  # more than any service needs to stop


def child_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of Python as a child of the calling process, and ends with it."""
    return [sys.executable, "-m", __name__, str(os.getpid()), module, *arguments]


def main() -> None:
    parent, module, *arguments = sys.argv[1:]
    threading.Thread(target=_end_with, args=(int(parent),), name="parent", daemon=True).start()
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with(parent: int) -> None:
    """Wait until the parent has ended, then send this process SIGTERM; end it if it has not stopped in time."""
    _await_end(parent)
    signal.alarm(_STOP_SECONDS)  # SIGALRM ends a process that handles SIGTERM but hangs
    os.kill(os.getpid(), signal.SIGTERM)


def _await_end(parent: int) -> None:
    try:
        descriptor = os.pidfd_open(parent)
    except (AttributeError, OSError):  # not on Linux, or the parent has ended
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        return
    ended = select.poll()
    ended.register(descriptor, select.POLLIN)
    if os.getppid() == parent:  # else the descriptor may be of another process with that id
        ended.poll()


if __name__ == "__main__":
    main()
