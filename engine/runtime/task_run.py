"""One resident task on a backbone: its parameters, gradients, optimizer and what its current step has gathered.

All parameters of a task lie in one flat float32 buffer, adapters hold views of it: clipping, the optimizer and a
checkpoint are each one operation on one vector, whatever the number of operators. Legend: P parameters of the task.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from engine.alignment.microbatch import Microbatch
from engine.errors import NonFiniteError
from engine.method import Method, Shapes
from engine.peft.table import adapter_class
from engine.runtime.backbone import Backbone
from engine.runtime.schedule import learning_rate
from engine.task import Optimizer, TaskSpec, Training


@dataclass(frozen=True)
class Assignment:
    """A task as an executor is to hold it: `num_steps` in all, `step` done, and the attempt that may commit it."""

    task: str
    spec: TaskSpec
    num_steps: int
    attempt_epoch: int = 0
    step: int = 0


@dataclass
class Gathered:
    """What the microbatches of the step in flight have added up to."""

    loss: float = 0.0
    num_effective_tokens: int = 0
    num_target_tokens: int = 0
    num_padding_tokens: int = 0
    seconds: float = 0.0
    neighbours: set[str] = field(default_factory=set)
    alone: list[Microbatch] = field(default_factory=list)  # the task's own ranges, where the step is to be verified


class TaskRun:
    """Raises InvalidInputError if what the task's method names does not exist on the backbone."""

    def __init__(self, assignment: Assignment, backbone: Backbone) -> None:
        self.assignment = assignment
        self.training: Training = assignment.spec.training
        self.step = assignment.step
        self.gathered = Gathered()
        method = assignment.spec.method
        self.shapes = method.shapes(backbone.sites)
        self.parameters_P = _zeros(self.shapes, backbone.device)
        self.tensors, self._groups = self._views(method)
        ops = [backbone.mounted[name].op for name in self.shapes]
        tensors = {site: {key: self.tensors[f"{site}.{key}"] for key in keys} for site, keys in self.shapes.items()}
        self.adapters = adapter_class(method).build(method, ops, self.training.seed, tensors)
        self.optimizer = _optimizer(self.training, self._groups)

    def _views(self, method: Method) -> tuple[dict[str, torch.Tensor], dict[float, torch.nn.Parameter]]:
        """Leaves by name, and the parameters that share a learning rate by its factor: all views of the flat buffer.

        Their gradients are views of its gradient.
        """
        assert self.parameters_P.grad is not None
        sizes = {f"{site}.{key}": shape for site, keys in self.shapes.items() for key, shape in keys.items()}
        factors = {name: method.rate_factor(name.rpartition(".")[2]) for name in sizes}
        views, groups, start = {}, {}, 0
        for factor in dict.fromkeys(factors.values()):
            first = start
            for name, shape in sizes.items():
                if factors[name] == factor:
                    views[name] = self._view(slice(start, start + math.prod(shape)), shape)
                    start += math.prod(shape)
            part = slice(first, start)
            groups[factor] = torch.nn.Parameter(self.parameters_P.data[part])
            groups[factor].grad = self.parameters_P.grad[part]
        return {name: views[name] for name in sizes}, groups

    def _view(self, part: slice, shape: tuple[int, ...]) -> torch.Tensor:
        assert self.parameters_P.grad is not None
        view = self.parameters_P.data[part].view(shape).requires_grad_()
        view.grad = self.parameters_P.grad[part].view(shape)
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

    def take_step(self) -> tuple[float, float]:
        """Clip, optimizer, schedule. (learning rate, gradient norm before clipping).

        Raises NonFiniteError, with nothing written, if the loss or a gradient is NaN or Inf.
        """
        gradient_P = self.parameters_P.grad
        assert gradient_P is not None
        norm = torch.linalg.vector_norm(gradient_P).item()
        if not (torch.isfinite(torch.tensor([norm, self.gathered.loss])).all()):
            raise NonFiniteError(
                f"step {self.step + 1}: loss {self.gathered.loss}, gradient norm {norm}; lower the learning rate or "
                "look at the data of this step",
                step=self.step + 1,
            )
        if self.training.max_grad_norm > 0:
            gradient_P.mul_(min(1.0, self.training.max_grad_norm / (norm + 1e-6)))  # as clip_grad_norm_
        rate = learning_rate(self.training, self.step, self.assignment.num_steps)
        for factor, group in zip(self._groups, self.optimizer.param_groups, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        gradient_P.zero_()
        self.step += 1
        return rate, norm

    def restart_step(self) -> None:
        """Forgets what the step in flight has gathered: its microbatches will come again."""
        assert self.parameters_P.grad is not None
        self.parameters_P.grad.zero_()
        self.gathered = Gathered()

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """What the optimizer keeps, by `<number of the group>.<name>`; empty before the first step."""
        states = [self.optimizer.state.get(group, {}) for group in self._groups.values()]
        return {
            f"{i}.{name}": value
            for i, state in enumerate(states)
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
        }

    def optimizer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of `optimizer_state` once the optimizer has stepped: what torch's AdamW or SGD keeps."""
        flats = [tuple(group.shape) for group in self._groups.values()]
        if isinstance(self.optimizer, torch.optim.AdamW):
            kept = [{"step": (), "exp_avg": flat, "exp_avg_sq": flat} for flat in flats]
        else:
            kept = [{"momentum_buffer": flat} if self.training.momentum else {} for flat in flats]
        return {f"{i}.{name}": shape for i, state in enumerate(kept) for name, shape in state.items()}

    def restore_optimizer(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes `optimizer_state` of another run of the same shapes. `step` stays on the CPU, as torch keeps it."""
        for i, group in enumerate(self._groups.values()):
            own = {name.partition(".")[2]: t for name, t in state.items() if name.partition(".")[0] == str(i)}
            moved = {n: t.clone() if n == "step" else t.to(group.device, copy=True) for n, t in own.items()}
            self.optimizer.state[group] = moved

    def num_bytes(self) -> int:
        """Parameters, gradients, optimizer state and what the method holds frozen, as allocated."""
        held = [self.parameters_P, self.parameters_P.grad, *self.optimizer_state().values()]
        held += {id(tensor): tensor for adapter in self.adapters.values() for tensor in adapter.frozen}.values()
        return sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))


def _zeros(shapes: Shapes, device: torch.device) -> torch.nn.Parameter:
    """[P] and its gradient, both zero."""
    size = sum(math.prod(shape) for tensors in shapes.values() for shape in tensors.values())
    parameters_P = torch.nn.Parameter(torch.zeros(size, device=device))
    parameters_P.grad = torch.zeros_like(parameters_P)
    return parameters_P


def _optimizer(training: Training, groups: Mapping[float, torch.nn.Parameter]) -> torch.optim.Optimizer:
    parameters = [{"params": [group], "lr": training.learning_rate * factor} for factor, group in groups.items()]
    if training.optimizer is Optimizer.SGD:
        return torch.optim.SGD(parameters, momentum=training.momentum, weight_decay=training.weight_decay)
    betas = (training.beta1, training.beta2)
    return torch.optim.AdamW(parameters, betas=betas, eps=training.epsilon, weight_decay=training.weight_decay)
