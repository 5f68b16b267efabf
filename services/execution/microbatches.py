"""Microbatches of one hTask from alignment, read ahead by a thread, a few at most."""

import queue
import threading

import grpc

from engine.alignment.microbatch import Microbatch
from engine.errors import MuxtuneError
from muxtune.v1 import alignment_pb2, alignment_pb2_grpc
from services.convert import microbatch_to_domain
from services.errors import from_rpc_error

_AHEAD = 2


class MicrobatchStream:
    """One StreamMicrobatches call. Close it to leave; it holds at most a few microbatches."""

    def __init__(self, channel: grpc.Channel, request: alignment_pb2.StreamMicrobatchesRequest) -> None:
        stub = alignment_pb2_grpc.AlignmentServiceStub(channel)
        self._call = stub.StreamMicrobatches(request)
        self._ahead: queue.Queue[Microbatch | MuxtuneError | None] = queue.Queue(maxsize=_AHEAD)
        self._is_closed = threading.Event()
        threading.Thread(target=self._read, name="microbatches", daemon=True).start()

    def next(self, timeout_seconds: float) -> Microbatch | None:
        """None after the last round. Raises what alignment raised, or queue.Empty if nothing comes in that time."""
        item = self._ahead.get(timeout=timeout_seconds)
        if isinstance(item, MuxtuneError):
            raise item
        return item

    def close(self) -> None:
        self._is_closed.set()
        self._call.cancel()

    def _read(self) -> None:
        try:
            for response in self._call:
                self._put(microbatch_to_domain(response.microbatch))
            self._put(None)
        except grpc.RpcError as error:
            self._put(from_rpc_error(error))
        except MuxtuneError as error:
            self._put(error)

    def _put(self, item: Microbatch | MuxtuneError | None) -> None:
        while not self._is_closed.is_set():
            try:
                return self._ahead.put(item, timeout=0.2)
            except queue.Full:
                continue
