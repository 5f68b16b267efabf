"""Failpoints: places before and after commits where a test can kill the process.

MUXTUNE_FAILPOINTS names a folder; without it failpoints do nothing. A file named like a failpoint arms it: the first
process that reaches the failpoint deletes the file and kills itself as by `kill -9`.
"""

import math
import os
import signal

VARIABLE = "MUXTUNE_FAILPOINTS"
TOKENS = "microbatch.tokens"  # this file holds a number: a microbatch of more tokens runs out of memory
NAMES = (
    "commit.before",  # a transaction on admission's database
    "commit.after",
    "manifest.before",  # the manifest of a checkpoint or an adapter
    "manifest.after",
    "dataset.stored",  # its bytes are stored, its row in the database is not
    "watch.event",  # one event was sent to a client, others follow
    "plan.committed",  # and not sent yet
    "results.before",  # received by scheduling, not committed
    "results.after",  # committed, not acknowledged
    "report.before",  # made by the trainer, not sent to its server
    "report.after",
)


def max_microbatch_tokens() -> float:
    """Return how many tokens a microbatch may have before it runs out of memory; infinity outside tests."""
    if folder := os.environ.get(VARIABLE):
        try:
            with open(os.path.join(folder, TOKENS)) as file:
                return float(file.read())
        except FileNotFoundError:
            pass
    return math.inf


def failpoint(name: str) -> None:
    """Kill this process if the failpoint is armed."""
    if folder := os.environ.get(VARIABLE):
        assert name in NAMES, name
        try:
            os.unlink(os.path.join(folder, name))
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
