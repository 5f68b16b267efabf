"""Seconds of a microbatch, from what is in it: a formula of eight prices, fitted to measurements by `fit.py`.

    seconds = fixed + token * max(T, knee) + segment * sequences + square * sum(L^2) + target * M
              + module * ranges' adapted modules + multiplication * adapters' multiplications
              + parameter * parameters stepped

Up to `knee` tokens a device is not busy: more tokens cost nothing. Past it the base operators are linear in tokens,
attention is a call for each sequence (on a CPU) and quadratic in its length, the output head runs at target positions
only, an adapter costs a launch for each module it is mounted on and arithmetic for each of its task's tokens, and the
optimizer passes over parameters. The formula is ours.
Legend: T tokens of the microbatch, L of a sequence, M target positions.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.methods.base import Method, Site, SiteKind


@dataclass(frozen=True)
class AdapterLoad:
    """What a task's method costs: modules adapted, multiplications for a token, parameters for the optimizer."""

    num_modules: int
    num_multiplications: int
    num_parameters: int


@dataclass(frozen=True)
class Part:
    """One task's part of a microbatch (or of many). Fractions are allowed: a part may be an average.

    `num_squared_tokens`: the sum of its sequences' lengths, squared each. `num_modules` counts once for each
    microbatch, `num_stepped_parameters` once for each optimizer step taken after it.
    """

    num_tokens: float
    num_squared_tokens: float = 0.0
    num_targets: float = 0.0
    num_modules: float = 0.0
    num_multiplications: float = 0.0  # of all its tokens
    num_stepped_parameters: float = 0.0
    num_segments: float = 0.0  # sequences


@dataclass(frozen=True)
class CostProfile:
    """Prices in seconds, each at least 0, so that more work never costs less. The zero profile knows nothing.

    `error`: median relative error on what it was fitted to.
    """

    fixed_seconds: float = 0.0
    token_seconds: float = 0.0
    knee_tokens: float = 0.0
    square_seconds: float = 0.0
    target_seconds: float = 0.0
    module_seconds: float = 0.0
    multiplication_seconds: float = 0.0
    parameter_seconds: float = 0.0
    segment_seconds: float = 0.0
    error: float = 0.0

    @property
    def is_known(self) -> bool:
        return self.token_seconds > 0 or self.fixed_seconds > 0

    def microbatch_seconds(self, parts: Iterable[Part]) -> float:
        """Forward, backward and the optimizer steps of one microbatch."""
        whole = total(parts)
        return self.base_seconds(whole.num_tokens, 1) + self.extra_seconds(whole)

    def base_seconds(self, num_tokens: float, num_microbatches: float) -> float:
        """What the backbone's operators cost for tokens spread evenly over microbatches."""
        busy = max(num_tokens, num_microbatches * self.knee_tokens)
        return self.fixed_seconds * num_microbatches + self.token_seconds * busy

    def extra_seconds(self, part: Part) -> float:
        """What a part costs whoever it is fused with: attention, head, adapter, optimizer. Adds up over parts."""
        return (
            self.square_seconds * part.num_squared_tokens
            + self.target_seconds * part.num_targets
            + self.module_seconds * part.num_modules
            + self.multiplication_seconds * part.num_multiplications
            + self.parameter_seconds * part.num_stepped_parameters
            + self.segment_seconds * part.num_segments
        )


UNKNOWN = CostProfile()


def total(parts: Iterable[Part]) -> Part:
    """All of them as one."""
    rows = [
        (p.num_tokens, p.num_squared_tokens, p.num_targets, p.num_modules, p.num_multiplications,
         p.num_stepped_parameters, p.num_segments)
        for p in parts
    ]  # fmt: skip
    return Part(*map(sum, zip(*rows, strict=True))) if rows else Part(0.0)


def adapter_load(method: Method, sites: Sequence[Site]) -> AdapterLoad:
    """Raises InvalidInputError if what the method names is not among the sites."""
    shapes = method.shapes(sites)
    linear = {site.name for site in sites if site.kind in (SiteKind.LINEAR, SiteKind.BLOCK)}
    sizes = {name: sum(math.prod(shape) for shape in tensors.values()) for name, tensors in shapes.items()}
    multiplications = sum(size for name, size in sizes.items() if name in linear)
    multiplications += method.num_frozen_multiplications(sites)
    return AdapterLoad(len(shapes), multiplications, sum(sizes.values()))
