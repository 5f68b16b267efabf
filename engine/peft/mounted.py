"""Modules of the backbone that adapters can be mounted on. They are wrapped once, at load.

Tasks attach and detach between microbatches.

Legend: T tokens of the packed stream, L tokens of one span, K inputs, N outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from engine.kernels.multi_lora.dispatch import multi_lora
from engine.kernels.multi_lora.types import Operator
from engine.kernels.packed_weight import PackedWeight
from engine.methods.base import Site, SiteKind
from engine.peft.adapter import Adapter, BaseOp
from engine.peft.dispatch import Uses, rewrite_input, rewrite_output
from engine.peft.layout import Layout
from engine.peft.shared_input import SharedInput
from engine.peft.sublayer import MountedSublayer

_MIN_GAIN = 1e-3  # of a norm: below it a 16-bit output may have lost digits


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention that the backbone's probe recorded: the layer's module and its key-value heads."""

    module: nn.Module
    num_heads: int
    head_width: int
    group_size: int  # query heads that share one key-value head
    is_windowed: bool


class MountedLinear(nn.Module):
    """A frozen nn.Linear or Conv1D that runs the resident tasks' adapters on their own spans.

    Keeps the names `weight` and `bias`, so that the backbone's state dict does not change.
    """

    def __init__(self, base: nn.Linear | Conv1D, name: str, index: int, layout: Layout) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        is_conv1d = isinstance(base, Conv1D)
        weight_KN = (base.weight if is_conv1d else base.weight.T).detach()
        bias_N = None if base.bias is None else base.bias.detach()
        num_in, num_out = weight_KN.shape
        site = Site(name, num_in, num_out, SiteKind.LINEAR, bias_N is not None)
        self.op = BaseOp(site, index, base, weight_KN, bias_N, is_conv1d)
        self.in_features, self.out_features = self.op.in_features, self.op.out_features
        self.layout = layout
        self.adapters: dict[str, Adapter] = {}
        self.group: SharedInput | None = None
        self.packed: PackedWeight | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Dispatch to adapters, run the operator with all low-rank additions in one kernel, and aggregate."""
        x_TK, uses = x.reshape(-1, x.shape[-1]), self._uses
        y_TN = None if self.group is None else self.group.output_of(self, x)
        if y_TN is None:
            x_TK = rewrite_input(x_TK, uses)
            y_TN = self._alone(x_TK)
        return rewrite_output(y_TN, x_TK, uses, self.layout.training).view(*x.shape[:-1], -1)

    @property
    def _uses(self) -> Uses:
        return self.layout.uses(self.adapters)

    @property
    def rewrites_input(self) -> bool:
        return any(adapter.input_affine() is not None for _, adapter in self._uses)

    def operator(self) -> Operator:
        pairs = [adapter.low_rank(span, self.layout.training) for span, adapter in self._uses]
        slices = [pair[0] for pair in pairs if pair is not None]
        factors = [pair[1] for pair in pairs if pair is not None]
        return Operator(self.op.weight_KN, self.op.bias_N, slices, factors, self.packed)

    def _alone(self, x_TK: torch.Tensor) -> torch.Tensor:
        operator = self.operator()
        return multi_lora(x_TK, [operator])[0] if operator.uses or operator.packed else operator.base(x_TK)


class MountedNorm:
    """Rewrites a frozen norm's output on the spans of tasks that train a copy of its vectors."""

    def __init__(self, base: nn.Module, name: str, index: int, layout: Layout) -> None:
        weight: Any = base.weight
        bias = getattr(base, "bias", None)
        site = Site(name, len(weight), len(weight), SiteKind.NORM, bias is not None)
        self.token_dim: int | None = None  # of its input: set when the backbone is probed
        bias_N = None if bias is None else bias.detach()
        self.op = BaseOp(site, index, base, weight.detach(), bias_N, gain_N=gain_of(base))
        self.layout = layout
        self.adapters: dict[str, Adapter] = {}
        base.register_forward_hook(self._rewrite)

    def _rewrite(self, module: nn.Module, args: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor | None:
        """Rewrite y: [1, T, N], [1, T, heads, N], [1, heads, T, N] (Gemma 3) or [T, N] (OPT), as the probe found."""
        if self.token_dim is None:
            dims = [dim for dim, size in enumerate(y.shape[:-1]) if size == self.layout.num_tokens]
            self.token_dim = dims[0] if len(dims) == 1 else None
        uses = self.layout.uses(self.adapters)
        if not uses:
            return None
        assert self.token_dim is not None
        x_T, y_T = (t.movedim(self.token_dim, 0) for t in (args[0], y))
        return rewrite_output(y_T, x_T, uses, self.layout.training).movedim(0, self.token_dim)


@torch.no_grad()
def gain_of(norm: Any) -> torch.Tensor | None:
    """Return the factor of a norm's output, its weight or 1 + its weight (Gemma), in at least float32, or None.

    The factor is found by running the norm with two weights. None: the output has another factor or can't be divided by
    it, because the gain is near zero or the norm has a bias in a type of few digits.
    """
    bias_N = getattr(norm, "bias", None)
    if bias_N is not None and norm.weight.itemsize < torch.float32.itemsize:
        return None
    weight_N = norm.weight.to(torch.promote_types(norm.weight.dtype, torch.float32))
    x = torch.linspace(-1.0, 2.0, 3 * len(weight_N), device=weight_N.device).view(3, -1).sin().to(weight_N.dtype)
    trial_N = weight_N.new_tensor(range(len(weight_N))) / len(weight_N) - 0.3
    zero_bias = {} if bias_N is None else {"bias": torch.zeros_like(weight_N)}
    for offset in (0.0, 1.0):
        try:
            plain, scaled = (
                functional_call(norm, {**zero_bias, "weight": w_N}, (x,))
                for w_N in (torch.full_like(weight_N, 1 - offset), trial_N)
            )
        except (TypeError, RuntimeError, AttributeError):  # it reads more than one tensor
            return None
        gain_N = weight_N + offset if offset else weight_N
        if torch.allclose(scaled, (trial_N + offset) * plain, rtol=1e-4, atol=1e-6):
            return gain_N if bool(gain_N.abs().min() >= _MIN_GAIN) else None
    return None


class MountedEmbedding:
    """Rewrites the frozen token embedding's output on the spans of tasks that train virtual tokens."""

    def __init__(self, base: nn.Module, name: str, layout: Layout) -> None:
        weight: Any = base.weight
        num_tokens, width = weight.shape
        self.op = BaseOp(Site(name, num_tokens, width, SiteKind.EMBEDDING), 0, base, weight.detach())
        self.layout = layout
        self.adapters: dict[str, Adapter] = {}
        base.register_forward_hook(self._rewrite)

    def _rewrite(self, module: nn.Module, args: tuple[torch.Tensor], y_1TN: torch.Tensor) -> torch.Tensor | None:
        uses = self.layout.uses(self.adapters)
        if not uses:
            return None
        return rewrite_output(y_1TN[0], args[0][0], uses, self.layout.training).unsqueeze(0)


class MountedAttention:
    """A layer's attention, in which segments of some tasks also see keys and values that the task trains."""

    def __init__(self, base: nn.Module, site: Site, index: int, layout: Layout) -> None:
        weight: Any = next(base.parameters())
        self.op = BaseOp(site, index, base, weight.detach())
        self.layout = layout
        self.adapters: dict[str, Adapter] = {}

    def prefixes(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Return keys and values, [1, G, P, D] each, by the first token of each segment that sees them."""
        prefixes = {}
        for span, adapter in self.layout.uses(self.adapters):
            key_value, start = adapter.prefix(), span.start
            for length in span.lengths:
                prefixes[start] = key_value
                start += length
        return prefixes


Mounted = MountedLinear | MountedNorm | MountedEmbedding | MountedAttention | MountedSublayer


def mount_linears(model: Any, layout: Layout) -> dict[str, MountedLinear]:
    """Wrap every linear operator of `model` but its output head, and return them by full name, in order."""
    head = model.get_output_embeddings()
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    mounted: dict[str, MountedLinear] = {}
    for index, (name, module) in enumerate(linears):
        parent, _, last = name.rpartition(".")
        mounted[name] = MountedLinear(module, name, index, layout)
        setattr(model.get_submodule(parent), last, mounted[name])
    return mounted


def group_linears(mounted: Mapping[str, MountedLinear], groups: Sequence[Sequence[str]]) -> list[SharedInput]:
    """Make groups of the operators that share their input."""
    shared = []
    for names in groups:
        group = SharedInput([mounted[name] for name in names])
        for name in names:
            mounted[name].group = group
        shared.append(group)
    return shared


def mount_norms(model: Any, layout: Layout) -> dict[str, MountedNorm]:
    """Hook every norm of `model`: nn.LayerNorm, and classes named ...Norm with a vector as weight."""
    norms = [
        (name, module)
        for name, module in model.named_modules()
        if (isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("Norm"))
        and getattr(getattr(module, "weight", None), "ndim", 0) == 1
    ]
    return {name: MountedNorm(module, name, index, layout) for index, (name, module) in enumerate(norms)}


def mount_embedding(model: Any, layout: Layout) -> dict[str, MountedEmbedding]:
    """Hook the token embedding, if it is as wide as the hidden states that the layers read."""
    embedding = model.get_input_embeddings()
    if embedding.weight.shape[1] != model.config.get_text_config().hidden_size:
        return {}
    name = next(name for name, module in model.named_modules() if module is embedding)
    return {name: MountedEmbedding(embedding, name, layout)}


def mount_attentions(model: Any, layout: Layout, calls: Sequence[AttentionCall]) -> dict[str, MountedAttention]:
    """Mount the attention of every layer that `calls` recorded; of no layer if one has a sliding window.

    Its name is the module's name + ".kv", because the module itself may also be mounted, as a sublayer.
    """
    if any(call.is_windowed for call in calls):
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    mounted: dict[str, MountedAttention] = {}
    for index, call in enumerate(calls):
        name = f"{names[id(call.module)]}.kv"
        site = Site(name, call.num_heads, call.head_width, SiteKind.ATTENTION, group_size=call.group_size)
        mounted[name] = MountedAttention(call.module, site, index, layout)
    return mounted
