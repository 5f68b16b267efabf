"""Training state of one resident task: parameters, gradients, optimizer and the totals of its current step.

All parameters of a task lie in one flat float32 buffer, and adapters hold views of it: clipping, the optimizer and a
checkpoint are each one operation on one vector, for any number of operators. Legend: P parameters of the task.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.errors import NonFiniteError
from engine.methods.base import Method
from engine.peft.registry import adapter_class
from engine.runtime.backbone import Backbone
from engine.runtime.gradient_buffer import GradientBuffer
from engine.runtime.lr_schedule import learning_rate
from engine.runtime.optimizer import TaskOptimizer, step_all
from engine.runtime.step_accumulator import StepAccumulator
from engine.task import TaskSpec, Training


@dataclass(frozen=True)
class TaskAssignment:
    """A task that an executor is to hold: `num_steps` in all, `step` done, and the attempt that may commit it."""

    task: str
    spec: TaskSpec
    num_steps: int
    attempt: int = 0
    step: int = 0


class TaskTrainingState:
    """State of one task on a backbone. Raises InvalidInputError if the backbone lacks what the task's method names."""

    def __init__(self, assignment: TaskAssignment, backbone: Backbone) -> None:
        self.assignment = assignment
        self.training: Training = assignment.spec.training
        self.step = assignment.step
        self.evaluated_step = -1  # the steps done at its last evaluation here
        self.accumulated = StepAccumulator()
        method = assignment.spec.method
        self.shapes = method.shapes(backbone.sites)
        size = sum(math.prod(shape) for tensors in self.shapes.values() for shape in tensors.values())
        self.parameters_P = torch.nn.Parameter(torch.zeros(size, device=backbone.device))
        self.gradient = GradientBuffer(size, backbone.device)
        self.parameters_P.grad = self.gradient.values_P
        self.tensors, parts = self._views(method)
        ops = [backbone.mounted[name].op for name in self.shapes]
        tensors = {site: {key: self.tensors[f"{site}.{key}"] for key in keys} for site, keys in self.shapes.items()}
        self.adapters = adapter_class(method).build(method, ops, self.training.seed, tensors)
        self.optimizer = TaskOptimizer(self.training, self.parameters_P.data, self.gradient_P, parts)

    @property
    def gradient_P(self) -> torch.Tensor:
        return self.gradient.values_P

    def _views(self, method: Method) -> tuple[dict[str, torch.Tensor], dict[float, slice]]:
        """Returns views of the flat buffers by name, and slices of the parameters by learning rate multiplier.

        The views are leaves: their gradients are views of the task's gradient.
        """
        sizes = {f"{site}.{key}": shape for site, keys in self.shapes.items() for key, shape in keys.items()}
        multipliers = {name: method.lr_multiplier(name.rpartition(".")[2]) for name in sizes}
        views, parts, start = {}, {}, 0
        for multiplier in dict.fromkeys(multipliers.values()):
            first = start
            for name, shape in sizes.items():
                if multipliers[name] == multiplier:
                    views[name] = self._view(slice(start, start + math.prod(shape)), shape)
                    start += math.prod(shape)
            parts[multiplier] = slice(first, start)
        return {name: views[name] for name in sizes}, parts

    def _view(self, part: slice, shape: tuple[int, ...]) -> torch.Tensor:
        view = self.parameters_P.data[part].view(shape).requires_grad_()
        view.grad = self.gradient_P[part].view(shape)
        return view

    @property
    def started_from(self) -> dict[str, torch.Tensor]:
        """Returns by name what the adapters were initialised from, if it cannot be computed again."""
        return {
            f"{site}.{key}": t for site, adapter in self.adapters.items() for key, t in adapter.started_from.items()
        }

    @property
    def is_verified(self) -> bool:
        """Returns whether the current step is to be run again for the task alone."""
        every = self.training.verify_every_steps
        return every > 0 and (self.step + 1) % every == 0

    def restart_step(self) -> None:
        """Discards the current step: its microbatches will come again. The device time that it took still counts."""
        self.gradient.clear()
        self.accumulated = StepAccumulator(seconds=self.accumulated.seconds)

    def num_bytes(self) -> int:
        """Returns the allocated bytes of parameters, gradients, optimizer state and the method's frozen tensors."""
        tensors = [self.parameters_P, self.gradient_P, *self.optimizer.moments.values()]
        frozen = (tensor for adapter in self.adapters.values() for tensor in adapter.frozen_tensors)
        tensors += {id(tensor): tensor for tensor in frozen}.values()  # adapters may share one
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class OptimizerStep(NamedTuple):
    """Learning rate of a step, and its gradient norm before clipping."""

    learning_rate: float
    grad_norm: float


def take_steps(states: Sequence[TaskTrainingState]) -> list[OptimizerStep | NonFiniteError]:
    """Runs clip, optimizer and schedule of all tasks at once.

    A task with a loss or gradient of NaN or Inf is left unchanged, and its result is the error that ends it.
    """
    rates = [learning_rate(state.training, state.step, state.assignment.num_steps) for state in states]
    pairs = list(zip(states, rates, strict=True))
    finite_rates = [rate if math.isfinite(state.accumulated.loss) else None for state, rate in pairs]
    norms = step_all([state.optimizer for state in states], finite_rates)
    return [_finish_step(*pair, norm) for pair, norm in zip(pairs, norms, strict=True)]


def _finish_step(state: TaskTrainingState, rate: float, norm: float) -> OptimizerStep | NonFiniteError:
    if not (math.isfinite(norm) and math.isfinite(state.accumulated.loss)):
        return NonFiniteError(
            f"Step {state.step + 1} has loss {state.accumulated.loss} and gradient norm {norm}. "
            "Lower the learning rate, or check the data of this step.",
            step=state.step + 1,
        )
    state.gradient.release()  # the optimizer has set it to zero
    state.step += 1
    return OptimizerStep(rate, norm)
