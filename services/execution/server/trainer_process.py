"""The trainer's process as its server sees it: started by exec, talked to over a socket pair, restarted when it dies.

Exec and not fork: gRPC does not survive a fork, and CUDA wants a fresh process.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable

from google.protobuf.message import Message

from services.backoff import Backoff
from services.execution.server.watchdog import Watchdog
from services.execution.settings import ExecutionSettings
from services.execution.trainer_pipe import AsyncPipe, Frame, Tag
from services.settings import environment_of

_STACKS_SECONDS = 0.5  # for a trainer that hangs to write its stacks, before it is killed
_log = logging.getLogger(__name__)


class TrainerProcess:
    """`on_frame` gets what the trainer says, in order; `on_death` is told before each restart, with the cause."""

    def __init__(
        self,
        settings: ExecutionSettings,
        on_frame: Callable[[Frame], Awaitable[None]],
        on_death: Callable[[str], Awaitable[None]],
    ) -> None:
        self._settings, self._on_frame, self._on_death = settings, on_frame, on_death
        self._process: asyncio.subprocess.Process | None = None
        self._pipe: AsyncPipe | None = None
        self._is_stopping = self._was_ever_ready = False
        self._watchdog = Watchdog(settings.watchdog_seconds)
        self._cause = ""

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    async def run(self) -> None:
        """Keeps a trainer alive until `stop`. Returns if the first one ends before it was ready."""
        backoff = Backoff(first_seconds=0.5, max_seconds=30.0)
        while not self._is_stopping:
            await self._start()
            watching = asyncio.create_task(self._watch(), name="watchdog")
            was_ready = await self._pump()
            watching.cancel()
            assert self._process is not None
            code = await self._process.wait()
            if self._is_stopping:
                return
            _log.error("the trainer ended with status %d", code)
            if not (was_ready or self._was_ever_ready):
                return  # a backbone that does not load will not load again: its log says why
            self._was_ever_ready = True
            await self._on_death(self._cause or f"its trainer ended with status {code}")
            if was_ready:
                backoff.reset()
            await backoff.wait()

    async def send(self, tag: Tag, message: Message | None = None) -> None:
        """Lost when the trainer is dying: whoever restarts it tells it again what it needs."""
        if self._pipe is not None:
            self._watchdog.told(time.monotonic())
            try:
                await self._pipe.write(tag, message)
            except ConnectionError:
                _log.warning("the trainer is gone: %s not sent", tag.name)

    async def stop(self, seconds: float) -> None:
        """Closes the pipe, which ends the trainer; kills it if it does not end."""
        self._is_stopping = True
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), seconds)
            except TimeoutError:
                _log.error("the trainer does not end: killed")
                self._process.kill()
                await self._process.wait()

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, **environment_of(self._settings)}
        environment.pop("MUXTUNE_PROMETHEUS_PORT", None)  # the server's
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.execution.trainer",
            str(theirs.fileno()),
            pass_fds=[theirs.fileno()],
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C is for the server, which drains first
        )
        theirs.close()
        self._pipe, self._cause = await AsyncPipe.of(ours), ""
        self._watchdog.started()

    async def _pump(self) -> bool:
        """Hands on frames until the trainer is gone; whether it was ever ready."""
        assert self._pipe is not None
        was_ready = False
        while (frame := await self._pipe.read()) is not None:
            was_ready = True
            self._watchdog.heard(time.monotonic(), is_idle=frame[0] is Tag.IDLE)
            await self._on_frame(frame)
        return was_ready

    async def _watch(self) -> None:
        """Kills this trainer if it hangs."""
        while True:
            await asyncio.sleep(self._watchdog.interval_seconds)
            if self._watchdog.is_hung(time.monotonic()):
                assert self._process is not None
                limit = self._watchdog.limit_seconds
                self._cause = f"its trainer gave no sign of life for {limit:g} s and was killed by its watchdog"
                _log.error("%s; its stacks follow, if it can write them", self._cause)
                self._process.send_signal(signal.SIGUSR1)
                await asyncio.sleep(_STACKS_SECONDS)
                self._process.kill()
                return
