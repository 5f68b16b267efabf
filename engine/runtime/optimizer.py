"""Steps the optimizers of all tasks at once: clip, then AdamW or SGD, each with the task's own hyperparameters.

One launch computes the norms of all gradients, one steps all AdamW tasks whose gradient is finite, and one copy brings
the norms to the host. SGD is rare: torch steps one task after the other. The results are those of torch's optimizers
after clip_grad_norm_. Legend: U tasks, P parameters of one.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from engine.kernels.multi_adamw import AdamWGroup, multi_adamw
from engine.kernels.multi_grad_norm import multi_grad_norm
from engine.task import Optimizer, Training

State = dict[str, torch.Tensor]


class TaskOptimizer:
    """State of one task's optimizer: float32 vectors as long as its parameters, allocated at the start.

    `parts`: parameters by multiplier of the learning rate. `count`: number of steps taken.
    """

    def __init__(
        self, training: Training, parameters_P: torch.Tensor, gradients_P: torch.Tensor, parts: Mapping[float, slice]
    ) -> None:
        self.training, self.parts, self.count = training, parts, 0
        self.parameters_P, self.gradients_P = parameters_P, gradients_P
        names = ["momentum_buffer"] if training.momentum else []
        if training.optimizer is Optimizer.ADAMW:
            names = ["exp_avg", "exp_avg_sq"]
        self.moments = {name: torch.zeros_like(parameters_P) for name in names}

    def state(self) -> State:
        """Returns the state as torch names it, by `<number of the part>.<name>`; empty before the first step."""
        return self._tensors() if self.count else {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of `state` after a step."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors().items()}

    def _tensors(self) -> State:
        tensors = {}
        for i, part in enumerate(self.parts.values()):
            if self.training.optimizer is Optimizer.ADAMW:
                tensors[f"{i}.step"] = torch.tensor(float(self.count))
            tensors |= {f"{i}.{name}": moments_P[part] for name, moments_P in self.moments.items()}
        return tensors

    def restore(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        """Restores the `state` of an optimizer with the same shapes, whose task had taken `step` steps."""
        self.count = int(state["0.step"]) if "0.step" in state else step
        for i, part in enumerate(self.parts.values()):
            for name, moments_P in self.moments.items():
                moments_P[part] = state[f"{i}.{name}"]

    def groups(self, norm_index: int, rate: float) -> list[AdamWGroup]:
        """Returns the groups of the next AdamW step. `norm_index`: position of the task's norm."""
        training, moments = self.training, self.moments
        return [
            AdamWGroup(
                norm_index, self.parameters_P[part], self.gradients_P[part],
                moments["exp_avg"][part], moments["exp_avg_sq"][part],
                step=self.count + 1, learning_rate=rate * multiplier, weight_decay=training.weight_decay,
                beta1=training.beta1, beta2=training.beta2, epsilon=training.epsilon, max_norm=training.max_grad_norm,
            )
            for multiplier, part in self.parts.items()
        ]  # fmt: skip

    def step_sgd(self, rate: float, norm: float) -> None:
        """Computes v = momentum v + g' + decay p;  p -= lr v, with the clipped gradient g'.

        Sets the gradient to zero.
        """
        training, p, g = self.training, self.parameters_P, self.gradients_P
        if training.max_grad_norm > 0:
            g.mul_(min(1.0, training.max_grad_norm / (norm + 1e-6)))
        g.add_(p, alpha=training.weight_decay)
        v = self.moments["momentum_buffer"].mul_(training.momentum).add_(g) if training.momentum else g
        for multiplier, part in self.parts.items():
            p[part].add_(v[part], alpha=-rate * multiplier)
        g.zero_()


@torch.no_grad()
def step_all(optimizers: Sequence[TaskOptimizer], rates: Sequence[float | None]) -> list[float]:
    """Steps all optimizers, which are on one device. Returns the gradient norms before clipping.

    A task without a rate or without a finite norm is not stepped. If memory is short, no task is stepped: nothing is
    allocated after the first step.
    """
    if not optimizers:
        return []
    norms_U, is_finite_U = multi_grad_norm([optimizer.gradients_P for optimizer in optimizers])
    is_adamw = [optimizer.training.optimizer is Optimizer.ADAMW for optimizer in optimizers]
    groups = [
        group
        for i, (optimizer, rate) in enumerate(zip(optimizers, rates, strict=True))
        if is_adamw[i] and rate is not None
        for group in optimizer.groups(i, rate)
    ]
    multi_adamw(groups, norms_U, is_finite_U)
    norms: list[float] = norms_U.tolist()  # the only copy to the host and the only wait for the device
    for optimizer, rate, norm, was_stepped in zip(optimizers, rates, norms, is_adamw, strict=True):
        if rate is None or not math.isfinite(norm):
            continue
        if not was_stepped:
            optimizer.step_sgd(rate, norm)
        optimizer.count += 1
    return norms
