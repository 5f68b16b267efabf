"""Adapters in PEFT's own format: written, loaded again by peft itself, and compared with the training model.

Legend: T probe tokens, V vocabulary.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from engine.alignment.microbatch import IGNORE, Microbatch, MicrobatchKind, Range, Segment
from engine.errors import ExportMismatchError, InvalidInputError
from engine.runtime.backbone import Backbone, sharing_copy
from engine.target_modules import matching_modules, suffixes
from engine.task import Lora

if TYPE_CHECKING:
    from engine.runtime.task_run import TaskRun

_PREFIX = "base_model.model."
_PROBE_TOKENS = 16
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class ExportReport:
    """`max_logit_difference`: training model against the folder loaded by peft, over the probe's logits."""

    folder: Path
    num_bytes: int
    max_logit_difference: float


def export(backbone: Backbone, run: "TaskRun", folder: Path) -> ExportReport:
    """Writes adapter_config.json and adapter_model.safetensors. Raises ExportMismatchError if peft disagrees."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_peft_key(name): tensor.detach().cpu().contiguous() for name, tensor in run.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _peft_config(backbone, run).save_pretrained(folder)
    difference, scale = _compare(backbone, run, folder)
    if not difference <= _TOLERANCE[backbone.dtype] * max(1.0, scale):
        raise ExportMismatchError(
            f"the exported adapter's logits differ by {difference:.3g} from the training model's",
            difference=difference,
        )
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    return ExportReport(folder, num_bytes, difference)


@torch.no_grad()
def load_adapter(folder: Path, run: "TaskRun") -> None:
    """Fills a fresh run with a PEFT folder's weights. Raises InvalidInputError, naming what does not fit."""
    try:
        found = load_file(folder / "adapter_model.safetensors")
        config = LoraConfig.from_pretrained(folder)
    except Exception as error:  # whatever peft raises for a folder that is no adapter
        raise InvalidInputError.of_field("initial_adapter", f"cannot be read: {error}") from error
    if why := _misfit(config, run.assignment.spec.method):
        raise InvalidInputError.of_field("initial_adapter", why)
    expected = {_peft_key(name): tensor for name, tensor in run.tensors.items()}
    if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in expected.items()}:
        odd = sorted(set(found) ^ set(expected))[:3] or "shapes"
        raise InvalidInputError.of_field("initial_adapter", f"rank or target modules are not the task's: {odd}")
    if odd := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
        raise InvalidInputError.of_field("initial_adapter", f"{odd[0]} holds NaN or Inf")
    for name, tensor in expected.items():
        tensor.copy_(found[name])


def _misfit(config: Any, method: Lora) -> str:
    """Why an adapter computes something else than plain LoRA at the task's scale; empty: it does not."""
    if not isinstance(config, LoraConfig):
        return f"is of type {config.peft_type}, not LoRA"
    plain = LoraConfig()
    for name in ("use_rslora", "use_dora", "alpha_pattern", "bias", "lora_bias", "modules_to_save"):
        if (value := getattr(config, name)) != getattr(plain, name):
            return f"sets {name} = {value!r}, which is not plain LoRA"
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):
        return f"was initialised by {config.init_lora_weights!r}, which changes the backbone's own weights"
    if config.r != method.rank or not isinstance(config.lora_alpha, int | float):
        return f"has rank {config.r!r} and alpha {config.lora_alpha!r}, the task rank {method.rank}"
    if not math.isclose(config.lora_alpha / config.r, method.alpha / method.rank):
        ours = f"{method.alpha:g} / {method.rank}"
        return f"scales by alpha / rank = {config.lora_alpha:g} / {config.r}, the task by {ours}"
    return ""


def _peft_key(name: str) -> str:
    operator, _, factor = name.rpartition(".")
    return f"{_PREFIX}{operator}.{factor}.weight"


def _peft_config(backbone: Backbone, run: "TaskRun") -> LoraConfig:
    method = run.assignment.spec.method
    names = list(run.adapters)
    short = suffixes(names)
    is_exact = matching_modules(short, backbone.operators) == names  # else suffixes would take more than the task did
    return LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=short if is_exact else names,
        fan_in_fan_out=any(backbone.operators[name].op.is_conv1d for name in names),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=run.assignment.spec.backbone,
    )


@torch.no_grad()
def _compare(backbone: Backbone, run: "TaskRun", folder: Path) -> tuple[float, float]:
    """(largest difference of a logit, largest logit) on a fixed probe.

    peft loads into a copy of the shadow that shares its tensors: no memory, and the shadow stays as it is.
    """
    vocab = backbone.config.get_text_config().vocab_size
    token_ids_T = np.random.default_rng(0).integers(0, vocab, _PROBE_TOKENS).astype(np.int32)
    task = run.assignment.task
    whole = Range(task, run.step, 0, _PROBE_TOKENS, (Segment(_PROBE_TOKENS, 0),), 1, True)
    targets_T = np.full(_PROBE_TOKENS, IGNORE, np.int32)
    probe = Microbatch(0, MicrobatchKind.EVALUATE, token_ids_T, targets_T, (whole,), True)
    ours_TV = backbone.head.logits(backbone.hidden(probe, frozenset({task})))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a warning while loading is a wrong export
        loaded = PeftModel.from_pretrained(sharing_copy(backbone.shadow), folder)
    input_ids_1T = torch.from_numpy(token_ids_T).long().to(backbone.device).unsqueeze(0)
    theirs_TV = loaded(input_ids=input_ids_1T, use_cache=False).logits[0]
    return (ours_TV - theirs_TV).abs().max().item(), theirs_TV.abs().max().item()
