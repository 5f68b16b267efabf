"""Prompt tuning: hyperparameters, shapes and memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from engine.methods.base import FieldError, Method, Shapes, Site, SiteKind, describe_differences


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
        embeddings = [site for site in sites if site.kind is SiteKind.EMBEDDING]
        if not embeddings:
            raise self._error("length", "the backbone's embeddings and layers differ in width: use another method")
        return {site.name: {"prompt": (self.length, site.out_features)} for site in embeddings}

    def saved_activation_elements(self, site: Site, num_tokens: int) -> int:
        return 0

    def validate(self) -> Iterator[FieldError]:
        if not 1 <= self.length <= 1024:
            yield FieldError("length", self.length, "must be 1 to 1024")

    def incompatibility(self, config: Mapping[str, Any]) -> str:
        return describe_differences(config, {"peft_type": self.peft_type, "num_virtual_tokens": self.length})
