"""Compares fused training with each task alone and reports the worst differences by method.

The references are HF PEFT, plain torch for methods that PEFT does not have, and this engine without neighbours.
"""

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from engine.alignment.packing import PackedTask, rounds
from engine.errors import InvalidInputError
from engine.results import StepResult
from engine.runtime.backbone import Backbone
from engine.runtime.executor import Executor
from engine.runtime.task_state import TaskAssignment
from engine.verification import plain
from engine.verification.cases import METHODS, OPTIONS, tasks
from engine.verification.reference import is_peft_format, train_alone

LOSS_GOAL, WEIGHT_GOAL = 1e-5, 1e-4
_TOKEN_BUDGET, _CHUNK_TOKENS = 256, 16
Losses = dict[str, list[float]]


@dataclass(frozen=True)
class Finding:
    """Worst differences over a method's steps. `loss_difference` is relative, `weight_difference` absolute.

    `own_rounding`: relative difference of the reference's losses in float32 and in float64; smaller differences mean
    nothing. None if the reference is this engine.
    """

    method: str
    against: str  # "peft alone", "torch alone" or "muxtune alone"
    options: str
    num_steps: int
    loss_difference: float
    weight_difference: float
    own_rounding: float | None = None

    @property
    def holds(self) -> bool:
        return self.loss_difference <= LOSS_GOAL and self.weight_difference <= WEIGHT_GOAL


@dataclass(frozen=True)
class UnsupportedMethod:
    """A method that the backbone does not support, and the reason."""

    method: str
    reason: str


def unsupported_methods(model: Any, names: list[str]) -> list[UnsupportedMethod]:
    """Returns the methods that the backbone does not support: it has no biases, or its attention has a window."""
    sites, refused = Backbone(copy.deepcopy(model)).sites, []
    for name in names:
        try:
            METHODS[name].shapes(sites)
        except InvalidInputError as error:
            refused.append(UnsupportedMethod(name, str(error)))
    return refused


def compare(model: Any, names: list[str], num_steps: int) -> Iterator[Finding]:
    """Compares all methods in one batch with each alone, for each optimizer, accumulation and schedule.

    The backbone must support the methods: see `unsupported_methods`.
    """
    for options, training in OPTIONS.items():
        vocab = model.config.get_text_config().vocab_size
        pairs = list(tasks(names, num_steps, vocab, **training))
        with tempfile.TemporaryDirectory() as folder:
            before, after = Path(folder) / "before", Path(folder) / "after"
            losses = _train(model, pairs, before, after)
            for assignment, member in pairs:
                name = assignment.task
                exported = load_file(after / name / "adapter_model.safetensors")
                against = "peft alone" if is_peft_format(before / name) else "torch alone"
                reference = train_alone(model, before / name, member)
                exact, _ = train_alone(copy.deepcopy(model).double(), before / name, member)
                rounding = _worst(reference[0], exact)
                yield _finding(name, against, options, losses[name], exported, *reference, rounding)
                alone = _train(model, [(assignment, member)], before / "alone", after / "alone")[name]
                weights = load_file(after / "alone" / name / "adapter_model.safetensors")
                yield _finding(name, "muxtune alone", options, losses[name], exported, alone, weights)


def _train(model: Any, pairs: list[tuple[TaskAssignment, PackedTask]], before: Path, after: Path) -> Losses:
    """Trains the tasks and exports their adapters before and after. Returns the losses of each step by task."""
    executor = Executor(Backbone(copy.deepcopy(model)), tenant_loader=plain.apply_adapter)
    losses: Losses = {}
    for assignment, _ in pairs:
        executor.attach(assignment)
        executor.export(assignment.task, before / assignment.task)
        losses[assignment.task] = []
    for microbatch in rounds([member for _, member in pairs], _TOKEN_BUDGET, _CHUNK_TOKENS):
        for result in executor.run(microbatch):
            if not isinstance(result, StepResult):
                raise RuntimeError(f"{result.task} did not train: {result}")
            losses[result.task].append(result.loss)
    for assignment, _ in pairs:
        executor.export(assignment.task, after / assignment.task)
    return losses


def _finding(
    name: str,
    against: str,
    options: str,
    losses: list[float],
    weights: dict[str, torch.Tensor],
    expected_losses: list[float],
    expected_weights: dict[str, torch.Tensor],
    own_rounding: float | None = None,
) -> Finding:
    if weights.keys() != expected_weights.keys() or len(losses) != len(expected_losses):
        raise RuntimeError(f"{name} has other tensors or steps than {against}")
    weight = max((weights[key] - expected_weights[key]).abs().max().item() for key in weights)
    return Finding(name, against, options, len(losses), _worst(losses, expected_losses), weight, own_rounding)


def _worst(losses: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
