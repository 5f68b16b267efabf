"""A task between two steps, as bytes: resuming from it continues bit for bit.

Format: `state.safetensors` holds every adapter tensor under `parameters.<operator>.<tensor>` and the optimizer's flat
vectors under `optimizer.<name>`; the metadata says the task, the step and the shapes' order. No pickle.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from engine.errors import ArtifactCorruptError

if TYPE_CHECKING:
    from engine.runtime.task_run import TaskRun

STATE_FILE = "state.safetensors"


@dataclass(frozen=True)
class CheckpointState:
    """`tensors` are copies on the CPU; `metadata` is JSON: `task`, `step` and what the caller adds."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return int(self.metadata["step"])

    @classmethod
    def of(cls, run: "TaskRun") -> "CheckpointState":
        tensors = {f"parameters.{name}": tensor.detach() for name, tensor in run.tensors.items()}
        for name, value in run.optimizer.state.get(run.parameters_P, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{name}"] = value
        copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        return cls(copies, {"task": run.assignment.task, "step": run.step})

    def files(self) -> dict[str, bytes]:
        return {STATE_FILE: save(self.tensors)}

    @classmethod
    def from_files(cls, files: dict[str, bytes], metadata: dict[str, Any]) -> "CheckpointState":
        """Raises ArtifactCorruptError unless the file is there, whole, and knows its step."""
        try:
            return cls(load(files[STATE_FILE]), {**metadata, "step": int(metadata["step"])})
        except (KeyError, ValueError, SafetensorError) as error:
            raise ArtifactCorruptError(f"checkpoint cannot be read: {error}") from error

    @torch.no_grad()
    def restore(self, run: "TaskRun") -> None:
        """Writes the state into a fresh run. Raises ArtifactCorruptError if its tensors are not the run's."""
        expected = {f"parameters.{name}": tuple(tensor.shape) for name, tensor in run.tensors.items()}
        expected |= _optimizer_shapes(run) if self.step > 0 else {}
        found = {n: tuple(t.shape) for n, t in self.tensors.items()}
        if expected != found:
            odd = sorted(set(expected.items()) ^ set(found.items()))[:3]
            raise ArtifactCorruptError(f"checkpoint of {run.assignment.task} has other tensors: {odd}")
        for name, tensor in run.tensors.items():
            tensor.copy_(self.tensors[f"parameters.{name}"])
        state = {n.removeprefix("optimizer."): t for n, t in self.tensors.items() if n.startswith("optimizer.")}
        if state:
            device = run.parameters_P.device
            moved = {n: t.clone() if n == "step" else t.to(device, copy=True) for n, t in state.items()}
            run.optimizer.state[run.parameters_P] = moved
        run.step = self.step


def _optimizer_shapes(run: "TaskRun") -> dict[str, tuple[int, ...]]:
    """What torch's AdamW or SGD keeps for the run's flat parameters once it has stepped."""
    flat = tuple(run.parameters_P.shape)
    if isinstance(run.optimizer, torch.optim.AdamW):
        return {"optimizer.step": (), "optimizer.exp_avg": flat, "optimizer.exp_avg_sq": flat}
    return {"optimizer.momentum_buffer": flat} if run.training.momentum else {}
