"""Switches the spans of a running mesh on and off: they are recorded while the first byte of the file that
MUXTUNE_TRACING_SWITCH names is not zero.

mesh_costs.py makes every process of its mesh import this module at its start.
"""

import mmap
import os
from functools import partialmethod
from typing import Any

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler, SamplingResult


class Switched(Sampler):
    """Reads the byte at every span: a few microseconds."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._byte = mmap.mmap(file.fileno(), 1, prot=mmap.PROT_READ)

    def should_sample(self, *args: Any, **keywords: Any) -> SamplingResult:
        return (ALWAYS_ON if self._byte[0] else ALWAYS_OFF).should_sample(*args, **keywords)

    def get_description(self) -> str:
        return "switched by a byte of a file"


if path := os.environ.get("MUXTUNE_TRACING_SWITCH"):
    TracerProvider.__init__ = partialmethod(TracerProvider.__init__, sampler=Switched(path))  # type: ignore
