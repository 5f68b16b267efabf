"""Methods that PEFT does not have, in plain torch on a plain model: what a tenant would have without muxtune.

It reads the format of docs/ADAPTERS.md and shares no code with the engine.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from torch.nn import functional


class Bottlenecked(nn.Module):
    """A module of the model with a bottleneck adapter."""

    def __init__(self, base: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.base, self.config, self.adapter = base, config, nn.ParameterDict(tensors)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base(*args, **kwargs)
        y = output[0] if isinstance(output, tuple) else output
        read = y if self.config["placement"] == "serial" else args[0] if args else kwargs["hidden_states"]
        down = functional.linear(read, self.adapter["down_weight"], self.adapter["down_bias"])
        inner = getattr(functional, self.config["activation"])(down)
        y = y + self.config["scale"] * functional.linear(inner, self.adapter["up_weight"], self.adapter["up_bias"])
        return (y, *output[1:]) if isinstance(output, tuple) else y


def apply_adapter(model: nn.Module, folder: Path) -> dict[str, nn.Parameter]:
    """Applies the folder's adapter to `model` and makes only it trainable.

    Returns its tensors by their names in the file.
    """
    model.requires_grad_(False)
    config = json.loads((folder / "adapter_config.json").read_text())
    dtype = next(model.parameters()).dtype
    tensors = {n: nn.Parameter(t.to(dtype)) for n, t in load_file(folder / "adapter_model.safetensors").items()}
    modules: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in tensors.items():
        module, _, vector = name.rpartition(".")
        modules.setdefault(module, {})[vector] = parameter
    for name in sorted(modules, key=lambda name: -name.count(".")):  # inner modules first
        if config["peft_type"] == "MUXTUNE_BOTTLENECK":
            model.set_submodule(name, Bottlenecked(model.get_submodule(name), config, modules[name]))
        else:
            for vector, parameter in modules[name].items():
                setattr(model.get_submodule(name), vector, parameter)
    return tensors
