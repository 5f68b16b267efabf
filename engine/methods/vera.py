"""VeRA: what is asked for, and what it takes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from engine.methods.base import FieldError, Method, Shapes, Site, differences


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

    def saved_activation_elements(self, site: Site, num_tokens: int) -> int:
        return num_tokens * self.rank

    def num_frozen(self, sites: Sequence[Site]) -> int:
        taken = self._targets(self.target_modules, sites)
        widths = [(site.in_features, site.out_features) for site in sites if site.name in taken]
        return self.rank * (max(k for k, _ in widths) + max(n for _, n in widths))

    def validate(self) -> Iterator[FieldError]:
        if not 1 <= self.rank <= 4096:
            yield FieldError("rank", self.rank, "must be 1 to 4096")
        if not 0 <= self.dropout < 1:
            yield FieldError("dropout", self.dropout, "must be at least 0 and under 1")
        if not math.isfinite(self.d_initial):
            yield FieldError("d_initial", self.d_initial, "must be finite")

    def incompatibility(self, config: Mapping[str, Any]) -> str:
        wanted = {"peft_type": self.peft_type, "r": self.rank, "projection_prng_key": self.projection_prng_key}
        return differences(config, wanted)
