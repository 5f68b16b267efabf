"""(IA)^3: hyperparameters, shapes and memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from engine.methods.base import FieldError, Method, Shapes, Site, describe_differences
from engine.target_modules import ALL_LINEAR, dotted_suffixes


@dataclass(frozen=True)
class Ia3(Method):
    """(IA)^3 (arXiv 2205.05638): y = l * (x W + b); at `feedforward_modules` the input is scaled: y = (l * x) W + b."""

    name: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"

    target_modules: tuple[str, ...] = ()
    feedforward_modules: tuple[str, ...] = ()

    def shapes(self, sites: Sequence[Site]) -> Shapes:
        targets = self._target_names(self.target_modules, sites)
        if self.feedforward_modules:
            inputs = self._target_names(self.feedforward_modules, sites, "feedforward_modules")
            if not inputs <= targets:
                name = min(inputs - targets)
                raise self._error("feedforward_modules", f'"{name}" is not in target_modules: add it there')
        return {
            site.name: {"ia3_l": (1, site.in_features) if self.scales_input(site.name) else (site.out_features, 1)}
            for site in sites
            if site.name in targets
        }

    def saved_activation_elements(self, site: Site, num_tokens: int) -> int:
        return num_tokens * (site.in_features if self.scales_input(site.name) else site.out_features)

    def scales_input(self, name: str) -> bool:
        return ALL_LINEAR in self._inputs or not self._inputs.isdisjoint(dotted_suffixes(name))

    @cached_property
    def _inputs(self) -> frozenset[str]:
        return frozenset(self.feedforward_modules)

    def validate(self) -> Iterator[FieldError]:
        yield from ()

    def incompatibility(self, config: Mapping[str, Any]) -> str:
        return describe_differences(config, {"peft_type": self.peft_type})
