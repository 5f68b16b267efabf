"""Goals of side_by_side.py and their verdicts: a goal that is missed is printed as failed."""

import operator
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Summary = Mapping[str, Mapping[str, Any]]  # by system: a row of side_by_side.summary


@dataclass(frozen=True)
class Goal:
    """A goal: the `figure` of a workload is at least `bound`, or at most."""

    what: str
    bound: float
    figure: Callable[[Mapping[str, Any], Summary], float | None]
    is_at_most: bool = False

    def verdict(self, work: Mapping[str, Any], summary: Summary) -> str:
        value = self.figure(work, summary)
        if value is None:
            return f"{self.what}: not measured"
        is_held = (operator.le if self.is_at_most else operator.ge)(value, self.bound)
        most = "at most " if self.is_at_most else ""
        return f"{self.what} {value:.2f} of {most}{self.bound:g}: {'held' if is_held else 'FAILED'}"


def faster_than(system: str, bound: float) -> Goal:
    return Goal(f"times as fast as {system}", bound, lambda _, summary: summary.get(system, {}).get("ratio"))


def bytes_of_one(bound: float) -> Goal:
    return Goal("times the bytes of one task", bound, lambda work, _: _over(work, "engine", "one task"), True)


def fewer_than_instances(bound: float) -> Goal:
    return Goal(
        "times fewer bytes than separate instances", bound, lambda work, _: _over(work, "separate instances", "engine")
    )


def teraflops(bound: float) -> Goal:
    return Goal("TFLOP/s", bound, lambda _, summary: summary["engine"]["teraflops"])


def _over(work: Mapping[str, Any], system: str, base: str) -> float | None:
    peaks: dict[str, float] = {"one task": statistics.mean(work["peak_bytes_alone"]), **work["peak_bytes"]}
    return peaks[system] / peaks[base] if system in peaks and base in peaks else None


# model, mix, tasks, sequences of a micro batch. Those of a GPU follow the paper; those of a CPU are ours.
GOALS: Mapping[tuple[str, str, int, int], tuple[Goal, ...]] = {
    ("smollm2", "mixed", 8, 4): (faster_than("peft, longest", 1.4), faster_than("peft, cap", 1.9), bytes_of_one(1.5)),
    ("llama-2-7b", "mixed", 8, 8): (faster_than("peft, longest", 2.5), faster_than("batch and pad", 2.0)),
    ("llama-2-7b", "mixed", 32, 8): (teraflops(500.0), bytes_of_one(1.3), fewer_than_instances(5.3)),
    ("llama-3.2-1b", "sst2", 8, 1): (faster_than("peft, longest", 4.0),),
}
