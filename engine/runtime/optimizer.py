"""The optimizers of all tasks whose step is complete, stepped at once: clip, then AdamW or SGD, each by its own rates.

One launch gives the norms of all gradients, one steps all tasks of AdamW and leaves those alone whose gradient is not
finite, one copy takes the norms to the host. SGD (few use it) follows by torch, a task at a time. As torch's optimizers
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
    """What one task's optimizer keeps: float32 vectors as long as its parameters, there from the start.

    `parts`: by factor of the learning rate, the parameters that go by it. `count`: steps taken.
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
        """As torch keeps it, by `<number of the part>.<name>`; empty before the first step."""
        return self._kept() if self.count else {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of `state` after a step."""
        return {name: tuple(tensor.shape) for name, tensor in self._kept().items()}

    def _kept(self) -> State:
        kept = {}
        for i, part in enumerate(self.parts.values()):
            if self.training.optimizer is Optimizer.ADAMW:
                kept[f"{i}.step"] = torch.tensor(float(self.count))
            kept |= {f"{i}.{name}": moments_P[part] for name, moments_P in self.moments.items()}
        return kept

    def restore(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        """Takes the `state` of another one of the same shapes, whose task had taken `step` steps."""
        self.count = int(state["0.step"]) if "0.step" in state else step
        for i, part in enumerate(self.parts.values()):
            for name, moments_P in self.moments.items():
                moments_P[part] = state[f"{i}.{name}"]

    def groups(self, place: int, rate: float) -> list[AdamWGroup]:
        """The next step of AdamW; `place`: of the task's norm."""
        training, moments = self.training, self.moments
        return [
            AdamWGroup(
                place, self.parameters_P[part], self.gradients_P[part],
                moments["exp_avg"][part], moments["exp_avg_sq"][part],
                step=self.count + 1, learning_rate=rate * factor, weight_decay=training.weight_decay,
                beta1=training.beta1, beta2=training.beta2, epsilon=training.epsilon, max_norm=training.max_grad_norm,
            )
            for factor, part in self.parts.items()
        ]  # fmt: skip

    def step_sgd(self, rate: float, norm: float) -> None:
        """v = momentum v + g' + decay p;  p -= lr v, with g' clipped as AdamW's; the gradient becomes zero."""
        training, p, g = self.training, self.parameters_P, self.gradients_P
        if training.max_grad_norm > 0:
            g.mul_(min(1.0, training.max_grad_norm / (norm + 1e-6)))
        g.add_(p, alpha=training.weight_decay)
        v = self.moments["momentum_buffer"].mul_(training.momentum).add_(g) if training.momentum else g
        for factor, part in self.parts.items():
            p[part].add_(v[part], alpha=-rate * factor)
        g.zero_()


@torch.no_grad()
def step_all(optimizers: Sequence[TaskOptimizer], rates: Sequence[float | None]) -> list[float]:
    """Gradient norms before clipping. Untouched stays who has no rate, or no finite norm. All on one device.

    Where it finds no memory, nobody has stepped: nothing is asked for once the first has.
    """
    if not optimizers:
        return []
    norms_U, is_finite_U = multi_grad_norm([optimizer.gradients_P for optimizer in optimizers])
    by_adamw = [optimizer.training.optimizer is Optimizer.ADAMW for optimizer in optimizers]
    groups = [
        group
        for place, (optimizer, rate) in enumerate(zip(optimizers, rates, strict=True))
        if by_adamw[place] and rate is not None
        for group in optimizer.groups(place, rate)
    ]
    multi_adamw(groups, norms_U, is_finite_U)
    norms: list[float] = norms_U.tolist()  # the only copy to the host, and the only wait for the device
    for optimizer, rate, norm, is_done in zip(optimizers, rates, norms, by_adamw, strict=True):
        if rate is None or not math.isfinite(norm):
            continue
        if not is_done:
            optimizer.step_sgd(rate, norm)
        optimizer.count += 1
    return norms
