"""Training of the backbone's own norms and biases: what is asked for, and what it takes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from engine.methods.base import FieldError, Method, Shapes, Site, SiteKind, differences
from engine.target_modules import matches


@dataclass(frozen=True)
class Selective(Method):
    """Training of some of the backbone's own vectors: norm weights and biases. The task trains a copy.

    `parameters` are full names or dotted suffixes ("input_layernorm.weight", "q_proj.bias"), or one of "all-biases"
    (BitFit, arXiv 2106.10199), "all-norms" (weights and biases of every norm: LN tuning, arXiv 2312.11420).
    """

    name: ClassVar[str] = "selective"
    peft_type: ClassVar[str] = "MUXTUNE_SELECTIVE"

    parameters: tuple[str, ...] = ()

    def shapes(self, sites: Sequence[Site]) -> Shapes:
        known = {f"{site.name}.{vector}": site for site in sites for vector in _vectors(site)}
        short = {"all-biases": [n for n in known if n.endswith(".bias")]}
        short["all-norms"] = [name for name, site in known.items() if site.kind is SiteKind.NORM]
        taken: set[str] = set()
        for wanted in self.parameters:
            found = short.get(wanted, [name for name in known if matches(wanted, name)])
            if not found:
                ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in known))
                raise self._refusal(
                    "parameters",
                    f'"{wanted}" is no norm or bias of the backbone: it has {", ".join(ends[:20])}, "all-norms"'
                    + (', "all-biases"' if short["all-biases"] else ", and no bias"),
                )
            taken |= set(found)
        if not taken:
            raise self._refusal("parameters", "is empty: name at least one norm or bias")
        result: Shapes = {}
        for name, site in known.items():
            if name in taken:
                result.setdefault(site.name, {})[name.rpartition(".")[2]] = (site.out_features,)
        return result

    def saved_activation_elements(self, site: Site, num_tokens: int) -> int:
        """Of a norm what it gives; of a linear operator's bias nothing."""
        return num_tokens * site.out_features if site.kind is SiteKind.NORM else 0

    def validate(self) -> Iterator[FieldError]:
        yield from ()

    def incompatibility(self, config: Mapping[str, Any]) -> str:
        return "" if config.get("peft_type") == "LN_TUNING" else differences(config, {"peft_type": self.peft_type})


def _vectors(site: Site) -> list[str]:
    return [*(["weight"] if site.kind is SiteKind.NORM else []), *(["bias"] if site.has_bias else [])]
