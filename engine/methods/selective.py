"""Training of the backbone's norms and biases: hyperparameters, shapes and memory."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from engine.methods.base import FieldError, Method, Shapes, Site, SiteKind, describe_differences
from engine.target_modules import dotted_suffixes


@dataclass(frozen=True)
class Selective(Method):
    """Training of some of the backbone's vectors, norm weights and biases. The task trains a copy of them.

    `parameters` are full names or dotted suffixes ("input_layernorm.weight", "q_proj.bias"), or one of "all-biases"
    (BitFit, arXiv 2106.10199), "all-norms" (weights and biases of every norm: LN tuning, arXiv 2312.11420).
    """

    name: ClassVar[str] = "selective"
    peft_type: ClassVar[str] = "MUXTUNE_SELECTIVE"
    other_peft_types: ClassVar[tuple[str, ...]] = ("LN_TUNING",)

    parameters: tuple[str, ...] = ()

    def shapes(self, sites: Sequence[Site]) -> Shapes:
        site_of = {f"{site.name}.{vector}": site for site in sites for vector in _vectors(site)}
        groups = {"all-biases": [name for name in site_of if name.endswith(".bias")]}
        groups["all-norms"] = [name for name, site in site_of.items() if site.kind is SiteKind.NORM]
        by_suffix: defaultdict[str, list[str]] = defaultdict(list)
        for name in site_of:
            for suffix in dotted_suffixes(name):
                by_suffix[suffix].append(name)
        selected: set[str] = set()
        for parameter in self.parameters:
            names = groups.get(parameter, by_suffix.get(parameter, []))
            if not names:
                ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in site_of))
                raise self._error(
                    "parameters",
                    f'"{parameter}" is not a norm or bias of the backbone: use {", ".join(ends[:20])}, "all-norms"'
                    + (' or "all-biases"' if groups["all-biases"] else "; it has no bias"),
                )
            selected |= set(names)
        if not selected:
            raise self._error("parameters", "is empty: name at least one norm or bias")
        result: Shapes = {}
        for name, site in site_of.items():
            if name in selected:
                result.setdefault(site.name, {})[name.rpartition(".")[2]] = (site.out_features,)
        return result

    def saved_activation_elements(self, site: Site, num_tokens: int) -> int:
        """Count a norm's output; nothing for a linear operator's bias."""
        return num_tokens * site.out_features if site.kind is SiteKind.NORM else 0

    def validate(self) -> Iterator[FieldError]:
        yield from ()

    def incompatibility(self, config: Mapping[str, Any]) -> str:
        if config.get("peft_type") in self.other_peft_types:
            return ""
        return describe_differences(config, {"peft_type": self.peft_type})


def _vectors(site: Site) -> list[str]:
    return [*(["weight"] if site.kind is SiteKind.NORM else []), *(["bias"] if site.has_bias else [])]
