"""Exports adapters as files and checks them by loading them as the tenant will.

The format is PEFT's if PEFT has the method. Legend: T probe tokens, V vocabulary.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

from engine.alignment.microbatch import IGNORE, Microbatch, MicrobatchKind, Range, Segment
from engine.errors import ExportMismatchError, InvalidInputError
from engine.peft.registry import adapter_class
from engine.runtime.backbone import Backbone, sharing_copy
from engine.runtime.out_of_memory import is_out_of_memory
from engine.target_modules import matching_modules, suffixes

if TYPE_CHECKING:
    from engine.runtime.task_state import TaskTrainingState

CONFIG_AND_WEIGHTS = ("adapter_config.json", "adapter_model.safetensors")
FORMAT_VERSION = 1  # of the formats that PEFT does not have: docs/ADAPTERS.md
TenantLoader = Callable[[Any, Path], object]  # applies the adapter in a folder to a plain model, as its tenant will
_PREFIX = "base_model.model."
_PROBE_TOKENS = 16
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class ExportReport:
    """An exported adapter. `max_logit_difference`: between the training model and the export, on a fixed probe."""

    folder: Path
    num_bytes: int
    max_logit_difference: float


def export(
    backbone: Backbone, task_state: "TaskTrainingState", folder: Path, tenant_loader: TenantLoader | None
) -> ExportReport:
    """Writes adapter_config.json and adapter_model.safetensors, loads them as the tenant will, and compares the logits.

    PEFT loads its own formats, `tenant_loader` loads the others. Raises ExportMismatchError if the logits differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(backbone, task_state)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _file_tensors(task_state, config).items()}
    save_file(tensors, folder / CONFIG_AND_WEIGHTS[1], metadata={"format": "pt"})
    if isinstance(config, PeftConfig):
        config.save_pretrained(folder)
    else:
        (folder / CONFIG_AND_WEIGHTS[0]).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    difference, scale = _compare(backbone, task_state, folder, tenant_loader)
    if not difference <= _TOLERANCE[backbone.dtype] * max(1.0, scale):
        raise ExportMismatchError(
            f"the exported adapter's logits differ by {difference:.3g} from the training model's",
            difference=difference,
        )
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    return ExportReport(folder, num_bytes, difference)


@torch.no_grad()
def load_initial_adapter(folder: Path, task_state: "TaskTrainingState", backbone: Backbone) -> None:
    """Fills a new task with the weights of a folder. Raises InvalidInputError, which names what does not fit."""
    try:
        weights = load_file(folder / CONFIG_AND_WEIGHTS[1])
        config = json.loads((folder / CONFIG_AND_WEIGHTS[0]).read_text())
        reason = task_state.assignment.spec.method.incompatibility(config)
    except Exception as error:  # a folder without an adapter raises many types
        if is_out_of_memory(error):
            raise
        raise InvalidInputError.of_field("initial_adapter", f"cannot be read: {error}") from error
    if reason:
        raise InvalidInputError.of_field("initial_adapter", reason)
    expected = _file_tensors(task_state, _config(backbone, task_state))
    if {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in expected.items()}:
        different = sorted(set(weights) ^ set(expected))[:3] or "shapes"
        raise InvalidInputError.of_field("initial_adapter", f"rank or target modules are not the task's: {different}")
    if not_finite := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise InvalidInputError.of_field("initial_adapter", f"{not_finite[0]} holds NaN or Inf")
    for name, tensor in expected.items():
        tensor.copy_(weights[name])
    adapter_class(task_state.assignment.spec.method).load_shared_tensors(list(task_state.adapters.values()), weights)


def _file_tensors(task_state: "TaskTrainingState", config: PeftConfig | dict[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the file's tensors by their names.

    They are views of the task's tensors, unless the method shares or stacks them.
    """
    in_peft = isinstance(config, PeftConfig)
    prefix = _PREFIX if in_peft else ""
    tensors = {
        f"{prefix}{site}.{name}": tensor.detach()
        for site, adapter in task_state.adapters.items()
        for name, tensor in adapter.export_tensors(in_peft).items()
    }
    shared = adapter_class(task_state.assignment.spec.method).export_shared_tensors(list(task_state.adapters.values()))
    return tensors | {name: tensor.detach() for name, tensor in shared.items()}


def _config(backbone: Backbone, task_state: "TaskTrainingState") -> PeftConfig | dict[str, Any]:
    ops = [adapter.op for adapter in task_state.adapters.values() if adapter.is_target]
    names = [op.name for op in ops]
    short = suffixes(names)
    kinds = {op.site.kind for op in ops}
    everything = [site.name for site in backbone.sites if site.kind in kinds]
    is_exact = matching_modules(short, everything) == names  # else suffixes would name more modules
    common: dict[str, Any] = {
        "target_modules": short if is_exact else names,
        "fan_in_fan_out": any(op.is_conv1d for op in ops),
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": task_state.assignment.spec.backbone,
    }
    config = adapter_class(task_state.assignment.spec.method).config(task_state.assignment.spec.method, ops, common)
    if isinstance(config, PeftConfig):
        return config
    return {"base_model_name_or_path": common["base_model_name_or_path"], "format_version": FORMAT_VERSION, **config}


@torch.no_grad()
def _compare(
    backbone: Backbone, task_state: "TaskTrainingState", folder: Path, tenant_loader: TenantLoader | None
) -> tuple[float, float]:
    """Returns (largest difference of a logit, largest logit) on a fixed probe.

    The adapter is loaded into a copy of the shadow that shares its tensors: it costs no memory, and the shadow does not
    change.
    """
    vocab, task = backbone.config.get_text_config().vocab_size, task_state.assignment.task
    num_virtual = task_state.assignment.spec.method.num_virtual_tokens
    probe_T = np.random.default_rng(0).integers(0, vocab, _PROBE_TOKENS).astype(np.int32)
    token_ids_T = np.concatenate([np.zeros(num_virtual, np.int32), probe_T])
    num_tokens = len(token_ids_T)
    whole = Range(task, task_state.step, 0, num_tokens, (Segment(num_tokens, 0),), 1, True)
    targets_T = np.full(num_tokens, IGNORE, np.int32)
    probe = Microbatch(0, MicrobatchKind.EVALUATE, token_ids_T, targets_T, (whole,), True)
    ours_TV = backbone.head.logits(backbone.hidden(probe, frozenset({task}))[num_virtual:])
    in_peft = isinstance(_config(backbone, task_state), PeftConfig)
    loaded = _load_as_tenant(sharing_copy(backbone.shadow), folder, in_peft, tenant_loader)
    input_ids_1T = torch.from_numpy(probe_T).long().to(backbone.device).unsqueeze(0)
    theirs_TV = loaded(input_ids=input_ids_1T, use_cache=False).logits[0, -_PROBE_TOKENS:]
    return (ours_TV - theirs_TV).abs().max().item(), theirs_TV.abs().max().item()


def _load_as_tenant(model: Any, folder: Path, in_peft: bool, tenant_loader: TenantLoader | None) -> Any:
    """Return the model with the folder's adapter on it."""
    if not in_peft:
        if tenant_loader is None:
            raise ValueError("PEFT does not have this format: the executor needs a `tenant_loader` to check its export")
        tenant_loader(model, folder)
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a warning while loading means a wrong export
        warnings.filterwarnings("ignore", "Unsupported layer type")  # peft warns of every norm but nn.LayerNorm
        return PeftModel.from_pretrained(model, folder)
