"""Runs systems in separate processes: each task alone with its copy of the model, and any system for its peak bytes."""

import ctypes
import gc
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import trl_trainer
from benchmarks.models import Choice
from benchmarks.systems import BatchAndPad, Engine, Losses, OneAfterAnother, PeftTrainer, System
from benchmarks.workload import Workload
from engine.runtime.backbone import sharing_copy

_SPAWN = multiprocessing.get_context("spawn")  # CUDA wants it, and a fork would share the parent's pages


@dataclass(frozen=True)
class Setting:
    """The settings from which every process builds the same system."""

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
        self.workers = {task.name: _Worker(_train_alone, setting, i) for i, task in enumerate(setting.workload.tasks)}
        counts = [worker.receive() for worker in self.workers.values()]  # a worker sends its tokens once it is ready
        self.num_tokens = [sum(tokens) for tokens in zip(*counts, strict=True)]

    def run(self, round_: int) -> Losses:
        for worker in self.workers.values():
            worker.pipe.send(round_)
        return {name: worker.receive() for name, worker in self.workers.items()}

    def close(self) -> int:
        """End all workers. Return the sum of their peak bytes."""
        for worker in self.workers.values():
            worker.pipe.send(None)
        return sum(worker.join() for worker in self.workers.values())


class _Worker:
    """A separate process that runs `work(*arguments, pipe)`; `self.pipe` is the other end."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=work, args=(*arguments, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that a dead worker is an EOFError here, not a wait for ever

    def receive(self) -> Any:
        return self.pipe.recv()

    def join(self) -> int:
        """Wait for the process to end. Return its peak bytes."""
        peak: int = self.receive()
        self.process.join()
        return peak


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
    """Measures the peak memory of this process.

    On a CPU it is the growth of the resident set since this object was created, as Linux counts it, with pages that the
    allocator has freed and kept. On a GPU it is the memory that torch allocated.
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


@dataclass(frozen=True)
class Peaks:
    """Peak bytes of systems that each run `num_rounds` rounds alone.

    On a CPU a system runs in fresh processes; on a GPU in this one, on `model`, which is thus loaded once.
    """

    setting: Setting
    num_rounds: int
    model: Any

    def bytes_of(self, system: str) -> int:
        """Return the peak bytes of a system of SHARING or of "separate instances", the model's weights included."""
        setting = replace(self.setting, num_rounds=self.num_rounds)
        if system == "separate instances":
            instances = SeparateInstances(setting)
            for round_ in range(self.num_rounds):
                instances.run(round_)
            return instances.close()
        if setting.choice.device == "cuda":
            return _peak_here(setting, system, self.model)
        return _Worker(_measure, setting, system).join()


def _peak_here(setting: Setting, system: str, model: Any) -> int:
    release()  # what may be left of others is not counted
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    built = build(setting, system, model)
    for round_ in range(setting.num_rounds):
        built.run(round_)
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in tensors.values()) + torch.cuda.max_memory_allocated() - before


def _measure(setting: Setting, system: str, pipe: Connection) -> None:
    torch.set_num_threads(setting.threads)
    if system == trl_trainer.NAME:
        trl_trainer.load()  # as torch and PEFT are: no library counts as memory of a system
    memory = Peak(setting.choice.device)
    model = setting.choice.load()
    memory.forget_what_loading_took()
    built = build(setting, system, model)
    for round_ in range(setting.num_rounds):
        built.run(round_)
    pipe.send(memory.read_bytes())


def release() -> None:
    """Return unreferenced memory to the system."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc would keep it for this process
        libc.malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_room() -> None:
    """Release memory between turns if more than half of it is in use. Else each system finds what it freed in its turn
    before, as it would alone."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        is_half_full = 2 * free < total
    else:  # a lent GPU's machine need not have what the services import
        from services.execution.trainer.device_info import memory_bytes, used_bytes

        is_half_full = 2 * used_bytes("cpu") > memory_bytes("cpu")
    if is_half_full:
        release()


def build(setting: Setting, system: str, model: Any) -> System:
    """Build a system of SHARING, on copies of `model` that share its weights, or "separate instances"."""
    if system in ENGINES:
        return setting.engine(sharing_copy(model), **ENGINES[system])
    if system == "batch and pad":
        return setting.batch_and_pad(model)
    if system == "separate instances":
        return SeparateInstances(setting)
    if system == trl_trainer.NAME:
        return trl_trainer.Trl(model, setting.workload, setting.num_rounds, setting.adapters)
    return setting.one_after_another(model, system.removeprefix("peft, "))


ENGINES: dict[str, dict[str, Any]] = {
    "engine": {},
    "engine, fusion off": {"fuses": False},
    "engine, alignment off (chunk 1)": {"chunk": 1},
    "engine, chunk 256": {"chunk": 256},
    "engine, plain weights": {"packs": False},
    "engine, activation checkpointing": {"checkpoints": True},
    "engine, CUDA graphs": {"graphs": 16},
}
SHARING = (*ENGINES, "peft, longest", "peft, cap", "peft, flattened", trl_trainer.NAME, "batch and pad")
