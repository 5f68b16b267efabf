"""What every PEFT method says of itself, and the modules of a backbone it may be mounted on.

Only the standard library: admission validates with it, the planner counts bytes with it, the engine allocates by it.
"""

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from engine.errors import InvalidInputError
from engine.target_modules import ALL_LINEAR, matching_modules

Shapes = dict[str, dict[str, tuple[int, ...]]]  # by site, by tensor


class SiteKind(enum.Enum):
    LINEAR = "linear"
    NORM = "norm"  # its weight, and its bias if it has one, are vectors of `out_features`
    EMBEDDING = "embedding"  # of tokens: vocabulary by `out_features`
    ATTENTION = "attention"  # of a whole context: `in_features` key-value heads of width `out_features`
    BLOCK = "block"  # a whole sublayer, an attention or a feed-forward network, from hidden states to hidden states


@dataclass(frozen=True)
class Site:
    """A module of the backbone that an adapter can be mounted on."""

    name: str
    in_features: int
    out_features: int
    kind: SiteKind = SiteKind.LINEAR
    has_bias: bool = False
    group_size: int = 1  # of an attention: query heads that share one key-value head


@dataclass(frozen=True)
class FieldError:
    """A field of the method that will not do; `remedy` says what will."""

    field: str
    value: object
    remedy: str


class Method(ABC):
    """What a tenant asks for. `name` is the file, the oneof's field and the path of errors in one."""

    name: ClassVar[str]
    peft_type: ClassVar[str]  # of the adapters it reads and writes
    dropout: float = 0.0  # the part of its inputs that is dropped in training: a field where a method has it

    @abstractmethod
    def shapes(self, sites: Sequence[Site]) -> Shapes:
        """Shapes of its parameters by site and tensor, in the backbone's order.

        Raises InvalidInputError if what it names is not there, or can't be trained.
        """

    @abstractmethod
    def validate(self) -> Iterator[FieldError]:
        """What no backbone would make right."""

    @abstractmethod
    def incompatibility(self, config: Mapping[str, Any]) -> str:
        """Why an adapter of this adapter_config.json computes something else than the task; empty: it does not."""

    @abstractmethod
    def saved_activation_elements(self, site: Site, num_tokens: int) -> int:
        """Elements kept for backward at one of its sites, for `num_tokens` of the task's own.

        Beyond what the bare backbone keeps, and beyond the site's input, which is kept whole, once for all its tasks,
        where one of them trains a matrix that it is multiplied by. `num_tokens` count a prefix where there is one.
        """

    def lr_multiplier(self, tensor: str) -> float:
        """What the task's learning rate is multiplied by for a tensor of this name."""
        return 1.0

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens that stand in the stream before each of the task's sequences, without a target."""
        return 0

    @property
    def num_prefix_tokens(self) -> int:
        """Positions before each sequence that it attends to and that are no tokens of the stream."""
        return 0

    def num_frozen(self, sites: Sequence[Site]) -> int:
        """Elements it holds beside its parameters, without gradients or moments."""
        return 0

    def _targets(
        self,
        targets: Sequence[str],
        sites: Sequence[Site],
        field: str = "target_modules",
        kinds: Sequence[SiteKind] = (SiteKind.LINEAR,),
    ) -> set[str]:
        taken = (SiteKind.LINEAR,) if ALL_LINEAR in targets else kinds
        adaptable = [site.name for site in sites if site.kind in taken]
        return set(matching_modules(targets, adaptable, f"spec.{self.name}.{field}"))

    def _refusal(self, field: str, what: str) -> InvalidInputError:
        return InvalidInputError.of_field(f"spec.{self.name}.{field}", what)


def differences(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    odd = [key for key, value in wanted.items() if config.get(key) != value]
    return ", ".join(f"has {key} = {config.get(key)!r}, the task {wanted[key]!r}" for key in odd)
