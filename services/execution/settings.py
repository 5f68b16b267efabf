"""Settings of the execution service; its servicer and its trainer process read the same ones."""

from dataclasses import dataclass
from pathlib import Path

from services.config import ServerSettings, SettingsError


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings(ServerSettings):
    """`backbone`: NAME=FOLDER, a folder as services.execution.prepare leaves it. A zero stands for a default.

    `advertise_address`: where scheduling reaches this executor (default: where it listens). `memory_bytes`: what it may
    use (default: all there is). `num_threads`: of torch on a CPU (default: all cores). A task is checkpointed after
    `checkpoint_steps` steps or `checkpoint_seconds` seconds, whichever comes first (0: not for that reason).
    """

    scheduling_address: str
    alignment_address: str
    artifact_url: str
    backbone: str
    executor_name: str = "local"
    advertise_address: str = ""
    dtype: str = "float32"
    device: str = ""
    memory_bytes: int = 0
    num_threads: int = 0
    checkpoint_steps: int = 50
    checkpoint_seconds: float = 60.0
    max_unacknowledged: int = 64
    drain_seconds: float = 30.0

    @property
    def resource_name(self) -> str:
        return f"executors/{self.executor_name}"

    def backbone_name_and_folder(self) -> tuple[str, Path]:
        name, separator, folder = self.backbone.partition("=")
        if not (name and separator and folder):
            raise SettingsError(f'MUXTUNE_BACKBONE: "{self.backbone}" is not NAME=FOLDER')
        return name, Path(folder)
