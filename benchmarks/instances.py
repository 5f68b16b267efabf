"""Systems in processes of their own: each task alone with its copy of the model, and the peak memory of any system."""

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import Choice
from benchmarks.systems import BatchAndPad, Engine, Losses, OneAfterAnother, PeftTrainer, System
from benchmarks.workload import Workload
from engine.runtime.backbone import sharing_copy

_SPAWN = multiprocessing.get_context("spawn")  # CUDA wants it, and a fork would share the parent's pages


@dataclass(frozen=True)
class Setting:
    """What every process needs to build any system alike."""

    choice: Choice
    workload: Workload
    num_rounds: int
    adapters: Path
    token_budget: int
    chunk: int
    threads: int

    def engine(self, model: Any, **changes: Any) -> Engine:
        keywords = {"token_budget": self.token_budget, "chunk": self.chunk} | changes
        return Engine(model, self.workload, self.num_rounds, **keywords)

    def one_after_another(self, model: Any, padding: str) -> OneAfterAnother:
        return OneAfterAnother(model, self.workload, self.num_rounds, self.adapters, padding)

    def batch_and_pad(self, model: Any) -> BatchAndPad:
        return BatchAndPad(model, self.workload, self.num_rounds, self.adapters)


class SeparateInstances(System):
    """HF PEFT, all tasks at once, each in a process with its own copy of the model; threads are divided among them."""

    def __init__(self, setting: Setting) -> None:
        self.workers = [_Worker(setting, i) for i in range(len(setting.workload.tasks))]
        counts = [worker.told() for worker in self.workers]  # a worker tells its tokens once it is ready
        self.num_tokens = [sum(tokens) for tokens in zip(*counts, strict=True)]

    def run(self, round_: int) -> Losses:
        for worker in self.workers:
            worker.pipe.send(round_)
        return {worker.name: worker.told() for worker in self.workers}

    def close(self) -> int:
        """Ends them. The sum of their peak bytes."""
        for worker in self.workers:
            worker.pipe.send(None)
        peaks = [int(worker.told()) for worker in self.workers]
        for worker in self.workers:
            worker.process.join()
        return sum(peaks)


class _Worker:
    def __init__(self, setting: Setting, index: int) -> None:
        self.name = setting.workload.tasks[index].name
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_train_alone, args=(setting, index, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that a dead worker is an EOFError here, not a wait for ever

    def told(self) -> Any:
        return self.pipe.recv()


def _train_alone(setting: Setting, index: int, pipe: Connection) -> None:
    torch.set_num_threads(max(1, setting.threads // len(setting.workload.tasks)))
    memory = Peak(setting.choice.device)
    work = setting.workload.tasks[index]
    trainer = PeftTrainer(setting.choice.load(), work, setting.num_rounds, setting.adapters, "longest")
    memory.forget_what_loading_took()
    pipe.send([trainer.batches[r]["input_ids"].numel() for r in range(setting.num_rounds)])
    while (round_ := pipe.recv()) is not None:
        pipe.send(trainer.step(round_))
    pipe.send(memory.read_bytes())


class Peak:
    """The most memory that this process has held for its work: what it held when made is subtracted.

    On a CPU the resident set as Linux counts it, freed pages that the allocator keeps included; on a GPU what torch
    allocated.
    """

    def __init__(self, device: str) -> None:
        self.device, self.before = device, _status_bytes("VmRSS")

    def forget_what_loading_took(self) -> None:
        if self.device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
        else:
            torch.cuda.reset_peak_memory_stats()

    def read_bytes(self) -> int:
        if self.device == "cpu":
            return _status_bytes("VmHWM") - self.before
        return torch.cuda.max_memory_allocated()


def _status_bytes(field: str) -> int:
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) << 10


def peak_bytes(setting: Setting, system: str, rounds: Sequence[int]) -> int:
    """Of a system of SHARING or of "separate instances", in fresh processes."""
    if system == "separate instances":
        instances = SeparateInstances(setting)
        for round_ in rounds:
            instances.run(round_)
        return instances.close()
    mine, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_measure, args=(setting, system, tuple(rounds), theirs), daemon=True)
    process.start()
    theirs.close()
    peak: int = mine.recv()
    process.join()
    return peak


def _measure(setting: Setting, system: str, rounds: Sequence[int], pipe: Connection) -> None:
    torch.set_num_threads(setting.threads)
    memory = Peak(setting.choice.device)
    model = setting.choice.load()
    memory.forget_what_loading_took()
    built = build(setting, system, model)
    for round_ in rounds:
        built.run(round_)
    pipe.send(memory.read_bytes())


def build(setting: Setting, system: str, model: Any) -> System:
    """A system of SHARING, on copies of `model` that share its weights."""
    if system in ENGINES:
        return setting.engine(sharing_copy(model), **ENGINES[system])
    if system == "batch and pad":
        return setting.batch_and_pad(model)
    return setting.one_after_another(model, system.removeprefix("peft, "))


ENGINES: dict[str, dict[str, Any]] = {
    "engine": {},
    "engine, fusion off": {"fuses": False},
    "engine, chunk 256": {"chunk": 256},
    "engine, activation checkpointing": {"checkpoints": True},
    "engine, CUDA graphs": {"graphs": 16},
}
SHARING = (*ENGINES, "peft, longest", "peft, cap", "peft, flattened", "batch and pad")
