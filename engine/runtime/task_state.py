"""One resident task on a backbone: its parameters, gradients, optimizer and what its current step has gathered.

All parameters of a task lie in one flat float32 buffer, adapters hold views of it: clipping, the optimizer and a
checkpoint are each one operation on one vector, whatever the number of operators. Legend: P parameters of the task.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from engine.alignment.microbatch import Microbatch
from engine.alignment.step_digest import StepDigest
from engine.errors import NonFiniteError
from engine.methods.base import Method
from engine.peft.registry import adapter_class
from engine.runtime.backbone import Backbone
from engine.runtime.gradient_buffer import GradientBuffer
from engine.runtime.lr_schedule import learning_rate
from engine.runtime.optimizer import TaskOptimizer, step_all
from engine.task import TaskSpec, Training


@dataclass(frozen=True)
class TaskAssignment:
    """A task as an executor is to hold it: `num_steps` in all, `step` done, and the attempt that may commit it."""

    task: str
    spec: TaskSpec
    num_steps: int
    attempt: int = 0
    step: int = 0


@dataclass
class StepAccumulator:
    """What the microbatches of the step in flight have added up to."""

    loss: float = 0.0
    num_effective_tokens: int = 0
    num_target_tokens: int = 0
    num_padding_tokens: int = 0
    seconds: float = 0.0
    neighbours: set[str] = field(default_factory=set)
    digest: StepDigest = field(default_factory=StepDigest)
    alone: list[Microbatch] = field(default_factory=list)  # the task's own ranges, where the step is to be verified


class TaskTrainingState:
    """Raises InvalidInputError if what the task's method names does not exist on the backbone."""

    def __init__(self, assignment: TaskAssignment, backbone: Backbone) -> None:
        self.assignment = assignment
        self.training: Training = assignment.spec.training
        self.step = assignment.step
        self.gathered = StepAccumulator()
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
        """Leaves by name, views of the flat buffer, as their gradients are of its gradient; and by factor of the
        learning rate, the parameters that share it.
        """
        sizes = {f"{site}.{key}": shape for site, keys in self.shapes.items() for key, shape in keys.items()}
        factors = {name: method.lr_multiplier(name.rpartition(".")[2]) for name in sizes}
        views, parts, start = {}, {}, 0
        for factor in dict.fromkeys(factors.values()):
            first = start
            for name, shape in sizes.items():
                if factors[name] == factor:
                    views[name] = self._view(slice(start, start + math.prod(shape)), shape)
                    start += math.prod(shape)
            parts[factor] = slice(first, start)
        return {name: views[name] for name in sizes}, parts

    def _view(self, part: slice, shape: tuple[int, ...]) -> torch.Tensor:
        view = self.parameters_P.data[part].view(shape).requires_grad_()
        view.grad = self.gradient_P[part].view(shape)
        return view

    @property
    def started_from(self) -> dict[str, torch.Tensor]:
        """By name, what the adapters were started from and could not make anew elsewhere."""
        return {
            f"{site}.{key}": t for site, adapter in self.adapters.items() for key, t in adapter.started_from.items()
        }

    @property
    def is_verified(self) -> bool:
        """Whether the step in flight is to be run again for the task alone."""
        every = self.training.verify_every_steps
        return every > 0 and (self.step + 1) % every == 0

    def restart_step(self) -> None:
        """Forgets what the step in flight has gathered: its microbatches will come again."""
        self.gradient.clear()
        self.gathered = StepAccumulator()

    def num_bytes(self) -> int:
        """Parameters, gradients, optimizer state and what the method holds frozen, as allocated."""
        held = [self.parameters_P, self.gradient_P, *self.optimizer.moments.values()]
        held += {id(tensor): tensor for adapter in self.adapters.values() for tensor in adapter.frozen_tensors}.values()
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def take_steps(runs: Sequence[TaskTrainingState]) -> list[tuple[float, float] | NonFiniteError]:
    """Clip, optimizer and schedule of all tasks at once: (learning rate, gradient norm before clipping) of each.

    Or, where the loss or the gradient is NaN or Inf, the error that ends this task; nothing of it is written then.
    """
    rates = [learning_rate(run.training, run.step, run.assignment.num_steps) for run in runs]
    allowed = [rate if math.isfinite(run.gathered.loss) else None for run, rate in zip(runs, rates, strict=True)]
    norms = step_all([run.optimizer for run in runs], allowed)
    return [_stepped(run, rate, norm) for run, rate, norm in zip(runs, rates, norms, strict=True)]


def _stepped(run: TaskTrainingState, rate: float, norm: float) -> tuple[float, float] | NonFiniteError:
    if not (math.isfinite(norm) and math.isfinite(run.gathered.loss)):
        return NonFiniteError(
            f"step {run.step + 1}: loss {run.gathered.loss}, gradient norm {norm}; lower the learning rate or "
            "look at the data of this step",
            step=run.step + 1,
        )
    run.gradient.give_back()  # the optimizer has made it zero
    run.step += 1
    return rate, norm
