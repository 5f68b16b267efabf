"""Runs a job once for all callers that want its result, and stops it when none of them waits any more."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class _Job(Generic[T]):
    task: "asyncio.Task[T]"
    num_callers: int = 0


class SharedJobs(Generic[T]):
    """Jobs in progress by key, on one event loop. Results are not kept."""

    def __init__(self) -> None:
        self._jobs: dict[Hashable, _Job[T]] = {}

    async def run(self, key: Hashable, work: Callable[[], Awaitable[T]]) -> T:
        """Return the result of the job of this key, or raise its error; start it with `work` if there is none."""
        job = self._jobs.get(key)
        if job is None:
            job = self._jobs[key] = _Job(asyncio.ensure_future(_awaited(work)))
            job.task.add_done_callback(lambda _: self._remove(key, job))
        job.num_callers += 1
        try:
            return await asyncio.shield(job.task)
        finally:
            job.num_callers -= 1
            if not job.num_callers:
                self._remove(key, job)  # a later caller must not join a job that is being stopped
                job.task.cancel()

    def _remove(self, key: Hashable, job: _Job[T]) -> None:
        if self._jobs.get(key) is job:
            del self._jobs[key]


async def _awaited(work: Callable[[], Awaitable[T]]) -> T:
    return await work()
