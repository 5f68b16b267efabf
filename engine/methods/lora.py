"""LoRA, with rsLoRA, DoRA, LoRA+, patterns and biases: hyperparameters, shapes and memory."""

import enum
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from engine.methods.base import FieldError, Method, Shapes, Site
from engine.target_modules import ALL_LINEAR, dotted_suffixes, first_match

MAX_RANK = 256
_MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


class LoraBias(enum.Enum):
    """The backbone's biases that are trained beside the factors, as PEFT's `bias`."""

    NONE = "none"
    ALL = "all"
    LORA_ONLY = "lora_only"  # of the target modules


class LoraInit(enum.Enum):
    """The initial values of the factors. PISSA and OLORA are factors of the weight: the task trains the difference."""

    KAIMING = "kaiming"
    PISSA = "pissa"  # arXiv 2404.02948
    OLORA = "olora"  # arXiv 2406.01775


@dataclass(frozen=True)
class Lora(Method):
    """LoRA (arXiv 2106.09685): y += scale * dropout(x) @ A.T @ B.T, scale = alpha / rank.

    `target_modules` are read as PEFT reads a list: a module matches by its full name or by a dotted suffix; the single
    entry "all-linear" means every linear operator of the backbone but its output head. `rank_pattern` and
    `alpha_pattern` set rank and alpha of single modules, named the same way. rsLoRA (arXiv 2312.03732) divides by the
    root of the rank. DoRA (arXiv 2402.09353) trains the norm of each output's weights apart from their direction. LoRA+
    (arXiv 2402.12354): the learning rate of B is `b_rate_factor` times that of A.
    """

    name: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    size_field: ClassVar[str] = "rank"
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

    @cached_property
    def _targets(self) -> frozenset[str]:
        return frozenset(self.target_modules)

    @property
    def starts_from_weights(self) -> bool:
        return self.init is not LoraInit.KAIMING

    def shapes(self, sites: Sequence[Site]) -> Shapes:
        targets = self._target_names(self.target_modules, sites)
        for field_, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            matched = {suffix for name in targets for suffix in dotted_suffixes(name)} if pattern else set()
            for key in pattern:
                if key not in matched:
                    raise self._error(field_, f'"{key}" does not match a module of target_modules: remove it')
        biased = {site.name for site in sites if site.has_bias and self._trains_bias_of(site, targets)}
        if self.bias is not LoraBias.NONE and not biased:
            raise self._error("bias", f'"{self.bias.value}" needs biases, the target backbone has none: set "none"')
        result: Shapes = {}
        for site in sites:
            tensors: dict[str, tuple[int, ...]] = {}
            if site.name in targets:
                rank = self.rank_of(site.name)
                if self.starts_from_weights and rank > min(site.in_features, site.out_features):
                    limit = min(site.in_features, site.out_features)
                    raise self._error(
                        "rank",
                        f"{rank} is over the {limit} that {site.name} allows with init {self.init.name}: reduce it",
                    )
                tensors |= {"lora_A": (rank, site.in_features), "lora_B": (site.out_features, rank)}
                tensors |= {"lora_magnitude_vector": (site.out_features,)} if self.use_dora else {}
            tensors |= {"bias": (site.out_features,)} if site.name in biased else {}
            if tensors:
                result[site.name] = tensors
        return result

    def saved_activation_elements(self, site: Site, num_tokens: int) -> int:
        """Count the R between A and B; for DoRA also the N before the magnitude, and with dropout the K kept inputs."""
        if ALL_LINEAR not in self._targets and self._targets.isdisjoint(dotted_suffixes(site.name)):
            return 0  # only its bias is trained
        drops = site.in_features if self.dropout > 0 else 0
        shrunk = self.rank_of(site.name) * (2 if self.starts_from_weights else 1)
        return num_tokens * (shrunk + (site.out_features + drops if self.use_dora else 0))

    def num_frozen_elements(self, sites: Sequence[Site]) -> int:
        """Count the initial factors, which PISSA and OLORA subtract."""
        if not self.starts_from_weights:
            return 0
        targets = self._target_names(self.target_modules, sites)
        return sum(self.rank_of(s.name) * (s.in_features + s.out_features) for s in sites if s.name in targets)

    def sites_that_save_inputs(self, sites: Sequence[Site]) -> list[str]:
        """Return the targets: A multiplies their inputs."""
        targets = self._target_names(self.target_modules, sites)
        return [site.name for site in sites if site.name in targets]

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", self.alpha or float(self.rank))

    def rank_of(self, name: str) -> int:
        return self.rank if (key := first_match(self.rank_pattern, name)) is None else self.rank_pattern[key]

    def scale_of(self, name: str) -> float:
        alpha = self.alpha if (key := first_match(self.alpha_pattern, name)) is None else self.alpha_pattern[key]
        rank = self.rank_of(name)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def lr_multiplier(self, tensor: str) -> float:
        return self.b_rate_factor if tensor == "lora_B" else 1.0

    def validate(self) -> Iterator[FieldError]:
        if not 1 <= self.rank <= MAX_RANK:
            yield FieldError("rank", self.rank, f"must be 1 to {MAX_RANK}")
        if not 0 < self.alpha < math.inf:
            yield FieldError("alpha", self.alpha, "must be positive and finite, or 0 for the same as rank")
        if not 0 <= self.dropout < 1:
            yield FieldError("dropout", self.dropout, "must be at least 0 and less than 1")
        if not 0 < self.b_rate_factor < math.inf:
            yield FieldError("b_rate_factor", self.b_rate_factor, "must be positive and finite")
        for field_, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key in pattern:
                if not _MODULE_NAME.fullmatch(key):
                    yield FieldError(
                        field_,
                        key,
                        "must be a module's name or its last parts, such as self_attn.q_proj, without patterns",
                    )
        for key, rank in self.rank_pattern.items():
            if not 1 <= rank <= MAX_RANK:
                yield FieldError("rank_pattern", f"{key}: {rank}", f"must be 1 to {MAX_RANK}")
        if self.starts_from_weights:
            yield from self._validate_init()
        for key, alpha in self.alpha_pattern.items():
            if not 0 < alpha < math.inf:
                yield FieldError("alpha_pattern", f"{key}: {alpha}", "must be positive and finite")

    def _validate_init(self) -> Iterator[FieldError]:
        if self.dropout > 0 or self.use_dora:
            yield FieldError("init", self.init.name, "needs dropout 0 and use_dora false")
        if max([self.rank, *self.rank_pattern.values()]) > MAX_RANK // 2:
            yield FieldError(
                "init", self.init.name, f"needs ranks of at most {MAX_RANK // 2}: it is exported with twice the rank"
            )

    def incompatibility(self, config: Mapping[str, Any]) -> str:
        if self.starts_from_weights:
            return f"cannot be continued with init {self.init.name}, which sets the initial factors: leave init unset"
        if config.get("peft_type") != self.peft_type:
            return f"has peft_type {config.get('peft_type')!r}, the task needs 'LORA'"
        for key, ours in {"use_rslora": self.use_rslora, "use_dora": self.use_dora, "bias": self.bias.value}.items():
            if config.get(key, Lora.DEFAULTS[key]) != ours:
                return f"has {key} = {config.get(key)!r}, the task has {ours!r}"
        for key in ("lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"):
            if config.get(key):
                return f"has {key} = {config[key]!r}, which muxtune does not train: use an adapter without it"
        if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
            return f"has init_lora_weights = {config['init_lora_weights']!r}, which changes the backbone's weights"
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if rank != self.rank or not isinstance(alpha, int | float):
            return f"has rank {rank!r} and alpha {alpha!r}, the task has rank {self.rank} and alpha {self.alpha:g}"
        if not math.isclose(alpha, self.alpha):
            return f"has alpha {alpha:g} at rank {rank}, the task has alpha {self.alpha:g}"
        for key, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if dict(config.get(key) or {}) != dict(pattern):
                return f"has {key} = {config.get(key)!r}, the task has {dict(pattern)!r}"
        return ""

    @classmethod
    def config_error(cls, config: Mapping[str, Any]) -> str:
        try:
            is_valid = 0 < int(config["r"]) <= MAX_RANK and math.isfinite(config["lora_alpha"])
        except (KeyError, TypeError, ValueError, OverflowError):
            is_valid = False
        return "" if is_valid else f"needs r from 1 to {MAX_RANK} and a finite lora_alpha"

    def _trains_bias_of(self, site: Site, targets: set[str]) -> bool:
        return self.bias is LoraBias.ALL or (self.bias is LoraBias.LORA_ONLY and site.name in targets)
