"""Checkpoint of a task between two steps; a task resumed from it continues bit for bit.

Format: `state.safetensors` holds every adapter tensor as `parameters.<operator>.<tensor>`, the optimizer's flat vectors
as `optimizer.<group>.<name>`, where a group has the parameters of one learning rate, and what an adapter was
initialised from and still needs as `started_from.<operator>.<tensor>`. The metadata has the task and the step. There is
no pickle.
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
    """State of a task. `tensors`: copies on the CPU. `metadata`: JSON with `task`, `step` and what the caller adds."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return int(self.metadata["step"])

    @classmethod
    def of(cls, task_state: "TaskTrainingState") -> "CheckpointState":
        tensors = {f"parameters.{name}": tensor.detach() for name, tensor in task_state.tensors.items()}
        tensors |= {f"started_from.{name}": tensor for name, tensor in task_state.started_from.items()}
        tensors |= {f"optimizer.{name}": value for name, value in task_state.optimizer.state().items()}
        copies = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        return cls(copies, {"task": task_state.assignment.task, "step": task_state.step})

    def files(self) -> dict[str, bytes]:
        return {STATE_FILE: save(self.tensors)}

    @classmethod
    def from_files(cls, files: dict[str, bytes], metadata: dict[str, Any]) -> "CheckpointState":
        """Reads a checkpoint.

        Raises ArtifactCorruptError if the file or the step is missing, or the file is incomplete.
        """
        try:
            return cls(load(files[STATE_FILE]), {**metadata, "step": int(metadata["step"])})
        except (KeyError, ValueError, SafetensorError) as error:
            raise ArtifactCorruptError(f"the checkpoint cannot be read: {error}") from error

    @torch.no_grad()
    def restore(self, task_state: "TaskTrainingState") -> None:
        """Writes the state into a new task. Raises ArtifactCorruptError if its tensors have other names or shapes."""
        expected = {f"parameters.{name}": tuple(tensor.shape) for name, tensor in task_state.tensors.items()}
        expected |= {f"started_from.{name}": tuple(tensor.shape) for name, tensor in task_state.started_from.items()}
        if self.step > 0:
            expected |= {f"optimizer.{name}": shape for name, shape in task_state.optimizer.shapes().items()}
        shapes = {n: tuple(t.shape) for n, t in self.tensors.items()}
        if expected != shapes:
            different = sorted(set(expected.items()) ^ set(shapes.items()))[:3]
            raise ArtifactCorruptError(f"the checkpoint of {task_state.assignment.task} has other tensors: {different}")
        for name, tensor in task_state.tensors.items():
            tensor.copy_(self.tensors[f"parameters.{name}"])
        for name, tensor in task_state.started_from.items():
            tensor.copy_(self.tensors[f"started_from.{name}"])
        state = {n.removeprefix("optimizer."): t for n, t in self.tensors.items() if n.startswith("optimizer.")}
        if state:
            task_state.optimizer.restore(state, self.step)
        task_state.step = self.step
