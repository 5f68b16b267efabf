"""Runs the trainer: `python -m services.execution.trainer FD`, started by the executor's server.

FD is the file descriptor of the trainer's end of the pipe between the two processes.
"""

import faulthandler
import logging
import os
import signal
import sys

import torch
from transformers.utils.logging import disable_progress_bar

from services.execution.settings import ExecutionSettings
from services.execution.trainer.trainer import Trainer
from services.execution.trainer_pipe import BlockingPipe
from services.settings import from_environment
from services.telemetry import configure

_log = logging.getLogger(__name__)


def main() -> None:
    settings = from_environment(ExecutionSettings, os.environ)
    logging.captureWarnings(True)
    faulthandler.register(signal.SIGUSR1)  # the watchdog sends it to have the stacks of all threads written
    disable_progress_bar()
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    provider = configure("trainer", settings)
    pipe = BlockingPipe(int(sys.argv[1]))
    try:
        Trainer(settings, pipe).run()
    except (BrokenPipeError, ConnectionResetError):
        _log.warning("The executor's server closed the pipe. The trainer stops.")
    finally:
        provider.shutdown()


if __name__ == "__main__":
    main()
