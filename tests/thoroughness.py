"""The parts of the tests that only `make test-all` runs: tests marked `thorough`, most examples, most seeds."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings

_SHARE = 5  # of so many examples one is part of `make test`


def is_thorough() -> bool:
    """Whether pytest was started with `--hypothesis-profile=thorough`."""
    return settings.get_current_profile_name() == "thorough"


def examples(number: int) -> int:
    """How many examples hypothesis draws where `make test-all` draws `number`."""
    return number if is_thorough() else max(5, number // _SHARE)


def seeds(number: int, first: int) -> Sequence[Any]:
    """Parameters 0 to `number` - 1; all but the `first` are thorough."""
    return [pytest.param(seed, marks=[pytest.mark.thorough] if seed >= first else []) for seed in range(number)]
