"""Results on their way to scheduling: numbered, kept until acknowledged, sent again on a new stream. No gRPC."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator

from muxtune.v1 import execution_pb2, plan_pb2


class Outbox:
    """Holds what is not acknowledged; `is_full` asks the trainer to pause."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sequence = 0
        self._kept: OrderedDict[int, execution_pb2.RunPlanResponse] = OrderedDict()
        self._changed = asyncio.Condition()
        self._is_closed = False

    @property
    def is_full(self) -> bool:
        return len(self._kept) >= self._limit

    @property
    def is_empty(self) -> bool:
        return not self._kept

    async def put(self, response: execution_pb2.RunPlanResponse) -> None:
        async with self._changed:
            self._sequence += 1
            response.sequence = self._sequence
            self._kept[self._sequence] = response
            self._changed.notify_all()

    async def acknowledge(self, sequence: int) -> None:
        async with self._changed:
            while self._kept and next(iter(self._kept)) <= sequence:
                self._kept.popitem(last=False)
            self._changed.notify_all()

    def results_up_to(self, sequence: int) -> list[plan_pb2.TaskResult]:
        """What an acknowledgement of `sequence` is about."""
        return [result for number, kept in self._kept.items() if number <= sequence for result in kept.results]

    async def clear(self) -> None:
        """The lease is lost: none of it counts any more."""
        async with self._changed:
            self._kept.clear()
            self._changed.notify_all()

    async def close(self) -> None:
        """Readers end once everything is acknowledged."""
        async with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    async def wait_empty(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._kept)

    async def read(self) -> AsyncIterator[execution_pb2.RunPlanResponse]:
        """Everything not acknowledged, oldest first, then what comes; for one stream."""
        last = 0
        while True:
            async with self._changed:
                while not self._has_news(last):
                    await self._changed.wait()
                fresh = [response for sequence, response in self._kept.items() if sequence > last]
                if not fresh and self._is_closed and not self._kept:
                    return
                last = self._sequence
            for response in fresh:
                yield response

    def _has_news(self, last: int) -> bool:
        return self._sequence > last or (self._is_closed and not self._kept)
