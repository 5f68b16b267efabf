"""Settings of the execution service, shared by its two processes."""

from dataclasses import dataclass
from pathlib import Path

from services.resource_names import executor_name
from services.rpc.server_settings import ServerSettings
from services.settings import SettingsError


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings(ServerSettings):
    """`backbone`: NAME=FOLDER, a folder as services.execution.prepare_backbone leaves it. A zero or "" stands for a
    default.

    `executor_name`: the one in its certificate (`muxtune certs FOLDER --executor NAME`).
    `advertise_address`: where scheduling reaches this executor (default: where it listens). `memory_bytes`: what it may
    use (default: all there is). `device`: default cuda if there is one. `num_threads`: torch's, on a CPU (default: all
    cores). At its start it times microbatches of its own for about `calibration_seconds`. A task is checkpointed after
    `checkpoint_steps` steps or `checkpoint_seconds`, whichever comes first. With `activation_checkpointing` the
    backbone's layers keep their inputs only and run again in backward: less memory, more time, the same adapters.
    `pack_weights`: on a CPU, float32 weights are held twice more in the layouts that its kernels read: three times the
    bytes, about 1.2 times the speed (docs/adr/0016). `cuda_graphs`: how many forms of small microbatches are kept as
    CUDA graphs and replayed (docs/adr/0015); 0: none. A trainer that has work and gives no sign of life for
    `watchdog_seconds` is killed: no microbatch or export may take longer.
    """

    scheduling_address: str
    alignment_address: str
    artifact_url: str
    backbone: str
    executor_name: str = "local"
    advertise_address: str = ""
    device: str = ""
    dtype: str = "float32"
    memory_bytes: int = 0
    num_threads: int = 0
    activation_checkpointing: bool = False
    pack_weights: bool = True
    cuda_graphs: int = 0
    calibration_seconds: float = 6.0
    checkpoint_steps: int = 50
    checkpoint_seconds: float = 60.0
    max_unacknowledged: int = 64
    drain_seconds: float = 30.0
    watchdog_seconds: float = 300.0

    def __post_init__(self) -> None:
        if not (self.backbone_name and self.backbone.partition("=")[2]):
            raise SettingsError(f'MUXTUNE_BACKBONE: "{self.backbone}" is not NAME=FOLDER')

    @property
    def backbone_name(self) -> str:
        return self.backbone.partition("=")[0]

    @property
    def backbone_folder(self) -> Path:
        return Path(self.backbone.partition("=")[2])

    @property
    def resource_name(self) -> str:
        return executor_name(self.executor_name)
