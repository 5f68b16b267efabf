"""Microbatches on their way to the device ahead of their turn: from pinned memory, on a stream of their own, while the
one before them runs.

Legend: T tokens of the packed stream.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine.alignment.microbatch import Microbatch
from engine.kernels.transfer import to_device
from engine.runtime.out_of_memory import OutOfMemoryError, within_memory

Arrival = Callable[[], torch.Tensor]  # makes the current stream wait for the copy, and answers it
Copy = Callable[[torch.Tensor], Arrival]


@dataclass(frozen=True, eq=False)
class StagedMicrobatch(Microbatch):
    """`arrived`: its token ids and targets on the device, [2, T] int32."""

    arrived: Arrival


def stage(microbatch: Microbatch, copy: Copy) -> Microbatch:
    """Begins to bring it over, on any thread. Where there is no room for it ahead, it stays where it is."""
    fields = {field.name: getattr(microbatch, field.name) for field in dataclasses.fields(Microbatch)}
    try:
        return StagedMicrobatch(**fields, arrived=within_memory(lambda: copy(_on_host_2T(microbatch))))
    except OutOfMemoryError:
        return microbatch


def on_device(microbatch: Microbatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, targets), each [T] int32 on the device, in the order of its current stream."""
    if isinstance(microbatch, StagedMicrobatch):
        ids_T, targets_T = microbatch.arrived().unbind()
    else:
        ids_T, targets_T = to_device(_on_host_2T(microbatch), device).unbind()
    return ids_T, targets_T


def copy_to(device: torch.device) -> Copy | None:
    """By a stream of its own; None where there is nowhere to copy to."""
    return SideStream(device) if device.type == "cuda" else None


class SideStream:
    """Copies beside the stream that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, host: torch.Tensor) -> Arrival:
        with torch.cuda.stream(self._stream):
            there = host.pin_memory().to(self._device, non_blocking=True)
            copied = self._stream.record_event()

        def arrived() -> torch.Tensor:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            there.record_stream(current)  # its memory is the other stream's: not before this one is done with it
            return there

        return arrived


def _on_host_2T(microbatch: Microbatch) -> torch.Tensor:
    return torch.from_numpy(np.stack([microbatch.token_ids_T, microbatch.targets_T]))
