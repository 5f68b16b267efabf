"""The PEFT methods a task may ask for: what each is, where its parameters lie and how large they are.

How a method computes stands in `engine/peft/<name>.py`, whose name is the method's name here, in the proto's oneof and
in every field path. Legend of shapes: K inputs, N outputs, R rank, S bottleneck.
"""

import enum
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from engine.method import Method, Shapes, Site, SiteKind, Wrong, differences
from engine.target_modules import ALL_LINEAR, matches

MAX_RANK = 256
_MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


class LoraBias(enum.Enum):
    """Which of the backbone's biases are trained beside the factors, as PEFT's `bias`."""

    NONE = "none"
    ALL = "all"
    LORA_ONLY = "lora_only"  # of the target modules


@dataclass(frozen=True)
class Lora(Method):
    """LoRA (arXiv 2106.09685): y += scale * dropout(x) @ A.T @ B.T, scale = alpha / rank.

    `target_modules` are read as PEFT reads a list: a module matches by its full name or by a dotted suffix; the single
    entry "all-linear" takes every linear operator of the backbone but its output head. `rank_pattern` and
    `alpha_pattern` give single modules, named the same way, their own rank and alpha. rsLoRA (arXiv 2312.03732) divides
    by the root of the rank. DoRA (arXiv 2402.09353) trains the norm of each output's weights apart from their
    direction. LoRA+ (arXiv 2402.12354): B learns `b_rate_factor` times as fast as A.
    """

    name: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"use_rslora": False, "use_dora": False, "bias": "none"}  # PEFT's

    rank: int
    alpha: float  # 0: same as rank
    target_modules: tuple[str, ...]
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: LoraBias = LoraBias.NONE
    b_rate_factor: float = 1.0

    def shapes(self, sites: Sequence[Site]) -> Shapes:
        taken = self._targets(self.target_modules, sites)
        for field_, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key in pattern:
                if not any(matches(key, name) for name in taken):
                    raise self._refusal(field_, f'"{key}" matches none of the task\'s target modules')
        biased = {site.name for site in sites if site.has_bias and self._trains_bias_of(site, taken)}
        if self.bias is not LoraBias.NONE and not biased:
            raise self._refusal("bias", f'"{self.bias.value}" finds no bias in the backbone: leave it "none"')
        result: Shapes = {}
        for site in sites:
            tensors: dict[str, tuple[int, ...]] = {}
            if site.name in taken:
                rank = self.rank_of(site.name)
                tensors |= {"lora_A": (rank, site.in_features), "lora_B": (site.out_features, rank)}
                tensors |= {"lora_magnitude_vector": (site.out_features,)} if self.use_dora else {}
            tensors |= {"bias": (site.out_features,)} if site.name in biased else {}
            if tensors:
                result[site.name] = tensors
        return result

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", self.alpha or float(self.rank))

    def rank_of(self, name: str) -> int:
        return next((rank for key, rank in self.rank_pattern.items() if matches(key, name)), self.rank)

    def scale_of(self, name: str) -> float:
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if matches(key, name)), self.alpha)
        rank = self.rank_of(name)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rate_factor(self, tensor: str) -> float:
        return self.b_rate_factor if tensor == "lora_B" else 1.0

    def wrongs(self) -> Iterator[Wrong]:
        if not 1 <= self.rank <= MAX_RANK:
            yield Wrong("rank", self.rank, f"must be 1 to {MAX_RANK}")
        if not 0 < self.alpha < math.inf:
            yield Wrong("alpha", self.alpha, "must be positive (0: same as rank)")
        if not 0 <= self.dropout < 1:
            yield Wrong("dropout", self.dropout, "must be at least 0 and under 1")
        if not 0 < self.b_rate_factor < math.inf:
            yield Wrong("b_rate_factor", self.b_rate_factor, "must be positive and finite")
        for field_, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key in pattern:
                if not _MODULE_NAME.fullmatch(key):
                    yield Wrong(field_, key, "must be a module's name or the dotted end of one, not an expression")
        for key, rank in self.rank_pattern.items():
            if not 1 <= rank <= MAX_RANK:
                yield Wrong("rank_pattern", f"{key}: {rank}", f"must be 1 to {MAX_RANK}")
        for key, alpha in self.alpha_pattern.items():
            if not 0 < alpha < math.inf:
                yield Wrong("alpha_pattern", f"{key}: {alpha}", "must be positive and finite")

    def misfit(self, config: Mapping[str, Any]) -> str:
        if config.get("peft_type") != self.peft_type:
            return f"is of type {config.get('peft_type')}, not LoRA"
        for key, ours in {"use_rslora": self.use_rslora, "use_dora": self.use_dora, "bias": self.bias.value}.items():
            if config.get(key, Lora.DEFAULTS[key]) != ours:
                return f"sets {key} = {config.get(key)!r}, the task {ours!r}"
        for key in ("lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"):
            if config.get(key):
                return f"sets {key} = {config[key]!r}, which no task here trains"
        if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
            return f"was initialised by {config['init_lora_weights']!r}, which changes the backbone's own weights"
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if rank != self.rank or not isinstance(alpha, int | float):
            return f"has rank {rank!r} and alpha {alpha!r}, the task rank {self.rank}"
        if not math.isclose(alpha, self.alpha):
            return f"scales by alpha / rank = {alpha:g} / {rank}, the task by {self.alpha:g} / {self.rank}"
        for key, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if dict(config.get(key) or {}) != dict(pattern):
                return f"sets {key} = {config.get(key)!r}, the task {dict(pattern)!r}"
        return ""

    def _trains_bias_of(self, site: Site, taken: set[str]) -> bool:
        return self.bias is LoraBias.ALL or (self.bias is LoraBias.LORA_ONLY and site.name in taken)


@dataclass(frozen=True)
class Vera(Method):
    """VeRA (arXiv 2310.11454): y += b * (d * dropout(x) @ A.T) @ B.T; A and B random, frozen, shared by all modules.

    They follow from `projection_prng_key` and the widest target module, as in PEFT, and are exported with the adapter.
    """

    name: ClassVar[str] = "vera"
    peft_type: ClassVar[str] = "VERA"

    rank: int = 256
    target_modules: tuple[str, ...] = ()
    dropout: float = 0.0
    d_initial: float = 0.1
    projection_prng_key: int = 0

    def shapes(self, sites: Sequence[Site]) -> Shapes:
        taken = self._targets(self.target_modules, sites)
        return {
            site.name: {"vera_lambda_b": (site.out_features,), "vera_lambda_d": (self.rank,)}
            for site in sites
            if site.name in taken
        }

    def num_frozen(self, sites: Sequence[Site]) -> int:
        taken = self._targets(self.target_modules, sites)
        widths = [(site.in_features, site.out_features) for site in sites if site.name in taken]
        return self.rank * (max(k for k, _ in widths) + max(n for _, n in widths))

    def wrongs(self) -> Iterator[Wrong]:
        if not 1 <= self.rank <= 4096:
            yield Wrong("rank", self.rank, "must be 1 to 4096")
        if not 0 <= self.dropout < 1:
            yield Wrong("dropout", self.dropout, "must be at least 0 and under 1")
        if not math.isfinite(self.d_initial):
            yield Wrong("d_initial", self.d_initial, "must be finite")

    def misfit(self, config: Mapping[str, Any]) -> str:
        wanted = {"peft_type": self.peft_type, "r": self.rank, "projection_prng_key": self.projection_prng_key}
        return differences(config, wanted)


@dataclass(frozen=True)
class Ia3(Method):
    """(IA)^3 (arXiv 2205.05638): y = l * (x W + b); at `feedforward_modules` the input is scaled: y = (l * x) W + b."""

    name: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"

    target_modules: tuple[str, ...] = ()
    feedforward_modules: tuple[str, ...] = ()

    def shapes(self, sites: Sequence[Site]) -> Shapes:
        taken = self._targets(self.target_modules, sites)
        if self.feedforward_modules:
            inputs = self._targets(self.feedforward_modules, sites, "feedforward_modules")
            if odd := sorted(inputs - taken):
                raise self._refusal("feedforward_modules", f'"{odd[0]}" is not among the target modules')
        return {
            site.name: {"ia3_l": (1, site.in_features) if self.scales_input(site.name) else (site.out_features, 1)}
            for site in sites
            if site.name in taken
        }

    def scales_input(self, name: str) -> bool:
        return ALL_LINEAR in self.feedforward_modules or any(matches(m, name) for m in self.feedforward_modules)

    def wrongs(self) -> Iterator[Wrong]:
        yield from ()

    def misfit(self, config: Mapping[str, Any]) -> str:
        return differences(config, {"peft_type": self.peft_type})


class Placement(enum.Enum):
    SERIAL = "serial"  # reads the operator's output
    PARALLEL = "parallel"  # reads the operator's input


class Activation(enum.Enum):
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"
    TANH = "tanh"


@dataclass(frozen=True)
class Bottleneck(Method):
    """Bottleneck adapters: y += scale * (act(h @ D.T + d) @ U.T + u), h the operator's output (serial) or input.

    Serial at the last operator of both sublayers (o_proj and down_proj in Llama) is the placement of Houlsby et al.
    (arXiv 1902.00751), at the feed-forward one alone that of Pfeiffer et al. (arXiv 2005.00247); parallel is that of He
    et al. (arXiv 2110.04366). All before the residual is added. U starts at zero: the task starts as the backbone.
    """

    name: ClassVar[str] = "bottleneck"
    peft_type: ClassVar[str] = "MUXTUNE_BOTTLENECK"

    size: int = 64
    target_modules: tuple[str, ...] = ()
    placement: Placement = Placement.SERIAL
    activation: Activation = Activation.RELU
    scale: float = 1.0

    def shapes(self, sites: Sequence[Site]) -> Shapes:
        taken = self._targets(self.target_modules, sites)
        return {site.name: self._shapes_at(site) for site in sites if site.name in taken}

    def _shapes_at(self, site: Site) -> dict[str, tuple[int, ...]]:
        width = site.out_features if self.placement is Placement.SERIAL else site.in_features
        down = {"down_weight": (self.size, width), "down_bias": (self.size,)}
        return down | {"up_weight": (site.out_features, self.size), "up_bias": (site.out_features,)}

    def wrongs(self) -> Iterator[Wrong]:
        if not 1 <= self.size <= 8192:
            yield Wrong("size", self.size, "must be 1 to 8192")
        if not 0 < self.scale < math.inf:
            yield Wrong("scale", self.scale, "must be positive and finite")

    def misfit(self, config: Mapping[str, Any]) -> str:
        wanted = {"size": self.size, "placement": self.placement.value, "activation": self.activation.value}
        return differences(config, {"peft_type": self.peft_type, **wanted, "scale": self.scale})


@dataclass(frozen=True)
class Selective(Method):
    """Training of some of the backbone's own vectors: norm weights and biases. The task trains a copy.

    `parameters` are full names or dotted suffixes ("input_layernorm.weight", "q_proj.bias"), or one of "all-biases"
    (BitFit, arXiv 2106.10199), "all-norms" (weights and biases of every norm: LN tuning, arXiv 2312.11420).
    """

    name: ClassVar[str] = "selective"
    peft_type: ClassVar[str] = "MUXTUNE_SELECTIVE"

    parameters: tuple[str, ...] = ()

    def shapes(self, sites: Sequence[Site]) -> Shapes:
        known = {f"{site.name}.{vector}": site for site in sites for vector in _vectors(site)}
        short = {"all-biases": [n for n in known if n.endswith(".bias")]}
        short["all-norms"] = [name for name, site in known.items() if site.kind is SiteKind.NORM]
        taken: set[str] = set()
        for wanted in self.parameters:
            found = short.get(wanted, [name for name in known if matches(wanted, name)])
            if not found:
                ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in known))
                raise self._refusal(
                    "parameters",
                    f'"{wanted}" is no norm or bias of the backbone: it has {", ".join(ends[:20])}, "all-norms"'
                    + (', "all-biases"' if short["all-biases"] else ", and no bias"),
                )
            taken |= set(found)
        if not taken:
            raise self._refusal("parameters", "is empty: name at least one norm or bias")
        result: Shapes = {}
        for name, site in known.items():
            if name in taken:
                result.setdefault(site.name, {})[name.rpartition(".")[2]] = (site.out_features,)
        return result

    def wrongs(self) -> Iterator[Wrong]:
        yield from ()

    def misfit(self, config: Mapping[str, Any]) -> str:
        return "" if config.get("peft_type") == "LN_TUNING" else differences(config, {"peft_type": self.peft_type})


@dataclass(frozen=True)
class Prompt(Method):
    """Prompt tuning (arXiv 2104.08691): `length` trained embeddings stand before each of the task's sequences.

    They start as the embeddings of tokens drawn from the vocabulary.
    """

    name: ClassVar[str] = "prompt"
    peft_type: ClassVar[str] = "PROMPT_TUNING"

    length: int = 8

    @property
    def num_virtual_tokens(self) -> int:
        return self.length

    def shapes(self, sites: Sequence[Site]) -> Shapes:
        found = [site for site in sites if site.kind is SiteKind.EMBEDDING]
        if not found:
            raise self._refusal("length", "the backbone's layers are not as wide as its embeddings: use another method")
        return {site.name: {"prompt": (self.length, site.out_features)} for site in found}

    def wrongs(self) -> Iterator[Wrong]:
        if not 1 <= self.length <= 1024:
            yield Wrong("length", self.length, "must be 1 to 1024")

    def misfit(self, config: Mapping[str, Any]) -> str:
        return differences(config, {"peft_type": self.peft_type, "num_virtual_tokens": self.length})


@dataclass(frozen=True)
class Prefix(Method):
    """Prefix tuning (arXiv 2101.00190), without reparameterisation: every attention also sees `length` trained keys and
    values, and the sequence's own positions start after them.
    """

    name: ClassVar[str] = "prefix"
    peft_type: ClassVar[str] = "PREFIX_TUNING"

    length: int = 8

    @property
    def num_prefix_tokens(self) -> int:
        return self.length

    def shapes(self, sites: Sequence[Site]) -> Shapes:
        found = [site for site in sites if site.kind is SiteKind.ATTENTION]
        if not found:
            raise self._refusal("length", "the backbone has layers whose attention is bounded: use another method")
        return {site.name: {"prefix": (self.length, 2, site.in_features, site.out_features)} for site in found}

    def wrongs(self) -> Iterator[Wrong]:
        if not 1 <= self.length <= 1024:
            yield Wrong("length", self.length, "must be 1 to 1024")

    def misfit(self, config: Mapping[str, Any]) -> str:
        if config.get("prefix_projection"):
            return "sets prefix_projection, which no task here trains"
        return differences(config, {"peft_type": self.peft_type, "num_virtual_tokens": self.length})


def _vectors(site: Site) -> list[str]:
    return [*(["weight"] if site.kind is SiteKind.NORM else []), *(["bias"] if site.has_bias else [])]


@dataclass(frozen=True)
class Miss(Method):
    """MiSS (arXiv 2409.15371): y += sums(dropout(x)) @ D; the i-th of the R sums is over the columns i + j * R of x."""

    name: ClassVar[str] = "miss"
    peft_type: ClassVar[str] = "MISS"

    rank: int = 64
    target_modules: tuple[str, ...] = ()
    dropout: float = 0.0

    def shapes(self, sites: Sequence[Site]) -> Shapes:
        taken = [site for site in sites if site.name in self._targets(self.target_modules, sites)]
        if narrow := [site for site in taken if site.in_features < self.rank]:
            raise self._refusal("rank", f"{self.rank} is over the {narrow[0].in_features} inputs of {narrow[0].name}")
        return {site.name: {"miss_block": (self.rank, site.out_features)} for site in taken}

    def num_frozen(self, sites: Sequence[Site]) -> int:
        taken = self._targets(self.target_modules, sites)
        return self.rank * sum(site.in_features for site in sites if site.name in taken)

    def wrongs(self) -> Iterator[Wrong]:
        if not 1 <= self.rank <= 4096:
            yield Wrong("rank", self.rank, "must be 1 to 4096")
        if not 0 <= self.dropout < 1:
            yield Wrong("dropout", self.dropout, "must be at least 0 and under 1")

    def misfit(self, config: Mapping[str, Any]) -> str:
        if config.get("init_weights", True) not in (True, False):
            return f"is of the variant {config['init_weights']!r}, which no task here trains"
        return differences(config, {"peft_type": self.peft_type, "r": self.rank})


METHODS: dict[str, type[Method]] = {m.name: m for m in (Lora, Vera, Ia3, Bottleneck, Selective, Prompt, Prefix, Miss)}
