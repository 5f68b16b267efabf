"""LoRA, with rsLoRA, DoRA, LoRA+, patterns and biases: what is asked for, and what it takes."""

import enum
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from engine.methods.base import FieldError, Method, Shapes, Site
from engine.target_modules import ALL_LINEAR, matches

MAX_RANK = 256
_MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


class LoraBias(enum.Enum):
    """Which of the backbone's biases are trained beside the factors, as PEFT's `bias`."""

    NONE = "none"
    ALL = "all"
    LORA_ONLY = "lora_only"  # of the target modules


class LoraInit(enum.Enum):
    """What the factors start as. All but KAIMING start from the weight's own: the task trains the difference."""

    KAIMING = "kaiming"
    PISSA = "pissa"  # arXiv 2404.02948
    OLORA = "olora"  # arXiv 2406.01775


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
    init: LoraInit = LoraInit.KAIMING

    @property
    def starts_from_weights(self) -> bool:
        return self.init is not LoraInit.KAIMING

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
                if self.starts_from_weights and rank > min(site.in_features, site.out_features):
                    raise self._refusal(
                        "rank", f"{rank} is over the width of {site.name}, whose factors it starts from"
                    )
                tensors |= {"lora_A": (rank, site.in_features), "lora_B": (site.out_features, rank)}
                tensors |= {"lora_magnitude_vector": (site.out_features,)} if self.use_dora else {}
            tensors |= {"bias": (site.out_features,)} if site.name in biased else {}
            if tensors:
                result[site.name] = tensors
        return result

    def saved_activation_elements(self, site: Site, num_tokens: int) -> int:
        """The R shrunk; of DoRA the N that its magnitude scales, and with dropout the K that were not dropped."""
        if not any(matches(target, site.name) or target == ALL_LINEAR for target in self.target_modules):
            return 0  # its bias alone
        drops = site.in_features if self.dropout > 0 else 0
        shrunk = self.rank_of(site.name) * (2 if self.starts_from_weights else 1)
        return num_tokens * (shrunk + (site.out_features + drops if self.use_dora else 0))

    def num_frozen(self, sites: Sequence[Site]) -> int:
        """The factors that a task started from, which it subtracts."""
        if not self.starts_from_weights:
            return 0
        taken = self._targets(self.target_modules, sites)
        return sum(self.rank_of(s.name) * (s.in_features + s.out_features) for s in sites if s.name in taken)

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", self.alpha or float(self.rank))

    def rank_of(self, name: str) -> int:
        return next((rank for key, rank in self.rank_pattern.items() if matches(key, name)), self.rank)

    def scale_of(self, name: str) -> float:
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if matches(key, name)), self.alpha)
        rank = self.rank_of(name)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def lr_multiplier(self, tensor: str) -> float:
        return self.b_rate_factor if tensor == "lora_B" else 1.0

    def validate(self) -> Iterator[FieldError]:
        if not 1 <= self.rank <= MAX_RANK:
            yield FieldError("rank", self.rank, f"must be 1 to {MAX_RANK}")
        if not 0 < self.alpha < math.inf:
            yield FieldError("alpha", self.alpha, "must be positive (0: same as rank)")
        if not 0 <= self.dropout < 1:
            yield FieldError("dropout", self.dropout, "must be at least 0 and under 1")
        if not 0 < self.b_rate_factor < math.inf:
            yield FieldError("b_rate_factor", self.b_rate_factor, "must be positive and finite")
        for field_, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key in pattern:
                if not _MODULE_NAME.fullmatch(key):
                    yield FieldError(field_, key, "must be a module's name or the dotted end of one, not an expression")
        for key, rank in self.rank_pattern.items():
            if not 1 <= rank <= MAX_RANK:
                yield FieldError("rank_pattern", f"{key}: {rank}", f"must be 1 to {MAX_RANK}")
        if self.starts_from_weights:
            yield from self._wrong_beside_init()
        for key, alpha in self.alpha_pattern.items():
            if not 0 < alpha < math.inf:
                yield FieldError("alpha_pattern", f"{key}: {alpha}", "must be positive and finite")

    def _wrong_beside_init(self) -> Iterator[FieldError]:
        if self.dropout > 0 or self.use_dora:
            yield FieldError("init", self.init.name, "goes without dropout and without use_dora")
        if max([self.rank, *self.rank_pattern.values()]) > MAX_RANK // 2:
            yield FieldError(
                "init", self.init.name, f"goes with ranks of at most {MAX_RANK // 2}: it is exported at twice the rank"
            )

    def incompatibility(self, config: Mapping[str, Any]) -> str:
        if self.starts_from_weights:
            return f"cannot go on with init {self.init.name}, which starts from the weights' own factors: leave it out"
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
