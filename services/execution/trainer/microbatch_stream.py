"""Reads the microbatches of one hTask from alignment on a thread, which stages a few of them ahead."""

import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any

import grpc

from engine.alignment.microbatch import Microbatch
from engine.errors import UnavailableError
from engine.runtime.out_of_memory import is_out_of_memory
from muxtune.v1 import alignment_pb2, alignment_pb2_grpc
from services.conversion.microbatch import microbatch_to_domain
from services.rpc.errors import from_rpc_error

_MAX_STAGED = 2


class MicrobatchStream:
    """Makes one StreamMicrobatches call, after `delay_seconds`. Close it at the end: it holds a few microbatches."""

    def __init__(
        self,
        channel: grpc.Channel,
        request: alignment_pb2.StreamMicrobatchesRequest,
        stage: Callable[[Microbatch], Microbatch] = lambda microbatch: microbatch,
        delay_seconds: float = 0.0,
    ) -> None:
        self._stub, self._request = alignment_pb2_grpc.AlignmentServiceStub(channel), request
        self._stage, self._delay_seconds = stage, delay_seconds
        self._call: Any = None
        self._staged: queue.Queue[Microbatch | Exception | None] = queue.Queue(maxsize=_MAX_STAGED)
        self._is_closed = threading.Event()
        read = contextvars.copy_context().run  # the thread joins the trace of the caller
        threading.Thread(target=read, args=(self._read,), name="microbatches", daemon=True).start()

    def next(self, timeout_seconds: float) -> Microbatch | None:
        """Returns the next microbatch; None after the last round.

        Raises alignment's error, or queue.Empty if no microbatch comes in that time.
        """
        item = self._staged.get(timeout=timeout_seconds)
        if isinstance(item, Exception):
            raise item
        return item

    @property
    def is_ready(self) -> bool:
        """Returns whether `next` returns at once."""
        return not self._staged.empty()

    def close(self) -> None:
        self._is_closed.set()
        if self._call is not None:
            self._call.cancel()

    def _read(self) -> None:
        """Puts microbatches, or the error that ended the call, into the queue: `next` would else wait without end."""
        if self._is_closed.wait(self._delay_seconds):
            return
        try:
            self._call = self._stub.StreamMicrobatches(self._request)
            if self._is_closed.is_set():
                self._call.cancel()
            for response in self._call:
                self._put(self._stage(microbatch_to_domain(response.microbatch)))
            self._put(None)
        except grpc.RpcError as error:
            self._put(from_rpc_error(error))
        except Exception as error:
            self._put(
                UnavailableError("the executor has no memory to read a microbatch")
                if is_out_of_memory(error)
                else error
            )

    def _put(self, item: Microbatch | Exception | None) -> None:
        while not self._is_closed.is_set():
            try:
                return self._staged.put(item, timeout=0.2)
            except queue.Full:
                continue
