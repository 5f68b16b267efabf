"""Copies microbatches to the device ahead of their turn: from pinned memory, on a separate stream, while others run.

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

Arrival = Callable[[], torch.Tensor]  # makes the current stream wait for the copy, and returns it
Copy = Callable[[torch.Tensor], Arrival]


@dataclass(frozen=True, eq=False)
class StagedMicrobatch(Microbatch):
    """A microbatch with a copy on the device. `arrived` returns its token ids and targets, [2, T] int32."""

    arrived: Arrival


def stage(microbatch: Microbatch, copy: Copy) -> Microbatch:
    """Starts to copy the microbatch, on any thread. Returns it as it is if the device has no memory for the copy."""
    fields = {field.name: getattr(microbatch, field.name) for field in dataclasses.fields(Microbatch)}
    try:
        return StagedMicrobatch(**fields, arrived=within_memory(lambda: copy(_on_host_2T(microbatch))))
    except OutOfMemoryError:
        return microbatch


def on_device(microbatch: Microbatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (token ids, targets), each [T] int32 on the device, in the order of its current stream."""
    if isinstance(microbatch, StagedMicrobatch):
        ids_T, targets_T = microbatch.arrived().unbind()
    else:
        ids_T, targets_T = to_device(_on_host_2T(microbatch), device).unbind()
    return ids_T, targets_T


def copier_to(device: torch.device) -> Copy | None:
    """Returns a function that copies to the device on a separate stream; None for a CPU."""
    return SideStream(device) if device.type == "cuda" else None


class SideStream:
    """Copies on a stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, host: torch.Tensor) -> Arrival:
        with torch.cuda.stream(self._stream):
            copy = host.pin_memory().to(self._device, non_blocking=True)
            copied = self._stream.record_event()

        def arrived() -> torch.Tensor:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            copy.record_stream(current)  # its memory returns to the other stream only after this one is done with it
            return copy

        return arrived


def _on_host_2T(microbatch: Microbatch) -> torch.Tensor:
    return torch.from_numpy(np.stack([microbatch.token_ids_T, microbatch.targets_T]))
