"""Tiny random backbones of every supported architecture, a small packer, and HF PEFT training one task alone.

The packer here is the tests' own: the engine is held against transformers and peft, not against our alignment.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file

from engine.alignment.microbatch import IGNORE, Microbatch, MicrobatchKind, Range, Segment
from engine.methods import Lora
from engine.methods.base import Method
from engine.results import StepResult
from engine.runtime.backbone import Backbone
from engine.runtime.executor import Executor
from engine.runtime.task_state import TaskAssignment
from engine.task import LrSchedule, Optimizer, TaskSpec, Training
from engine.verification import plain
from engine.verification.reference import is_peft_format
from muxtune.adapters import load_adapter

VOCAB = 97
_COMMON = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
_COMMON |= dict(max_position_embeddings=128, initializer_range=0.15, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_GROUPED = _COMMON | dict(num_key_value_heads=2)

CONFIGS: dict[str, hf.PretrainedConfig] = {
    "llama": hf.LlamaConfig(**_GROUPED),
    "llama-tied": hf.LlamaConfig(**_GROUPED, tie_word_embeddings=True, attention_bias=True),
    "qwen2": hf.Qwen2Config(**_GROUPED),
    "qwen3": hf.Qwen3Config(**_GROUPED, head_dim=16),
    "mistral": hf.MistralConfig(**_GROUPED, sliding_window=None),
    "mistral-window": hf.MistralConfig(**_GROUPED, sliding_window=6),
    "gemma": hf.GemmaConfig(**_GROUPED, head_dim=16),
    "gemma2": hf.Gemma2Config(
        **_GROUPED, head_dim=16, sliding_window=6, final_logit_softcapping=4.0, attn_logit_softcapping=3.0,
        query_pre_attn_scalar=24,
    ),
    "gemma3": hf.Gemma3TextConfig(**_GROUPED, head_dim=16, sliding_window=6, query_pre_attn_scalar=24),
    "phi3": hf.Phi3Config(**_GROUPED),
    "gpt-neox": hf.GPTNeoXConfig(**_COMMON, attention_bias=True),
    "gpt-neox-serial": hf.GPTNeoXConfig(**_COMMON, use_parallel_residual=False),
    "opt": hf.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, init_std=0.15,
        max_position_embeddings=128, word_embed_proj_dim=32, pad_token_id=0, dropout=0.1,
    ),
    "opt-projected": hf.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, init_std=0.15,
        max_position_embeddings=128, word_embed_proj_dim=16, do_layer_norm_before=False, pad_token_id=0,
    ),
    "gpt2": hf.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.15, bos_token_id=1,
        eos_token_id=2,
    ),
}  # fmt: skip


def model_of(config: hf.PretrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():  # norms and biases other than one and zero, so that a missing one shows
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            assert parameter.isfinite().all(), name
    return model.eval()


@dataclass(frozen=True)
class TinyTask:
    """A task and its data: rows of (token ids, number of first tokens without loss)."""

    name: str
    spec: TaskSpec
    num_steps: int
    rows: tuple[tuple[tuple[int, ...], int], ...]

    @property
    def assignment(self) -> TaskAssignment:
        return TaskAssignment(self.name, self.spec, self.num_steps)

    def batch(self, step: int) -> list[tuple[tuple[int, ...], int]]:
        """Returns the rows of a step, in order; the last batch of an epoch may be smaller."""
        size = self.spec.training.global_batch_size
        per_epoch = -(-len(self.rows) // size)
        at = step % per_epoch * size
        return list(self.rows[at : at + size])


def task_of(
    name: str,
    *,
    seed: int = 0,
    rank: int = 4,
    targets: Sequence[str] = ("all-linear",),
    lengths: Sequence[int] = (7, 12, 3, 9),
    num_steps: int = 3,
    dropout: float = 0.0,
    alpha: float = 8.0,
    method: Method | None = None,
    **training: Any,
) -> TinyTask:
    random = np.random.default_rng(seed + 100)
    rows = tuple((tuple(random.integers(3, VOCAB, n).tolist()), int(random.integers(0, n - 1))) for n in lengths)
    defaults: dict[str, Any] = dict(learning_rate=1e-2, global_batch_size=4, micro_batch_size=2, seed=seed)
    defaults |= dict(lr_schedule=LrSchedule.CONSTANT)
    spec = TaskSpec(
        "tiny", method or Lora(rank, alpha, tuple(targets), dropout), "data", Training(**(defaults | training))
    )
    return TinyTask(name, spec, num_steps, rows)


def num_targets(task: TinyTask, step: int) -> int:
    """Returns the targets of a step. A row's first token is a target only after virtual tokens."""
    first = 0 if task.spec.method.num_virtual_tokens else 1
    return sum(len(ids) - max(first, prompt) for ids, prompt in task.batch(step))


def pack_round(
    tasks: Sequence[TinyTask], steps: Sequence[int], chunk: int = 8, kind: MicrobatchKind = MicrobatchKind.TRAIN
) -> list[Microbatch]:
    """Packs one step of each task: microbatch i holds the i-th micro batch of every task that has one."""
    cuts = {}
    for task, step in zip(tasks, steps, strict=True):
        rows, size, at, placed = task.batch(step), task.spec.training.micro_batch_size, 0, []
        for ids, prompt in rows:
            virtual = task.spec.method.num_virtual_tokens
            placed.append(((0,) * virtual + ids, prompt + virtual, at))
            at += virtual + len(ids)
        cuts[task.name] = [placed[i : i + size] for i in range(0, len(placed), size)]
    num_microbatches = max(len(c) for c in cuts.values())
    result = []
    for i in range(num_microbatches):
        ids_T: list[int] = []
        targets_T: list[int] = []
        ranges = []
        for task, step in zip(tasks, steps, strict=True):
            if i >= len(cuts[task.name]):
                continue
            start = len(ids_T)
            for ids, prompt, _ in cuts[task.name][i]:
                ids_T += ids
                targets_T += [t if p + 1 >= prompt else IGNORE for p, t in enumerate(ids[1:])] + [IGNORE]
            tail = -(len(ids_T) - start) % chunk
            ids_T += [0] * tail
            targets_T += [IGNORE] * tail
            segments = tuple(Segment(len(ids), at) for ids, _, at in cuts[task.name][i])
            denominator = num_targets(task, step)
            is_last = i == len(cuts[task.name]) - 1
            ranges.append(Range(task.name, step, start, len(ids_T) - start, segments, denominator, is_last))
        arrays = np.array(ids_T, np.int32), np.array(targets_T, np.int32)
        result.append(Microbatch(0, kind, *arrays, tuple(ranges), i == num_microbatches - 1))
    return result


def train(executor: Executor, tasks: Sequence[TinyTask], num_rounds: int) -> dict[str, list[StepResult]]:
    """Runs rounds over attached tasks that have steps left. Returns their results by task."""
    results: dict[str, list[StepResult]] = {task.name: [] for task in tasks}
    for _ in range(num_rounds):
        left = [t for t in tasks if t.name in executor.tasks and executor.tasks[t.name].step < t.num_steps]
        if not left:
            break
        for microbatch in pack_round(left, [executor.tasks[t.name].step for t in left]):
            for result in executor.run(microbatch):
                assert isinstance(result, StepResult), result
                results[result.task].append(result)
    return results


def executor_with(model: Any, tasks: Sequence[TinyTask], packs_weights: bool = True) -> Executor:
    executor = Executor(Backbone(copy.deepcopy(model), packs_weights=packs_weights), tenant_loader=load_adapter)
    for task in tasks:
        executor.attach(task.assignment)
    return executor


def train_with_peft(model: Any, task: TinyTask, folder: Path) -> tuple[list[float], list[float], dict[str, Any]]:
    """Trains one task on padded batches from the adapter in `folder`, with HF PEFT or, if it lacks the method, with
    plain torch. Returns (losses, gradient norms, final tensors)."""
    if not is_peft_format(folder):
        model = copy.deepcopy(model)
        tensors = plain.apply_adapter(model, folder)
        return *fit(model, task), {name: tensor.detach() for name, tensor in tensors.items()}
    peft_model = _loaded(copy.deepcopy(model), folder)
    losses, norms = fit(peft_model, task)
    return losses, norms, get_peft_model_state_dict(peft_model, save_embedding_layers=False)


def fit(peft_model: Any, task: TinyTask) -> tuple[list[float], list[float]]:
    """Trains what requires a gradient on padded batches, as a tenant would. Returns (losses, gradient norms)."""
    training = task.spec.training
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    factor = getattr(task.spec.method, "b_rate_factor", 1.0)
    if factor != 1.0:
        optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
            peft_model, torch.optim.AdamW, lr=training.learning_rate, loraplus_lr_ratio=factor,
            loraplus_weight_decay=training.weight_decay, betas=(training.beta1, training.beta2), eps=training.epsilon,
        )  # fmt: skip
    elif training.optimizer is Optimizer.SGD:
        optimizer = torch.optim.SGD(
            parameters, training.learning_rate, momentum=training.momentum, weight_decay=training.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(
            parameters, training.learning_rate, (training.beta1, training.beta2), training.epsilon,
            training.weight_decay,
        )  # fmt: skip
    name = "constant_with_warmup" if training.lr_schedule is LrSchedule.CONSTANT else training.lr_schedule.value
    scheduler = hf.get_scheduler(
        name, optimizer, num_warmup_steps=training.warmup_steps,
        num_training_steps=task.num_steps,
    )  # fmt: skip
    losses, norms = [], []
    for step in range(task.num_steps):
        rows, loss_sum = task.batch(step), 0.0
        for i in range(0, len(rows), training.micro_batch_size):
            batch = _padded(rows[i : i + training.micro_batch_size])
            labels = batch.pop("labels")
            logits = peft_model(**batch, use_cache=False).logits
            labels = torch.nn.functional.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=-100)  # as peft does
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            )
            (loss / num_targets(task, step)).backward()
            loss_sum += loss.item() / num_targets(task, step)
        limit = training.max_grad_norm or float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, limit).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss_sum)
    return losses, norms


def _loaded(model: Any, folder: Path) -> Any:
    config = PeftConfig.from_pretrained(folder)
    if not config.is_prompt_learning:
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
    config.inference_mode = False  # peft refuses to load these as trainable
    peft_model = get_peft_model(model, config)
    saved = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    peft_model.prompt_encoder["default"].embedding.weight.data.copy_(saved)
    return peft_model


def _padded(rows: Sequence[tuple[tuple[int, ...], int]]) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    pad = [[0] * (longest - len(ids)) for ids, _ in rows]
    ids = torch.tensor([list(ids) + tail for (ids, _), tail in zip(rows, pad, strict=True)])
    mask = torch.tensor([[1] * len(ids) + tail for (ids, _), tail in zip(rows, pad, strict=True)])
    labels = ids.masked_fill(mask == 0, -100)
    for row, (_, prompt) in enumerate(rows):
        labels[row, :prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
