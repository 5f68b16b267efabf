"""VeRA: hyperparameters, shapes and memory."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from engine.methods.base import FieldError, Method, Shapes, Site, describe_differences


@dataclass(frozen=True)
class Vera(Method):
    """VeRA (arXiv 2310.11454): y += b * (d * dropout(x) @ A.T) @ B.T; A and B random, frozen, shared by all modules.

    `projection_prng_key` and the widest target module determine A and B, as in PEFT. The adapter's files contain them.
    """

    name: ClassVar[str] = "vera"
    peft_type: ClassVar[str] = "VERA"
    size_field: ClassVar[str] = "rank"

    rank: int = 256
    target_modules: tuple[str, ...] = ()
    dropout: float = 0.0
    d_initial: float = 0.1
    projection_prng_key: int = 0

    def shapes(self, sites: Sequence[Site]) -> Shapes:
        targets = self._target_names(self.target_modules, sites)
        return {
            site.name: {"vera_lambda_b": (site.out_features,), "vera_lambda_d": (self.rank,)}
            for site in sites
            if site.name in targets
        }

    def saved_activation_elements(self, site: Site, num_tokens: int) -> int:
        return num_tokens * self.rank

    def num_frozen_elements(self, sites: Sequence[Site]) -> int:
        targets = self._target_names(self.target_modules, sites)
        widths = [(site.in_features, site.out_features) for site in sites if site.name in targets]
        return self.rank * (max(k for k, _ in widths) + max(n for _, n in widths))

    def num_frozen_multiplications(self, sites: Sequence[Site]) -> int:
        """Count each module's products with A and B."""
        targets = self._target_names(self.target_modules, sites)
        return self.rank * sum(site.in_features + site.out_features for site in sites if site.name in targets)

    def validate(self) -> Iterator[FieldError]:
        if not 1 <= self.rank <= 4096:
            yield FieldError("rank", self.rank, "must be 1 to 4096")
        if not 0 <= self.dropout < 1:
            yield FieldError("dropout", self.dropout, "must be at least 0 and less than 1")
        if not math.isfinite(self.d_initial):
            yield FieldError("d_initial", self.d_initial, "must be finite")

    def incompatibility(self, config: Mapping[str, Any]) -> str:
        expected = {"peft_type": self.peft_type, "r": self.rank, "projection_prng_key": self.projection_prng_key}
        return describe_differences(config, expected)
