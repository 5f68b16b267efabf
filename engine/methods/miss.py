"""MiSS: hyperparameters, shapes and memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from engine.methods.base import FieldError, Method, Shapes, Site, describe_differences


@dataclass(frozen=True)
class Miss(Method):
    """MiSS (arXiv 2409.15371): y += sums(dropout(x)) @ D; the i-th of the R sums is over the columns i + j * R of x."""

    name: ClassVar[str] = "miss"
    peft_type: ClassVar[str] = "MISS"
    size_field: ClassVar[str] = "rank"

    rank: int = 64
    target_modules: tuple[str, ...] = ()
    dropout: float = 0.0

    def shapes(self, sites: Sequence[Site]) -> Shapes:
        names = self._target_names(self.target_modules, sites)
        targets = [site for site in sites if site.name in names]
        for site in targets:
            if site.in_features < self.rank:
                raise self._error(
                    "rank", f"{self.rank} is over the {site.in_features} inputs of {site.name}: reduce it"
                )
        return {site.name: {"miss_block": (self.rank, site.out_features)} for site in targets}

    def saved_activation_elements(self, site: Site, num_tokens: int) -> int:
        return num_tokens * self.rank

    def num_frozen_elements(self, sites: Sequence[Site]) -> int:
        targets = self._target_names(self.target_modules, sites)
        return self.rank * sum(site.in_features for site in sites if site.name in targets)

    def validate(self) -> Iterator[FieldError]:
        if not 1 <= self.rank <= 4096:
            yield FieldError("rank", self.rank, "must be 1 to 4096")
        if not 0 <= self.dropout < 1:
            yield FieldError("dropout", self.dropout, "must be at least 0 and less than 1")

    def incompatibility(self, config: Mapping[str, Any]) -> str:
        if config.get("init_weights", True) not in (True, False):
            return (
                f"has init_weights = {config['init_weights']!r}, which muxtune does not train: use an adapter with True"
            )
        return describe_differences(config, {"peft_type": self.peft_type, "r": self.rank})
