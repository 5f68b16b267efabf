"""A task between two steps, as bytes: resuming from it continues bit for bit.

Format: `state.safetensors` holds every adapter tensor under `parameters.<operator>.<tensor>` and the optimizer's flat
vectors under `optimizer.<group>.<name>`, a group being the parameters of one learning rate; what an adapter was started
from and still needs, under `started_from.<operator>.<tensor>`. The metadata says the task, the step and the shapes'
order. No pickle.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from engine.errors import ArtifactCorruptError

if TYPE_CHECKING:
    from engine.runtime.task_state import TaskTrainingState

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
    def of(cls, run: "TaskTrainingState") -> "CheckpointState":
        tensors = {f"parameters.{name}": tensor.detach() for name, tensor in run.tensors.items()}
        tensors |= {f"started_from.{name}": tensor for name, tensor in run.started_from.items()}
        tensors |= {f"optimizer.{name}": value for name, value in run.optimizer.state().items()}
        copies = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
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
    def restore(self, run: "TaskTrainingState") -> None:
        """Writes the state into a fresh run. Raises ArtifactCorruptError if its tensors are not the run's."""
        expected = {f"parameters.{name}": tuple(tensor.shape) for name, tensor in run.tensors.items()}
        expected |= {f"started_from.{name}": tuple(tensor.shape) for name, tensor in run.started_from.items()}
        if self.step > 0:
            expected |= {f"optimizer.{name}": shape for name, shape in run.optimizer.shapes().items()}
        found = {n: tuple(t.shape) for n, t in self.tensors.items()}
        if expected != found:
            odd = sorted(set(expected.items()) ^ set(found.items()))[:3]
            raise ArtifactCorruptError(f"checkpoint of {run.assignment.task} has other tensors: {odd}")
        for name, tensor in run.tensors.items():
            tensor.copy_(self.tensors[f"parameters.{name}"])
        for name, tensor in run.started_from.items():
            tensor.copy_(self.tensors[f"started_from.{name}"])
        state = {n.removeprefix("optimizer."): t for n, t in self.tensors.items() if n.startswith("optimizer.")}
        if state:
            run.optimizer.restore(state, self.step)
        run.step = self.step
