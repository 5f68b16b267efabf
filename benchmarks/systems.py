"""The systems that side_by_side.py compares: muxtune's engine, and those that a user would choose instead.

In each round a system takes one optimizer step of every task and returns the losses. All read equal rows and start from
the same adapters, which the engine exports and PEFT loads. Peers have good settings: SDPA attention, base weights
shared within a process, no dropout, no cache, torch's fused AdamW, batches built beforehand.

Legend: B sequences, T tokens of each, V vocabulary.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import DataCollatorWithFlattening

from benchmarks.workload import Rows, Work, Workload
from engine.alignment.microbatch import Microbatch
from engine.alignment.packing import PackedTask, one_round
from engine.results import StepResult
from engine.runtime.backbone import Backbone, sharing_copy
from engine.runtime.cuda_graphs import CudaGraphs
from engine.runtime.executor import Executor
from engine.runtime.task_state import TaskAssignment

Losses = dict[str, float]
Batch = dict[str, torch.Tensor]
MAX_GRAD_NORM = 1.0


class System(ABC):
    """A system under comparison. `num_tokens`: tokens that each round's forward passes read, padding included."""

    num_tokens: list[int]

    @abstractmethod
    def run(self, round_: int) -> Losses: ...


class Engine(System):
    """All tasks on one packed stream. `fuses` off: a microbatch holds one task's tokens only. `checkpoints`: activation
    checkpointing, layers run again in backward. `graphs`: how many CUDA graphs there may be. `packs`: weights, on a
    CPU."""

    def __init__(
        self, model: Any, workload: Workload, num_rounds: int, *, token_budget: int, chunk: int, fuses: bool = True,
        checkpoints: bool = False, graphs: int = 0, packs: bool = True,
    ) -> None:  # fmt: skip
        backbone = Backbone(model, activation_checkpointing=checkpoints, packs_weights=packs)
        self.executor = Executor(backbone, graphs=CudaGraphs.of(backbone, graphs))
        members = []
        for work in workload.tasks:
            self.executor.attach(TaskAssignment(work.name, work.spec, num_rounds))
            members.append(PackedTask(work.name, work.dataset, work.spec.training, num_rounds, 0))
        groups = [members] if fuses else [[member] for member in members]
        self.rounds: list[list[Microbatch]] = [
            [m for group in groups for m in one_round(r, [(member, r) for member in group], token_budget, chunk)]
            for r in range(num_rounds)
        ]
        self.num_tokens = [sum(m.num_tokens for m in microbatches) for microbatches in self.rounds]

    def export(self, folder: Path) -> None:
        for name in self.executor.tasks:
            self.executor.export(name, folder / name)

    def run(self, round_: int) -> Losses:
        results = [r for microbatch in self.rounds[round_] for r in self.executor.run(microbatch)]
        return {r.task: r.loss for r in results if isinstance(r, StepResult)}


class OneAfterAnother(System):
    """HF PEFT with one model for each task; they share the base weights. `padding`: longest, cap or flattened."""

    def __init__(self, model: Any, workload: Workload, num_rounds: int, adapters: Path, padding: str) -> None:
        self.trainers = [
            PeftTrainer(sharing_copy(model), work, num_rounds, adapters, padding) for work in workload.tasks
        ]
        self.num_tokens = [sum(t.batches[r]["input_ids"].numel() for t in self.trainers) for r in range(num_rounds)]

    def run(self, round_: int) -> Losses:
        return {trainer.name: trainer.step(round_) for trainer in self.trainers}


class PeftTrainer:
    """One task in HF PEFT, as its user would train it."""

    def __init__(self, model: Any, work: Work, num_rounds: int, adapters: Path, padding: str) -> None:
        self.name, device = work.name, model.device
        self.model = PeftModel.from_pretrained(model, adapters / work.name, is_trainable=True).train()
        self.optimizer = _adamw(self.model.parameters(), work)
        self.batches = [_batch(work.batch(r), padding, work.corpus.cap, device) for r in range(num_rounds)]

    def step(self, round_: int) -> float:
        loss = self.model(**self.batches[round_], use_cache=False).loss
        loss.backward()
        _take_step(self.optimizer)
        return float(loss.item())


class BatchAndPad(System):
    """All tasks as rows of one batch, padded to its longest: HF PEFT's mixed batch of adapters on one backbone.

    It is what the paper calls SL-PEFT. PEFT allows mixed batches in eval mode, which for LoRA without dropout computes
    the same as training.
    """

    def __init__(self, model: Any, workload: Workload, num_rounds: int, adapters: Path) -> None:
        first, *rest = workload.tasks
        self.model = PeftModel.from_pretrained(sharing_copy(model), adapters / first.name, first.name)
        for work in rest:
            self.model.load_adapter(adapters / work.name, work.name)
        self.tasks, self.optimizers = workload.tasks, {}
        for work in workload.tasks:
            parameters = [p.requires_grad_() for n, p in self.model.named_parameters() if f".{work.name}." in n]
            self.optimizers[work.name] = _adamw(parameters, work)
        self.model.eval()
        self.names = [work.name for work in workload.tasks for _ in range(workload.micro_batch_size)]
        self.batches = [
            _batch([row for work in workload.tasks for row in work.batch(r)], "longest", 0, model.device)
            for r in range(num_rounds)
        ]
        self.num_tokens = [batch["input_ids"].numel() for batch in self.batches]

    def run(self, round_: int) -> Losses:
        batch = dict(self.batches[round_])
        labels_BT = batch.pop("labels")
        logits_BTV = self.model(**batch, adapter_names=self.names, use_cache=False).logits
        losses, start = {}, 0
        for work in self.tasks:
            rows = slice(start, start + len(work.batch(round_)))
            losses[work.name] = torch.nn.functional.cross_entropy(
                logits_BTV[rows, :-1].flatten(0, 1).float(), labels_BT[rows, 1:].flatten()
            )
            start = rows.stop
        torch.stack(list(losses.values())).sum().backward()
        for optimizer in self.optimizers.values():
            _take_step(optimizer)
        return {name: float(loss.item()) for name, loss in losses.items()}


def _adamw(parameters: Any, work: Work) -> torch.optim.AdamW:
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(trained, lr=work.spec.training.learning_rate, weight_decay=0.0, fused=True)


def _take_step(optimizer: torch.optim.AdamW) -> None:
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()


def _batch(rows: Rows | list[Any], padding: str, cap: int, device: torch.device) -> Batch:
    if padding == "flattened":
        arrays = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": row.tolist()} for row in rows])
        return {name: tensor.to(device) for name, tensor in arrays.items()}
    width = cap if padding == "cap" else max(map(len, rows))
    ids, labels = np.zeros((len(rows), width), np.int64), np.full((len(rows), width), -100, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = labels[i, : len(row)] = row
    arrays = {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).astype(np.int64)}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
