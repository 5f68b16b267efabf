"""Methods that PEFT does not have, in plain torch on a plain model, trained by autograd alone: what a tenant would have
got without muxtune. Reads what docs/ADAPTERS.md says of the format; knows nothing of the engine's own computation.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from torch.nn import functional


class Bottlenecked(nn.Module):
    """A module of the model with a bottleneck adapter beside it."""

    def __init__(self, base: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.base, self.config, self.own = base, config, nn.ParameterDict(tensors)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base(*args, **kwargs)
        y = output[0] if isinstance(output, tuple) else output
        read = y if self.config["placement"] == "serial" else args[0] if args else kwargs["hidden_states"]
        down = functional.linear(read, self.own["down_weight"], self.own["down_bias"])
        inner = getattr(functional, self.config["activation"])(down)
        y = y + self.config["scale"] * functional.linear(inner, self.own["up_weight"], self.own["up_bias"])
        return (y, *output[1:]) if isinstance(output, tuple) else y


def adapted(model: nn.Module, folder: Path) -> dict[str, nn.Parameter]:
    """Puts the folder's adapter on `model`, trainable and alone so; its tensors by their names in the file."""
    model.requires_grad_(False)
    config = json.loads((folder / "adapter_config.json").read_text())
    dtype = next(model.parameters()).dtype
    found = {n: nn.Parameter(t.to(dtype)) for n, t in load_file(folder / "adapter_model.safetensors").items()}
    modules: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in found.items():
        module, _, vector = name.rpartition(".")
        modules.setdefault(module, {})[vector] = parameter
    for name in sorted(modules, key=lambda name: -name.count(".")):  # what lies inside another module first
        if config["peft_type"] == "MUXTUNE_BOTTLENECK":
            model.set_submodule(name, Bottlenecked(model.get_submodule(name), config, modules[name]))
        else:
            for vector, parameter in modules[name].items():
                setattr(model.get_submodule(name), vector, parameter)
    return found
