"""Times one whole Llama-3-8B layer, forward and backward: frozen, with the adapters of many tasks, and by HF PEFT.

`ours` is the engine: norms, attention, feed-forward and all seven linears on one packed stream, with LoRA on each.
`frozen` is the same without resident tasks, with gradients from the embedding on; `peft` runs HF PEFT's layer on each
task's sequences in turn. Sequences have 1024 tokens. Results are compared with PEFT's in float32 on the same weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from benchmarks.kernel_timing import relative_error, timed
from engine.alignment.microbatch import IGNORE, Microbatch, MicrobatchKind, Range, Segment
from engine.methods import Lora
from engine.runtime.backbone import Backbone, sharing_copy
from engine.runtime.executor import Executor
from engine.runtime.task_state import TaskAssignment
from engine.task import TaskSpec, Training

_TOLERANCE = 5e-2  # a layer in bf16


@dataclass(frozen=True)
class Point:
    """T tokens cut evenly among tasks of these ranks in turn."""

    num_tokens: int
    num_tasks: int
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    sequence_tokens: int = 1024
    hidden: int = 4096
    dtype: torch.dtype = torch.bfloat16
    num_layers: int = 1
    vocabulary: int = 256

    @property
    def task_tokens(self) -> int:
        return self.num_tokens // self.num_tasks

    @property
    def task_ranks(self) -> list[int]:
        return [self.ranks[i % len(self.ranks)] for i in range(self.num_tasks)]

    @property
    def lengths(self) -> list[int]:
        """Return the bounds of one task's sequences."""
        whole, rest = divmod(self.task_tokens, self.sequence_tokens)
        return [self.sequence_tokens] * whole + ([rest] if rest else [])

    def widths(self) -> list[tuple[int, int]]:
        h, small, wide = self.hidden, self.hidden // 4, self.hidden * 7 // 2
        return [(h, h), (h, small), (h, small), (h, h), (h, wide), (h, wide), (wide, h)]


def points(is_small: bool = False) -> list[Point]:
    if is_small:
        return [Point(48, 3, (2, 4), 8, 64, torch.float32)]
    mixed = [Point(tokens, tasks) for tokens in (4096, 16384) for tasks in (1, 4, 16, 64)]
    return [*mixed, Point(16384, 16, (16,))]  # the last: of the goal, at most 8% over frozen


def _model(point: Point, device: torch.device) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=point.vocabulary, hidden_size=point.hidden, intermediate_size=point.hidden * 7 // 2,
        num_hidden_layers=point.num_layers,
        num_attention_heads=point.hidden // 128 or 1, num_key_value_heads=max(1, point.hidden // 512),
        head_dim=min(128, point.hidden), rope_theta=500000.0, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:  # weights are drawn there: on a CPU that takes seconds a layer
        return transformers.AutoModelForCausalLM.from_config(config, dtype=point.dtype)


class Layer:
    """A mounted layer with attached tasks, and a packed stream of their tokens."""

    def __init__(self, point: Point, device: torch.device) -> None:
        self.point, model = point, _model(point, device)
        self.plain = sharing_copy(model)
        self.executor = Executor(Backbone(model))
        self.names = [str(i) for i in range(point.num_tasks)]
        for seed, (name, rank) in enumerate(zip(self.names, point.task_ranks, strict=True)):
            spec = TaskSpec("", Lora(rank, float(rank), ("all-linear",)), "", Training(0.0, num_steps=1, seed=seed))
            self.executor.attach(TaskAssignment(name, spec, num_steps=1))
            run = self.executor.tasks[name]
            with torch.no_grad():  # B is zero at the start: nothing to compare
                run.parameters_P.normal_(generator=torch.Generator(device).manual_seed(seed)).mul_(0.02)
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, y: y if y.requires_grad else y.requires_grad_())
        self.ids_T = np.random.default_rng(0).integers(0, 256, point.num_tokens).astype(np.int32)
        self.dh_TH = torch.randn(point.num_tokens, point.hidden, device=device).to(point.dtype)
        self.microbatch = self._microbatch()

    def _microbatch(self) -> Microbatch:
        size, offsets = self.point.task_tokens, np.cumsum([0, *self.point.lengths])
        segments = tuple(Segment(n, int(at)) for n, at in zip(self.point.lengths, offsets, strict=False))
        ranges = tuple(Range(name, 0, i * size, size, segments, size, False) for i, name in enumerate(self.names))
        targets_T = np.full_like(self.ids_T, IGNORE)
        return Microbatch(0, MicrobatchKind.TRAIN, self.ids_T, targets_T, ranges, False)

    def run(self, resident: frozenset[str]) -> Tensor:
        with torch.enable_grad():
            hidden_TH = self.executor.backbone.hidden(self.microbatch, resident)
            hidden_TH.backward(self.dh_TH)
        return hidden_TH.detach()

    def gradients(self) -> list[Tensor]:
        """Return each task's whole gradient; the gradients are zero again afterwards."""
        gradients = []
        for name in self.names:
            gradient_P = self.executor.tasks[name].gradient_P
            gradients.append(gradient_P.clone())
            gradient_P.zero_()
        return gradients


class Peft:
    """HF PEFT's model of each task on the layer's own weights, or on a copy in another type."""

    def __init__(self, layer: Layer, dtype: torch.dtype | None = None) -> None:
        from peft import LoraConfig, get_peft_model

        self.layer, self.models, self.leaves = layer, [], []
        plain = layer.plain if dtype is None else _as(layer.plain, dtype)
        for name, rank in zip(layer.names, layer.point.task_ranks, strict=True):
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
            model = get_peft_model(sharing_copy(plain), config, autocast_adapter_dtype=False)
            tensors, leaves = layer.executor.tasks[name].tensors, []
            modules = dict(model.base_model.model.named_modules())
            for full, tensor in tensors.items():
                site, _, key = full.rpartition(".")
                module = getattr(modules[site], key)["default"]
                module.weight.data = tensor.detach().to(plain.dtype)
                leaves.append(module.weight)
            self.models.append(model.base_model.model.model)
            self.leaves.append(leaves)
            embedding = model.base_model.model.get_input_embeddings()
            embedding.register_forward_hook(lambda module, args, y: y if y.requires_grad else y.requires_grad_())

    def __call__(self) -> tuple[Tensor, list[Tensor]]:
        """Return (hidden states, each task's gradient in the order of its flat buffer)."""
        hidden, gradients, start = [], [], 0
        device = self.layer.dh_TH.device
        for model, leaves in zip(self.models, self.leaves, strict=True):
            task_gradients = [torch.zeros_like(leaf) for leaf in leaves]
            for length in self.layer.point.lengths:
                ids = torch.from_numpy(self.layer.ids_T[start : start + length]).long().to(device).unsqueeze(0)
                states = model(input_ids=ids, use_cache=False).last_hidden_state
                dh = self.layer.dh_TH[start : start + length].to(states.dtype).unsqueeze(0)
                for total, part in zip(task_gradients, torch.autograd.grad(states, leaves, dh), strict=True):
                    total += part
                hidden.append(states.detach()[0])
                start += length
            gradients.append(torch.cat([g.flatten() for g in task_gradients]))
        return torch.cat(hidden), gradients


def _as(model: Any, dtype: torch.dtype) -> Any:
    copy = type(model)(model.config).to(device=model.device, dtype=dtype)
    copy.load_state_dict({name: tensor.to(dtype) for name, tensor in model.state_dict().items()})
    return copy


def measured(point: Point, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return errors against PEFT in float32, and times. Raises AssertionError if ours is larger than rounding."""
    layer, no_tasks = Layer(point, device), frozenset[str]()
    all_tasks = frozenset(layer.names)
    reference = Peft(layer, torch.float32)()
    hidden = layer.run(all_tasks)
    results: dict[str, tuple[Tensor, list[Tensor]]] = {
        "ours": (hidden, layer.gradients()),
        "peft": (peft := Peft(layer))(),
    }
    errors = {
        name: {
            "hidden": relative_error(result[0], reference[0]),
            "factors": max(relative_error(a, b) for a, b in zip(result[1], reference[1], strict=True)),
        }
        for name, result in results.items()
    }
    assert all(value < _TOLERANCE for value in errors["ours"].values()), (point, errors)
    del reference, results
    runs: dict[str, list[Callable[[], object]]] = {
        "frozen": [lambda: layer.run(no_tasks)],
        "ours": [lambda: layer.run(all_tasks)],
        "peft": [peft],
    }
    size, parameters = point.dtype.itemsize, sum(k * n for k, n in point.widths())
    extra = sum(point.num_tokens * (2 * k + n) * size + sum(point.task_ranks) * (k + n) * 12 for k, n in point.widths())
    per_token = sum(point.task_ranks) / point.num_tasks
    attention = sum(7 * n * n * point.hidden for n in point.lengths) * point.num_tasks  # causal: half of 14
    return {
        "point": "whole layer",
        "tokens": point.num_tokens,
        "tasks": point.num_tasks,
        "ranks": sorted(set(point.task_ranks)),
        "errors": errors,
        "extra_bytes": extra,
        "extra_flop": int(sum(6 * point.num_tokens * per_token * (k + n) for k, n in point.widths())),
        "frozen_flop": 4 * point.num_tokens * parameters + attention,
        "times": timed(runs, rounds, device),
    }
