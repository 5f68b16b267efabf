"""Prefix tuning: what is asked for, and what it takes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from engine.methods.base import FieldError, Method, Shapes, Site, SiteKind, differences


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

    def saved_activation_elements(self, site: Site, num_tokens: int) -> int:
        """Each segment's keys and values, prefix included, for every query head; on a CPU, of key heads only."""
        return num_tokens * 2 * site.in_features * site.group_size * site.out_features

    def validate(self) -> Iterator[FieldError]:
        if not 1 <= self.length <= 1024:
            yield FieldError("length", self.length, "must be 1 to 1024")

    def incompatibility(self, config: Mapping[str, Any]) -> str:
        if config.get("prefix_projection"):
            return "sets prefix_projection, which no task here trains"
        return differences(config, {"peft_type": self.peft_type, "num_virtual_tokens": self.length})
