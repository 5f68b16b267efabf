"""Gradients of mounted modules equal finite differences in float64, with tasks of every method on one stream."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from engine.kernels.dropout import drop
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
from engine.methods.base import Method, Site, SiteKind
from engine.peft import dora, lora
from engine.peft.adapter import Adapter
from engine.peft.dora import DoraParameters
from engine.peft.layout import Layout, TaskSpan
from engine.peft.mounted import Mounted, MountedAttention, MountedEmbedding, MountedLinear, MountedNorm
from engine.peft.registry import adapter_class
from engine.peft.sublayer import MountedSublayer
from engine.runtime.attention import packed_attention

ALL = ("all-linear",)
AT_LINEAR: dict[str, Method] = {
    "lora": Lora(3, 5.0, ALL, 0.4, bias=LoraBias.ALL),
    "wide": Lora(9, 4.0, ALL, use_rslora=True),
    "dora": Lora(2, 3.0, ALL, use_dora=True),
    "dora-dropout": Lora(2, 3.0, ALL, 0.4, use_dora=True, bias=LoraBias.LORA_ONLY),
    "vera": Vera(4, ALL, 0.4),
    "miss": Miss(2, ALL),
    "outputs": Ia3(ALL),
    "inputs": Ia3(ALL, ALL),
    "serial": Bottleneck(3, ALL, activation=Activation.GELU),
    "parallel": Bottleneck(2, ALL, BottleneckPlacement.PARALLEL, Activation.TANH, 0.7),
    "bias": Selective(("all-biases",)),
}


def spans_of(names: list[str], num_tokens: int = 2) -> list[TaskSpan]:
    """Return spans of `num_tokens` tokens in segments of one token and the rest, and one padding token after each."""
    positions = np.arange(num_tokens, dtype=np.int64) + 5
    starts = [i * (num_tokens + 1) for i in range(len(names))]
    lengths = (1, num_tokens - 1)
    return [TaskSpan(name, 3, at, at + num_tokens, positions, lengths) for name, at in zip(names, starts, strict=True)]


def layout_of(methods: Mapping[str, Method], num_tokens: int = 2) -> Layout:
    layout = Layout(num_tokens=len(methods) * (num_tokens + 1) + 1, training=True)
    layout.spans = tuple(spans_of(list(methods), num_tokens))
    return layout


def attach(mounted: Mounted, methods: Mapping[str, Method]) -> list[torch.Tensor]:
    """Attach an adapter of each method, and return the parameters, all random."""
    generator, parameters = torch.Generator().manual_seed(0), list[torch.Tensor]()
    for seed, (name, method) in enumerate(methods.items()):
        sites: list[Site] = [mounted.op.site]
        tensors = {
            key: torch.randn(shape, generator=generator, dtype=torch.float64).add_(0.5)
            for key, shape in method.shapes(sites)[mounted.op.name].items()
        }
        kind: type[Adapter] = adapter_class(method)
        [adapter] = kind.build(method, [mounted.op], seed, {mounted.op.name: tensors}).values()
        for key, tensor in tensors.items():  # `build` has initialised them
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64).add_(0.5))
            parameters.append(adapter.tensors[key].requires_grad_())
        mounted.adapters[name] = adapter
    return parameters


@pytest.fixture(autouse=True)
def dora_norms_as_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep them constant for finite differences: they get no gradient by definition (arXiv 2402.09353 section 4.3)."""
    compute, first_norms = dora.weight_norms, dict[int, torch.Tensor]()

    def constant_norms(weight_KN: torch.Tensor, tasks: Sequence[DoraParameters]) -> list[torch.Tensor]:
        norms = compute(weight_KN, tasks)
        return [first_norms.setdefault(id(task), norms_N) for task, norms_N in zip(tasks, norms, strict=True)]

    for module in (lora, dora):
        monkeypatch.setattr(module, "weight_norms", constant_norms)


@pytest.mark.parametrize("is_conv1d", [False, True])
def test_a_linear_operator_with_every_method_on_one_stream(is_conv1d: bool) -> None:
    torch.manual_seed(0)
    base = Conv1D(7, 5) if is_conv1d else nn.Linear(5, 7)
    base.double().requires_grad_(False)
    methods = {name: method for name, method in AT_LINEAR.items() if not (is_conv1d and name == "miss")}
    layout = layout_of(methods)
    mounted = MountedLinear(base, "op", 0, layout)
    parameters = attach(mounted, methods)
    x_1TK = torch.randn(1, layout.num_tokens, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mounted(x), (x_1TK, *parameters))


def test_a_sublayer() -> None:
    torch.manual_seed(0)
    methods = {
        "serial": Bottleneck(3, ("b",)),
        "parallel": Bottleneck(2, ("b",), BottleneckPlacement.PARALLEL, Activation.SILU),
    }
    block = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double().requires_grad_(False)
    layout = layout_of(methods)
    parameters = attach(MountedSublayer(block, "b", 0, (4, 4), layout), methods)
    x_1TK = torch.randn(1, layout.num_tokens, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: block(x), (x_1TK, *parameters))


@pytest.mark.parametrize("norm", [LlamaRMSNorm(4), nn.LayerNorm(4)], ids=["rms", "layer"])
def test_a_norm(norm: nn.Module) -> None:
    methods: dict[str, Method] = {"a": Selective(("all-norms",)), "b": Selective(("n.weight",))}
    norm.double().requires_grad_(False)
    layout = layout_of(methods)
    mounted = MountedNorm(norm, "n", 0, layout)
    parameters = attach(mounted, methods)
    # LlamaRMSNorm always computes in float32: too coarse for finite differences by default
    coarse = {} if isinstance(norm, nn.LayerNorm) else dict(eps=1e-2, atol=1e-2, nondet_tol=1e-6)
    x_1TN = torch.randn(1, layout.num_tokens, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: norm(x), (x_1TN, *parameters), **coarse)


def test_an_embedding() -> None:
    methods = {"a": Prompt(1), "b": Prompt(1)}
    embedding = nn.Embedding(9, 4).double().requires_grad_(False)
    layout = layout_of(methods, num_tokens=4)
    parameters = attach(MountedEmbedding(embedding, "e", layout), methods)
    layout.spans = tuple(TaskSpan(s.task, s.step, s.start, s.end, s.positions_L, lengths=(2, 2)) for s in layout.spans)
    ids_1T = torch.randint(0, 9, (1, layout.num_tokens))
    assert torch.autograd.gradcheck(lambda *_: embedding(ids_1T), parameters)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_an_attention_with_prefixes(softcap: float | None) -> None:
    methods = {"a": Prefix(2), "b": Prefix(3)}
    layout = layout_of(methods, num_tokens=4)
    site_heads, width = 2, 3
    base = nn.Linear(1, 1).double().requires_grad_(False)
    mounted = MountedAttention(base, Site("a.kv", site_heads, width, SiteKind.ATTENTION, group_size=2), 0, layout)
    parameters = attach(mounted, methods)
    query, key, value = (
        torch.randn(1, heads, layout.num_tokens, width, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        bounds = [0, 1, 4, 5, 6, 9, 11]
        prefixes = {id(base): mounted.prefixes()}
        return packed_attention(base, q, k, v, None, 0.6, softcap=softcap, cu_seqlens=bounds, prefixes=prefixes)[0]

    assert torch.autograd.gradcheck(run, (query, key, value, *parameters))


def test_dropped_inputs() -> None:
    mask = torch.rand(4, 3) > 0.4
    x_LK = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: drop(x, lambda: mask, 1.7), (x_LK,))
