"""Prefix tuning: hyperparameters, shapes and memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from engine.methods.base import FieldError, Method, Shapes, Site, SiteKind, describe_differences


@dataclass(frozen=True)
class Prefix(Method):
    """Prefix tuning (arXiv 2101.00190) without reparameterisation.

    Every attention also sees `length` trained keys and values. The positions of the sequence start after them.
    """

    name: ClassVar[str] = "prefix"
    peft_type: ClassVar[str] = "PREFIX_TUNING"

    length: int = 8

    @property
    def num_prefix_tokens(self) -> int:
        return self.length

    def shapes(self, sites: Sequence[Site]) -> Shapes:
        attentions = [site for site in sites if site.kind is SiteKind.ATTENTION]
        if not attentions:
            raise self._error("length", "the backbone has layers with a sliding window: use another method")
        return {site.name: {"prefix": (self.length, 2, site.in_features, site.out_features)} for site in attentions}

    def saved_activation_elements(self, site: Site, num_tokens: int) -> int:
        """Count each segment's keys and values with the prefix, for all query heads; a CPU saves only key heads'."""
        return num_tokens * 2 * site.in_features * site.group_size * site.out_features

    def validate(self) -> Iterator[FieldError]:
        if not 1 <= self.length <= 1024:
            yield FieldError("length", self.length, "must be 1 to 1024")

    def incompatibility(self, config: Mapping[str, Any]) -> str:
        if config.get("prefix_projection"):
            return "has prefix_projection, which muxtune does not train: use an adapter without it"
        return describe_differences(config, {"peft_type": self.peft_type, "num_virtual_tokens": self.length})
