"""MiSS: what is asked for, and what it takes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from engine.methods.base import FieldError, Method, Shapes, Site, differences


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

    def saved_activation_elements(self, site: Site, num_tokens: int) -> int:
        return num_tokens * self.rank

    def num_frozen(self, sites: Sequence[Site]) -> int:
        taken = self._targets(self.target_modules, sites)
        return self.rank * sum(site.in_features for site in sites if site.name in taken)

    def validate(self) -> Iterator[FieldError]:
        if not 1 <= self.rank <= 4096:
            yield FieldError("rank", self.rank, "must be 1 to 4096")
        if not 0 <= self.dropout < 1:
            yield FieldError("dropout", self.dropout, "must be at least 0 and under 1")

    def incompatibility(self, config: Mapping[str, Any]) -> str:
        if config.get("init_weights", True) not in (True, False):
            return f"is of the variant {config['init_weights']!r}, which no task here trains"
        return differences(config, {"peft_type": self.peft_type, "r": self.rank})
