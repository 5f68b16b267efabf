"""Trains a task alone on padded batches with HF PEFT, or with plain torch if PEFT does not have the method.

Legend: B rows of a micro batch, L tokens of its longest.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn import functional
from transformers import get_scheduler

from engine.alignment.microbatch import IGNORE
from engine.alignment.packing import PackedTask
from engine.task import LrSchedule, Optimizer
from engine.verification import plain


def is_peft_format(folder: Path) -> bool:
    """Returns whether the adapter in `folder` has a format of PEFT."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return not config["peft_type"].startswith("MUXTUNE_")


def train_alone(model: Any, folder: Path, member: PackedTask) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Trains from the adapter in `folder`.

    Returns (loss of each step, the adapter's tensors by their names in the file).
    """
    model = copy.deepcopy(model)
    if is_peft_format(folder):
        peft_model = _trainable(model, folder).to(next(model.parameters()).dtype)
        losses = _losses(peft_model, member)
        return losses, get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    tensors = plain.apply_adapter(model, folder)
    losses = _losses(model, member)
    return losses, {name: tensor.detach() for name, tensor in tensors.items()}


def _losses(model: Any, member: PackedTask) -> list[float]:
    """Returns the loss of each step of the usual training: micro batches, clip, optimizer, schedule."""
    training, parameters = member.training, [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(parameters, member)
    name = "constant_with_warmup" if training.lr_schedule is LrSchedule.CONSTANT else training.lr_schedule.value
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=training.warmup_steps, num_training_steps=member.num_steps
    )
    losses = []
    for step in range(member.num_steps):
        rows = [int(row) for row in member.order.batch(step)]
        num_targets = member.count_targets(member.order.batch(step))
        losses.append(0.0)
        for i in range(0, len(rows), training.micro_batch_size):
            loss = _loss_sum(model, member, rows[i : i + training.micro_batch_size]) / num_targets
            torch.autograd.backward(loss)
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses


def _trainable(model: Any, folder: Path) -> Any:
    config = PeftConfig.from_pretrained(folder)
    if not config.is_prompt_learning:
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
    config.inference_mode = False  # peft does not load prompt learning as trainable
    peft_model: Any = get_peft_model(model, config)
    saved = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    peft_model.prompt_encoder["default"].embedding.weight.data.copy_(saved)
    return peft_model


def _optimizer(parameters: list[torch.nn.Parameter], member: PackedTask) -> torch.optim.Optimizer:
    t = member.training
    if t.optimizer is Optimizer.SGD:
        return torch.optim.SGD(parameters, t.learning_rate, momentum=t.momentum, weight_decay=t.weight_decay)
    return torch.optim.AdamW(parameters, t.learning_rate, (t.beta1, t.beta2), t.epsilon, t.weight_decay)


def _loss_sum(model: Any, member: PackedTask, rows: list[int]) -> torch.Tensor:
    """Returns the loss over the targets of the rows. A row's first token is a target only after virtual tokens."""
    pairs = [member.dataset.row(row) for row in rows]
    longest = max(len(ids) for ids, _ in pairs)
    ids_BL, mask_BL = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest)
    labels_BL = torch.full((len(rows), longest), IGNORE)
    for i, (ids, bears_loss) in enumerate(pairs):
        ids_BL[i, : len(ids)], mask_BL[i, : len(ids)] = torch.from_numpy(ids).long(), 1
        labels_BL[i, : len(ids)] = torch.from_numpy(ids).long().where(torch.from_numpy(bears_loss), IGNORE)
    logits = model(input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=False).logits
    labels_BL = functional.pad(labels_BL, (logits.shape[1] - longest, 0), value=IGNORE)  # virtual tokens, as in PEFT
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten(), reduction="sum")
