"""The PEFT methods that a task can use: one file each, with its hyperparameters and the shapes of its parameters.

`engine/peft/<name>.py` computes a method. `<name>` is also the method's name here, in the proto's oneof and in errors'
paths. Legend of shapes: K inputs, N outputs, R rank, S bottleneck.
"""

from engine.methods.base import Method
from engine.methods.bottleneck import Activation, Bottleneck, BottleneckPlacement
from engine.methods.ia3 import Ia3
from engine.methods.lora import MAX_RANK, Lora, LoraBias, LoraInit
from engine.methods.miss import Miss
from engine.methods.prefix import Prefix
from engine.methods.prompt import Prompt
from engine.methods.selective import Selective
from engine.methods.vera import Vera

METHODS: dict[str, type[Method]] = {m.name: m for m in (Lora, Vera, Ia3, Bottleneck, Selective, Prompt, Prefix, Miss)}

__all__ = [
    "MAX_RANK",
    "METHODS",
    "Activation",
    "Bottleneck",
    "BottleneckPlacement",
    "Ia3",
    "Lora",
    "LoraBias",
    "LoraInit",
    "Method",
    "Miss",
    "Prefix",
    "Prompt",
    "Selective",
    "Vera",
]
