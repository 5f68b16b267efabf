"""Copies from the host to the device that the host does not wait for."""

import torch


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies the tensor to the device, in the order of the device's current stream. The copy starts from pinned memory,
    so the host does not wait for it.

    Raises RuntimeError while a graph is captured: each replay would read the host's memory again.
    """
    if device.type != "cuda":
        return host.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("to_device was called while a CUDA graph is captured: upload the tensor before the capture")
    return host.pin_memory().to(device, non_blocking=True)
