"""Settings of the execution service. Its two processes, server and trainer, share them."""

from dataclasses import dataclass
from pathlib import Path

from services.resource_names import executor_name
from services.rpc.server_settings import ServerSettings
from services.settings import SettingsError


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings(ServerSettings):
    """Holds the settings of one executor. A zero or an empty text selects the default.

    `backbone`: NAME=FOLDER; services.execution.prepare_backbone writes such a folder.
    `executor_name`: the name in the executor's certificate (`muxtune certs FOLDER --executor NAME`).
    `advertise_address`: where scheduling reaches this executor; by default, where it listens.
    `device`: by default cuda if it is available. `num_threads`: torch's threads on a CPU; by default one for each core.
    `memory_bytes`: how much memory the executor may use; by default all of the device's.
    `scratch`: folder of temporary files, on a local disk; by default one in the system's temporary folder.
    `activation_checkpointing`: the backbone's layers keep only their inputs and run again in backward, which needs less
    memory and more time and gives the same adapters.
    `pack_weights`: on a CPU, float32 weights are held in two more layouts that the CPU's kernels read: three times the
    bytes, about 1.2 times the speed (docs/adr/0016).
    `cuda_graphs`: maximum number of CUDA graphs that are kept to replay small microbatches (docs/adr/0015); 0: none.
    `calibration_seconds`: about how long the trainer times microbatches at its start.
    `checkpoint_steps`, `checkpoint_seconds`: a task is checkpointed after that many steps or seconds, whichever comes
    first. `max_unacknowledged`: results that scheduling has not acknowledged before the trainer pauses.
    `watchdog_seconds`: a trainer that has work and sends nothing for so long is killed; no microbatch and no export may
    take longer.
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
    scratch: Path | None = None
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
            raise SettingsError(f'MUXTUNE_BACKBONE is "{self.backbone}": write it as NAME=FOLDER')

    @property
    def backbone_name(self) -> str:
        return self.backbone.partition("=")[0]

    @property
    def backbone_folder(self) -> Path:
        return Path(self.backbone.partition("=")[2])

    @property
    def resource_name(self) -> str:
        return executor_name(self.executor_name)
