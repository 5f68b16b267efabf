"""Defines what each stage of device_check.py gets, and its records: figures, with a `line` that says them in words."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.bench_multi_lora import Point, Widths

Record = dict[str, Any]
MANY, FEW = 16384, 2048  # tokens


@dataclass(frozen=True)
class Setting:
    """Holds what a stage needs. `seconds`: time that it has, from `started` (monotonic)."""

    device: torch.device
    launcher: Any
    is_dry: bool
    seconds: float
    started: float
    commit: str | None = None

    @property
    def remaining(self) -> float:
        return self.started + self.seconds - time.monotonic()

    @property
    def rounds(self) -> int:
        return 2 if self.is_dry else 15

    def tokens(self, count: int) -> int:
        return 70 if self.is_dry else count

    def group(self, width_in: int, widths_out: Sequence[int]) -> Widths:
        return (32, tuple(24 for _ in widths_out)) if self.is_dry else (width_in, tuple(widths_out))

    def point(self, name: str, groups: Sequence[Widths], num_tasks: int, ranks: tuple[int, ...]) -> Point:
        groups = tuple(self.group(*group) for group in groups)
        return Point(name, groups, self.tokens(MANY), min(num_tasks, 3) if self.is_dry else num_tasks, ranks)


def failure(what: str, error: Exception) -> Record:
    """Return the record of a part that failed; the stage goes on."""
    text = f"{type(error).__name__}: {error}"
    return {"error": text[:2000], "line": f"{what}: {text[:300]}"}
