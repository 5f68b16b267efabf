"""Trains in a new process and prints two peaks of its memory: `python process_peak.py FOLDER SPECS_JSON TOKENS`.

The first is what Linux measured, the second what the memory model predicts from the process's description of itself.
"""

import json
import sys
from pathlib import Path

import numpy as np

import services.execution.trainer.trainer as trainer
from engine.alignment.microbatch import Microbatch, MicrobatchKind, Range, Segment
from engine.methods import Lora
from engine.planning.cost.memory_model import total_bytes
from engine.runtime.backbone import Backbone
from engine.runtime.executor import Executor
from engine.runtime.footprint import measure
from engine.runtime.task_state import TaskAssignment
from engine.task import TaskSpec, Training
from services.conversion.plan import backbone_to_view
from services.execution.settings import ExecutionSettings
from services.execution.trainer.device_info import describe_backbone, used_bytes


def main(folder: str, ranks: list[int], num_tokens: int) -> None:
    trainer.torch.set_num_threads(1)
    settings = ExecutionSettings(mesh_secret="s", scheduling_address="", alignment_address="", artifact_url="",
                                 backbone=f"b={folder}")  # fmt: skip
    unloaded = used_bytes("cpu")
    backbone = Backbone.load(Path(folder))
    footprint = measure(backbone)
    process_bytes = max(unloaded, used_bytes("cpu") - backbone.held_bytes())
    view = backbone_to_view(describe_backbone(settings, backbone, footprint, process_bytes))
    specs = [TaskSpec("b", Lora(rank, 8.0, ("all-linear",)), "", Training(1e-3, num_steps=9)) for rank in ranks]
    train(Executor(backbone), specs, num_tokens)
    print(json.dumps({"peak": peak_bytes(), "predicted": total_bytes(specs, view, num_tokens * len(specs))}))


def train(executor: Executor, specs: list[TaskSpec], num_tokens: int) -> None:
    """Runs three steps of all tasks, each with one sequence of `num_tokens`."""
    for i, spec in enumerate(specs):
        executor.attach(TaskAssignment(str(i), spec, 9))
    for step in range(3):
        ids_T = np.random.default_rng(step).integers(0, 90, num_tokens * len(specs)).astype(np.int32)
        ranges = tuple(
            Range(str(i), step, i * num_tokens, num_tokens, (Segment(num_tokens, 0),), num_tokens, True)
            for i in range(len(specs))
        )
        executor.run(Microbatch(0, MicrobatchKind.TRAIN, ids_T, ids_T, ranges, False))


def peak_bytes() -> int:
    """Returns the largest resident set of this process so far."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
