"""Runs the trainer as a child process of the server: starts it, passes messages both ways, restarts it when it dies.

The child is started with exec: gRPC does not survive a fork, and CUDA needs a fresh process.
"""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable

from google.protobuf.message import Message

from muxtune.child_process import child_command
from services.backoff import Backoff
from services.execution.server.watchdog import Watchdog
from services.execution.settings import ExecutionSettings
from services.execution.trainer_pipe import AsyncPipe, Frame, Tag
from services.settings import environment_of

_STACKS_SECONDS = 0.5  # a hung trainer has so long to write its stacks before it is killed
_log = logging.getLogger(__name__)


class TrainerProcess:
    """Keeps the trainer running.

    Calls `on_frame` with each message of the trainer, in order, and `on_death` with the cause before each restart.
    """

    def __init__(
        self,
        settings: ExecutionSettings,
        on_frame: Callable[[Frame], Awaitable[None]],
        on_death: Callable[[str], Awaitable[None]],
    ) -> None:
        self._settings, self._on_frame, self._on_death = settings, on_frame, on_death
        self._process: asyncio.subprocess.Process | None = None
        self._pipe: AsyncPipe | None = None
        self._is_stopping = self._was_ever_ready = self._is_loading = False
        self._watchdog = Watchdog(settings.watchdog_seconds)
        self._cause = ""

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    async def run(self) -> None:
        """Keeps a trainer alive until `stop`. Returns if the first trainer ends before it was ready."""
        backoff = Backoff(first_seconds=0.5, max_seconds=30.0)
        while not self._is_stopping:
            await self._start()
            watching = asyncio.create_task(self._watch(), name="watchdog")
            was_ready = await self._forward_frames()
            watching.cancel()
            assert self._process is not None
            code = await self._process.wait()
            if self._is_stopping:
                return
            _log.error("The trainer ended with status %d.", code)
            if not (was_ready or self._was_ever_ready):
                return  # a backbone that does not load will not load the next time either
            self._was_ever_ready = True
            await self._on_death(self._cause or f"the trainer ended with status {code}")
            if was_ready:
                backoff.reset()
            await backoff.wait()

    async def send(self, tag: Tag, message: Message | None = None) -> None:
        """Sends a message to the trainer. The message is lost if the trainer is dying: `on_death` makes up for it."""
        if self._pipe is not None:
            self._watchdog.record_request(time.monotonic())
            try:
                await self._pipe.write(tag, message)
            except ConnectionError:
                _log.warning("The trainer is gone: %s was not sent.", tag.name)

    async def stop(self, seconds: float) -> None:
        """Closes the pipe, which ends the trainer. Kills the trainer if it has not ended after `seconds`, or at once if
        it still loads its backbone and does not read the pipe."""
        self._is_stopping = True
        if self._pipe is not None:
            self._pipe.close()
        if self._is_loading and self._process is not None and self._process.returncode is None:
            self._process.kill()
        if self._process is not None and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), seconds)
            except TimeoutError:
                _log.error("The trainer did not end after %g s and is killed.", seconds)
                self._process.kill()
                await self._process.wait()

    async def _start(self) -> None:
        server_end, trainer_end = socket.socketpair()
        environment = {**os.environ, **environment_of(self._settings)}
        environment.pop("MUXTUNE_PROMETHEUS_PORT", None)  # the port belongs to the server
        self._process = await asyncio.create_subprocess_exec(
            *child_command("services.execution.trainer", str(trainer_end.fileno())),
            pass_fds=[trainer_end.fileno()],
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal reaches the server alone, which drains first
        )
        trainer_end.close()
        self._pipe, self._cause = await AsyncPipe.of(server_end), ""
        self._is_loading = True
        self._watchdog.record_start()

    async def _forward_frames(self) -> bool:
        """Forwards frames until the trainer is gone. Returns whether it was ready."""
        assert self._pipe is not None
        was_ready = False
        while (frame := await self._pipe.read()) is not None:
            was_ready, self._is_loading = True, False
            self._watchdog.record_message(time.monotonic(), is_idle=frame[0] is Tag.IDLE)
            await self._on_frame(frame)
        return was_ready

    async def _watch(self) -> None:
        """Kills the trainer if it hangs."""
        while True:
            await asyncio.sleep(self._watchdog.interval_seconds)
            if self._watchdog.is_hung(time.monotonic()):
                assert self._process is not None
                limit = self._watchdog.limit_seconds
                self._cause = f"the trainer sent nothing for {limit:g} s and was killed by its watchdog"
                _log.error("Watchdog: %s. Its stacks follow, if it can write them.", self._cause)
                self._process.send_signal(signal.SIGUSR1)
                await asyncio.sleep(_STACKS_SECONDS)
                self._process.kill()
                return
