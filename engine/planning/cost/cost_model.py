"""Seconds of a microbatch, from the work in it: a formula of eight prices, fitted to measurements by `cost_fit`.

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
from engine.planning.types import CostProfile


@dataclass(frozen=True)
class AdapterLoad:
    """Work that a task's method adds: modules adapted, multiplications for each token, parameters to step."""

    num_modules: int
    num_multiplications: int
    num_parameters: int


@dataclass(frozen=True)
class MicrobatchWork:
    """Work of one task in a microbatch, or of several tasks or microbatches together. Averages may be fractions.

    `num_squared_tokens`: the sum of squared sequence lengths. `num_modules` counts once for each microbatch,
    `num_stepped_parameters` once for each optimizer step that follows it.
    """

    num_tokens: float
    num_squared_tokens: float = 0.0
    num_targets: float = 0.0
    num_modules: float = 0.0
    num_multiplications: float = 0.0  # of all its tokens
    num_stepped_parameters: float = 0.0
    num_segments: float = 0.0  # sequences


def microbatch_seconds(profile: CostProfile, parts: Iterable[MicrobatchWork]) -> float:
    """Return the seconds of forward, backward and the optimizer steps of one microbatch."""
    whole = total(parts)
    return base_seconds(profile, whole.num_tokens, 1) + extra_seconds(profile, whole)


def base_seconds(profile: CostProfile, num_tokens: float, num_microbatches: float) -> float:
    """Return the seconds of the backbone's operators for tokens spread evenly over microbatches."""
    busy_tokens = max(num_tokens, num_microbatches * profile.knee_tokens)
    return profile.fixed_seconds * num_microbatches + profile.token_seconds * busy_tokens


def extra_seconds(profile: CostProfile, work: MicrobatchWork) -> float:
    """Return the seconds that fusion does not change: attention, head, adapter, optimizer. They add up over parts."""
    return (
        profile.square_seconds * work.num_squared_tokens
        + profile.target_seconds * work.num_targets
        + profile.module_seconds * work.num_modules
        + profile.multiplication_seconds * work.num_multiplications
        + profile.parameter_seconds * work.num_stepped_parameters
        + profile.segment_seconds * work.num_segments
    )


def total(parts: Iterable[MicrobatchWork]) -> MicrobatchWork:
    """Return the sum of all parts."""
    rows = [
        (p.num_tokens, p.num_squared_tokens, p.num_targets, p.num_modules, p.num_multiplications,
         p.num_stepped_parameters, p.num_segments)
        for p in parts
    ]  # fmt: skip
    return MicrobatchWork(*map(sum, zip(*rows, strict=True))) if rows else MicrobatchWork(0.0)


def adapter_load(method: Method, sites: Sequence[Site]) -> AdapterLoad:
    """Return the work that a method adds. Raises InvalidInputError if it names a module that is not among the sites."""
    shapes = method.shapes(sites)
    linear = {site.name for site in sites if site.kind in (SiteKind.LINEAR, SiteKind.BLOCK)}
    sizes = {name: sum(math.prod(shape) for shape in tensors.values()) for name, tensors in shapes.items()}
    multiplications = sum(size for name, size in sizes.items() if name in linear)
    multiplications += method.num_frozen_multiplications(sites)
    return AdapterLoad(len(shapes), multiplications, sum(sizes.values()))
