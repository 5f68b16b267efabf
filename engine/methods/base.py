"""The interface of a PEFT method, and the modules of a backbone that it may be mounted on.

Only the standard library: admission validates with it, the planner counts bytes and multiplications with it, and the
engine allocates by it. Code outside engine/methods and engine/peft calls these hooks and never asks for a class.
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
    """The kind of a module that adapters can be mounted on."""

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
    """A field of the method with an invalid value. `remedy` states the valid values."""

    field: str
    value: object
    remedy: str


class Method(ABC):
    """A tenant's choice of a PEFT method and its hyperparameters.

    `name` is also the name of the method's files, of its field in the proto's oneof, and a part of paths in errors.
    """

    name: ClassVar[str]
    peft_type: ClassVar[str]  # in adapter_config.json of the adapters that it writes
    other_peft_types: ClassVar[tuple[str, ...]] = ()  # of further adapters that it can continue from
    size_field: ClassVar[str] = ""  # the field to reduce where the task fits on no executor; empty: none
    dropout: float = 0.0  # the fraction of its inputs that training drops: a field in methods that have dropout

    @abstractmethod
    def shapes(self, sites: Sequence[Site]) -> Shapes:
        """Return the shapes of its parameters by site and tensor, in the backbone's order.

        Raises InvalidInputError if it names modules that the backbone does not have, or that can't be trained.
        """

    @abstractmethod
    def validate(self) -> Iterator[FieldError]:
        """Yield the fields that are invalid on every backbone."""

    @abstractmethod
    def incompatibility(self, config: Mapping[str, Any]) -> str:
        """Return why the task can't continue from an adapter with this adapter_config.json; empty if it can."""

    @classmethod
    def config_error(cls, config: Mapping[str, Any]) -> str:
        """Return what is invalid in an adapter_config.json of this method for every task; empty if nothing is."""
        return ""

    @abstractmethod
    def saved_activation_elements(self, site: Site, num_tokens: int) -> int:
        """Return the elements that one of its sites saves for backward, for `num_tokens` of the task's tokens.

        Elements that the bare backbone saves are not counted, nor are inputs of `sites_that_save_inputs`. `num_tokens`
        includes the positions of a prefix.
        """

    def sites_that_save_inputs(self, sites: Sequence[Site]) -> list[str]:
        """Return the names of sites whose whole input is saved for backward, once for all tasks that need it.

        These are the sites where the method trains a matrix that multiplies the site's input directly.
        """
        return []

    def lr_multiplier(self, tensor: str) -> float:
        """Return the factor of the task's learning rate for tensors of this name."""
        return 1.0

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens that stand in the stream before each of the task's sequences, without a target."""
        return 0

    @property
    def num_prefix_tokens(self) -> int:
        """Positions before each sequence that it attends to and that are not tokens of the stream."""
        return 0

    def num_frozen_elements(self, sites: Sequence[Site]) -> int:
        """Return the elements that it holds beside its parameters, without gradients or moments."""
        return 0

    def num_frozen_multiplications(self, sites: Sequence[Site]) -> int:
        """Return the multiplications per token by matrices that its modules share and do not train."""
        return 0

    def _target_names(
        self,
        targets: Sequence[str],
        sites: Sequence[Site],
        field: str = "target_modules",
        kinds: Sequence[SiteKind] = (SiteKind.LINEAR,),
    ) -> set[str]:
        allowed_kinds = (SiteKind.LINEAR,) if ALL_LINEAR in targets else kinds
        adaptable = [site.name for site in sites if site.kind in allowed_kinds]
        return set(matching_modules(targets, adaptable, f"spec.{self.name}.{field}"))

    def _error(self, field: str, description: str) -> InvalidInputError:
        return InvalidInputError.of_field(f"spec.{self.name}.{field}", description)


def describe_differences(config: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return the keys whose values differ from the task's, with both values; empty if none differs."""
    keys = [key for key, value in expected.items() if config.get(key) != value]
    return ", ".join(f"has {key} = {config.get(key)!r}, the task needs {expected[key]!r}" for key in keys)
