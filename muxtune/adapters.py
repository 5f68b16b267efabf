"""Applies adapters of methods that PEFT does not have to a plain transformers model; docs/ADAPTERS.md has the format.

    model = AutoModelForCausalLM.from_pretrained(...)
    handles = load_adapter(model, "folder")   # the model now answers as the tenant's
    for handle in handles: handle.remove()    # and as it did before

It needs torch and safetensors, and nothing of the engine.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

FORMAT_VERSION = 1
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class AppliedAdapter:
    """Part of an applied adapter; `remove` undoes it."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self.remove = undo


def load_adapter(model: nn.Module, folder: str | Path) -> list[AppliedAdapter]:
    """Apply the adapter in `folder` to `model`.

    Raises ValueError for an adapter in PEFT's format, of another version of the format, or for another model.
    """
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    kind = str(config.get("peft_type", ""))
    if not kind.startswith("MUXTUNE_"):
        raise ValueError(f"{folder} is of type {kind}: load it with peft.PeftModel.from_pretrained")
    if config.get("format_version") != FORMAT_VERSION or kind not in _APPLY:
        raise ValueError(
            f"{folder} is {kind} version {config.get('format_version')}: this muxtune reads version {FORMAT_VERSION}"
        )
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(Path(folder) / "adapter_model.safetensors").items():
        module, _, vector = name.rpartition(".")
        modules.setdefault(module, {})[vector] = tensor
    modules_of_model = dict(model.named_modules())
    if missing := [name for name in modules if name not in modules_of_model]:
        raise ValueError(f"{folder} adapts {missing[0]}, which this model does not have")
    return [_APPLY[kind](modules_of_model[name], tensors, config) for name, tensors in modules.items()]


def _apply_bottleneck(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> AppliedAdapter:
    activation, reads_output = _ACTIVATIONS[config["activation"]], config["placement"] == "serial"

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output  # attention also returns its weights
        h = y if reads_output else args[0] if args else kwargs["hidden_states"]
        down, down_bias, up, up_bias = (
            tensors[name].to(h) for name in ("down_weight", "down_bias", "up_weight", "up_bias")
        )
        added: torch.Tensor = functional.linear(activation(functional.linear(h, down, down_bias)), up, up_bias)
        adapted = y + float(config["scale"]) * added
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted

    return AppliedAdapter(module.register_forward_hook(add, with_kwargs=True).remove)


def _apply_vectors(module: nn.Module, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> AppliedAdapter:
    before = {name: getattr(module, name) for name in tensors}

    def put(vectors: Mapping[str, torch.Tensor]) -> None:
        for name, vector in vectors.items():
            setattr(module, name, nn.Parameter(vector.to(before[name]), requires_grad=False))

    put(tensors)
    return AppliedAdapter(lambda: put(before))


_APPLY: dict[str, Callable[[nn.Module, Mapping[str, torch.Tensor], Mapping[str, Any]], AppliedAdapter]] = {
    "MUXTUNE_BOTTLENECK": _apply_bottleneck,
    "MUXTUNE_SELECTIVE": _apply_vectors,
}
