"""Places where tests kill a process, before and after what commits. Without MUXTUNE_FAILPOINTS nothing happens there.

That variable names a folder. A file there of a failpoint's name arms it: whoever comes by first takes the file away and
dies, as by `kill -9`. So each kills once, whenever a test says so, in whichever process passes.
"""

import math
import os
import signal

VARIABLE = "MUXTUNE_FAILPOINTS"
TOKENS = "microbatch.tokens"  # the text of this file is a number: a microbatch of more tokens finds no memory
NAMES = (
    "commit.before",  # a transaction on admission's database
    "commit.after",
    "manifest.before",  # of a checkpoint or an adapter
    "manifest.after",
    "dataset.stored",  # its bytes are, its row is not
    "watch.event",  # sent to a client, others follow
    "plan.committed",  # and not sent
    "results.before",  # received by scheduling, not committed
    "results.after",  # committed, not acknowledged
    "report.before",  # made by the trainer, not sent to its server
    "report.after",
)


def max_microbatch_tokens() -> float:
    """Of a microbatch, before it finds no memory: without a test that says so, any number."""
    if folder := os.environ.get(VARIABLE):
        try:
            with open(os.path.join(folder, TOKENS)) as file:
                return float(file.read())
        except FileNotFoundError:
            pass
    return math.inf


def failpoint(name: str) -> None:
    """Kills this process if the failpoint is armed."""
    if folder := os.environ.get(VARIABLE):
        assert name in NAMES, name
        try:
            os.unlink(os.path.join(folder, name))
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
