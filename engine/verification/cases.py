"""Cases of `muxtune verify`: a small backbone, rows of many lengths, and one task for each method and option."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from engine.alignment.dataset import TokenizedDataset
from engine.alignment.packing import PackedTask
from engine.methods import (
    Activation,
    Bottleneck,
    BottleneckPlacement,
    Ia3,
    Lora,
    LoraBias,
    Miss,
    Prefix,
    Prompt,
    Selective,
    Vera,
)
from engine.methods.base import Method
from engine.runtime.task_state import TaskAssignment
from engine.task import LrSchedule, Optimizer, TaskSpec, Training

_ALL = ("all-linear",)
METHODS: dict[str, Method] = {
    "lora": Lora(4, 8.0, _ALL),
    "rslora": Lora(8, 4.0, ("q_proj", "down_proj"), use_rslora=True),
    "patterns": Lora(4, 8.0, _ALL, rank_pattern={"q_proj": 7}, alpha_pattern={"v_proj": 3.0}),
    "biases": Lora(2, 4.0, ("k_proj", "down_proj"), bias=LoraBias.ALL),
    "dora": Lora(4, 8.0, ("q_proj", "down_proj"), use_dora=True),
    "vera": Vera(16, _ALL),
    "ia3": Ia3(("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "miss": Miss(7, _ALL),
    "norms": Selective(("all-norms",)),
    "prompt": Prompt(5),
    "prefix": Prefix(6),
    "houlsby": Bottleneck(8, ("self_attn", "mlp")),
    "parallel": Bottleneck(3, ("mlp",), BottleneckPlacement.PARALLEL, Activation.GELU, scale=0.5),
    "bitfit": Selective(("all-biases",)),
}
# The rates are so low that training does not amplify rounding: at ten times these, HF PEFT in float32 and in float64
# differ by 1e-4 and more.
RATES = {Optimizer.ADAMW: 1e-3, Optimizer.SGD: 1e-2}
# AdamW's epsilon is above the rounding of gradients: with a smaller one, the rounding of a gradient near zero makes a
# full step, in HF PEFT too, and weights could not be compared.
EPSILON = 1e-5
OPTIONS: dict[str, dict[str, Any]] = {
    f"{optimizer.value}, accumulation {accumulation}, {schedule.value}": dict(
        optimizer=optimizer,
        learning_rate=RATES[optimizer],
        epsilon=EPSILON,
        micro_batch_size=4 // accumulation,
        lr_schedule=schedule,
        warmup_steps=5 if schedule is LrSchedule.COSINE else 0,
    )
    for optimizer in Optimizer
    for accumulation in (1, 4)
    for schedule in (LrSchedule.CONSTANT, LrSchedule.COSINE)
}
_LENGTHS = ((7, 12, 3, 9), (31, 2, 10, 10, 4), (5, 5, 5), (64, 6, 2, 18), (17, 8))


def small_backbone() -> Any:
    """Returns a random Llama of two layers with biases. Its norms and biases differ from their initial values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=128, initializer_range=0.15, attention_bias=True, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tasks(names: list[str], num_steps: int, vocab: int, **options: Any) -> Iterator[tuple[TaskAssignment, PackedTask]]:
    """Yields a task with its own data for each method: the executor's assignment, and the packed task of alignment."""
    for seed, name in enumerate(names):
        training = Training(num_steps=num_steps, global_batch_size=4, seed=seed, max_grad_norm=1.0, **options)
        spec = TaskSpec("verified", METHODS[name], "made up", training)
        dataset = _dataset(_LENGTHS[seed % len(_LENGTHS)], seed, vocab)
        member = PackedTask(name, dataset, training, num_steps, 0, spec.method.num_virtual_tokens)
        yield TaskAssignment(name, spec, num_steps), member


def _dataset(lengths: tuple[int, ...], seed: int, vocab: int) -> TokenizedDataset:
    """Returns random tokens. The second half of each row bears loss, and all of the first row."""
    random = np.random.default_rng(seed)
    ids_S = random.integers(3, vocab, sum(lengths)).astype(np.int32)
    bears_loss_S = np.concatenate([np.arange(n) >= (n // 2 if row else 0) for row, n in enumerate(lengths)])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    lines = np.arange(1, len(lengths) + 1)
    return TokenizedDataset(ids_S, bears_loss_S, offsets, lines, np.array(lengths), (), 0)
