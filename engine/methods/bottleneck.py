"""Bottleneck adapters: hyperparameters, shapes and memory."""

import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from engine.methods.base import FieldError, Method, Shapes, Site, SiteKind, describe_differences


class BottleneckPlacement(enum.Enum):
    SERIAL = "serial"  # reads the operator's output
    PARALLEL = "parallel"  # reads the operator's input


class Activation(enum.Enum):
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"
    TANH = "tanh"


@dataclass(frozen=True)
class Bottleneck(Method):
    """Bottleneck adapters: y += scale * (act(h @ D.T + d) @ U.T + u), h the operator's output (serial) or input.

    At linear operators, or at whole sublayers: serial at both of a layer ("self_attn", "mlp" in Llama) is the placement
    of Houlsby et al. (arXiv 1902.00751), serial at "mlp" alone that of Pfeiffer et al. (arXiv 2005.00247), parallel at
    "mlp" that of He et al. (arXiv 2110.04366); all before the residual is added. "all-linear" does not include
    sublayers. U starts at zero, so that the task starts as the backbone.
    """

    name: ClassVar[str] = "bottleneck"
    peft_type: ClassVar[str] = "MUXTUNE_BOTTLENECK"

    size: int = 64
    target_modules: tuple[str, ...] = ()
    placement: BottleneckPlacement = BottleneckPlacement.SERIAL
    activation: Activation = Activation.RELU
    scale: float = 1.0

    def shapes(self, sites: Sequence[Site]) -> Shapes:
        targets = self._target_names(self.target_modules, sites, kinds=(SiteKind.LINEAR, SiteKind.BLOCK))
        return {site.name: self._shapes_at(site) for site in sites if site.name in targets}

    def saved_activation_elements(self, site: Site, num_tokens: int) -> int:
        """Count what it reads and S, or 2 S where the activation's slope does not follow from its output alone."""
        num_inner = self.size * (2 if self.activation in (Activation.GELU, Activation.SILU) else 1)
        return num_tokens * (self._width(site) + num_inner)

    def _width(self, site: Site) -> int:
        return site.out_features if self.placement is BottleneckPlacement.SERIAL else site.in_features

    def _shapes_at(self, site: Site) -> dict[str, tuple[int, ...]]:
        down = {"down_weight": (self.size, self._width(site)), "down_bias": (self.size,)}
        return down | {"up_weight": (site.out_features, self.size), "up_bias": (site.out_features,)}

    def validate(self) -> Iterator[FieldError]:
        if not 1 <= self.size <= 8192:
            yield FieldError("size", self.size, "must be 1 to 8192")
        if not 0 < self.scale < math.inf:
            yield FieldError("scale", self.scale, "must be positive and finite")

    def incompatibility(self, config: Mapping[str, Any]) -> str:
        expected = {"size": self.size, "placement": self.placement.value, "activation": self.activation.value}
        return describe_differences(config, {"peft_type": self.peft_type, **expected, "scale": self.scale})
