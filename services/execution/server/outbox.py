"""Queues results for scheduling: numbers them, keeps them until acknowledged, sends them again on a new stream.

No gRPC.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator

from muxtune.v1 import execution_pb2, plan_pb2


class Outbox:
    """Holds responses that scheduling has not acknowledged. While it `is_full` the trainer pauses."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sequence = 0
        self._unacknowledged: OrderedDict[int, execution_pb2.RunPlanResponse] = OrderedDict()
        self._changed = asyncio.Condition()
        self._is_closed = False

    @property
    def is_full(self) -> bool:
        return len(self._unacknowledged) >= self._limit

    @property
    def is_empty(self) -> bool:
        return not self._unacknowledged

    async def put(self, response: execution_pb2.RunPlanResponse) -> None:
        async with self._changed:
            self._sequence += 1
            response.sequence = self._sequence
            self._unacknowledged[self._sequence] = response
            self._changed.notify_all()

    async def acknowledge(self, sequence: int) -> None:
        async with self._changed:
            while self._unacknowledged and next(iter(self._unacknowledged)) <= sequence:
                self._unacknowledged.popitem(last=False)
            self._changed.notify_all()

    def results_up_to(self, sequence: int) -> list[plan_pb2.TaskResult]:
        """Returns the results that an acknowledgement of `sequence` acknowledges."""
        responses = [response for number, response in self._unacknowledged.items() if number <= sequence]
        return [result for response in responses for result in response.results]

    async def clear(self) -> list[plan_pb2.TaskResult]:
        """Discards everything, because the lease is lost. Returns the results."""
        results = self.results_up_to(self._sequence)
        async with self._changed:
            self._unacknowledged.clear()
            self._changed.notify_all()
        return results

    async def close(self) -> None:
        """Ends readers as soon as everything is acknowledged."""
        async with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    async def wait_empty(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._unacknowledged)

    async def read(self) -> AsyncIterator[execution_pb2.RunPlanResponse]:
        """Yields unacknowledged responses, oldest first, then new ones as they come; for one stream."""
        last_sent = 0
        while True:
            async with self._changed:
                while not self._has_unsent(last_sent):
                    await self._changed.wait()
                unsent = [response for sequence, response in self._unacknowledged.items() if sequence > last_sent]
                if not unsent and self._is_closed and not self._unacknowledged:
                    return
                last_sent = self._sequence
            for response in unsent:
                yield response

    def _has_unsent(self, last_sent: int) -> bool:
        return self._sequence > last_sent or (self._is_closed and not self._unacknowledged)
