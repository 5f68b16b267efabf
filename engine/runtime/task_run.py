"""One resident task on a backbone: its parameters, gradients, optimizer and what its current step has gathered.

All parameters of a task lie in one flat float32 buffer, adapters hold views of it: clipping, the optimizer and a
checkpoint are each one operation on one vector, whatever the number of operators. Legend: P parameters of the task.
"""

from dataclasses import dataclass, field

import torch

from engine.errors import NonFiniteError
from engine.peft import lora
from engine.peft.adapter import Adapter
from engine.runtime.backbone import Backbone
from engine.runtime.schedule import learning_rate
from engine.target_modules import matching_modules
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


class TaskRun:
    """Raises InvalidInputError if the task's target modules do not exist on the backbone."""

    def __init__(self, assignment: Assignment, backbone: Backbone) -> None:
        self.assignment = assignment
        self.training: Training = assignment.spec.training
        self.step = assignment.step
        self.gathered = Gathered()
        method = assignment.spec.method
        names = matching_modules(method.target_modules, backbone.operators)
        ops = [backbone.operators[name].op for name in names]
        shapes = {f"{op.name}.{key}": shape for op in ops for key, shape in lora.shapes(method, op).items()}
        self.parameters_P = torch.nn.Parameter(torch.zeros(sum(a * b for a, b in shapes.values())))
        self.parameters_P = torch.nn.Parameter(self.parameters_P.data.to(backbone.device))
        self.parameters_P.grad = torch.zeros_like(self.parameters_P)
        self.tensors = self._views(shapes)
        self.adapters: dict[str, Adapter] = {}
        for op in ops:
            tensors = {key: self.tensors[f"{op.name}.{key}"] for key in lora.shapes(method, op)}
            lora.initialise(method, op, self.training.seed, tensors)
            self.adapters[op.name] = lora.LoraAdapter(method, self.training.seed, tensors)
        self.optimizer = _optimizer(self.training, self.parameters_P)

    def _views(self, shapes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
        """Leaves that share the flat buffer's storage, with gradients that share its gradient's."""
        views, start = {}, 0
        assert self.parameters_P.grad is not None
        for name, (rows, columns) in shapes.items():
            part = slice(start, start + rows * columns)
            view = self.parameters_P.data[part].view(rows, columns).requires_grad_()
            view.grad = self.parameters_P.grad[part].view(rows, columns)
            views[name], start = view, part.stop
        return views

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
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        gradient_P.zero_()
        self.step += 1
        return rate, norm

    def restart_step(self) -> None:
        """Forgets what the step in flight has gathered: its microbatches will come again."""
        assert self.parameters_P.grad is not None
        self.parameters_P.grad.zero_()
        self.gathered = Gathered()

    def num_bytes(self) -> int:
        """Parameters, gradients and optimizer state, as allocated."""
        state = self.optimizer.state.get(self.parameters_P, {})
        held = [self.parameters_P, self.parameters_P.grad, *state.values()]
        return sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))


def _optimizer(training: Training, parameters_P: torch.nn.Parameter) -> torch.optim.Optimizer:
    if training.optimizer is Optimizer.SGD:
        return torch.optim.SGD(
            [parameters_P], lr=training.learning_rate, momentum=training.momentum, weight_decay=training.weight_decay
        )
    return torch.optim.AdamW(
        [parameters_P],
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.epsilon,
        weight_decay=training.weight_decay,
    )
