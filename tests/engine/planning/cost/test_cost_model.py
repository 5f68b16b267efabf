"""Tests the cost model: its formula by hand, loads of methods by hand, its fit against known prices."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engine.methods import Ia3, Lora, Prompt, Vera
from engine.methods.base import Site, SiteKind
from engine.planning.cost.cost_fit import CostSample, error_of, fit, nonnegative_least_squares, refit
from engine.planning.cost.cost_model import AdapterLoad, MicrobatchWork, adapter_load, microbatch_seconds, total
from engine.planning.types import CostProfile
from tests.thoroughness import examples

PROFILE = CostProfile(
    fixed_seconds=0.1, token_seconds=2e-3, knee_tokens=50, square_seconds=1e-6, target_seconds=1e-3,
    module_seconds=1e-4, multiplication_seconds=1e-9, parameter_seconds=1e-8, segment_seconds=3e-3,
)  # fmt: skip
PARTS = st.builds(
    MicrobatchWork,
    num_tokens=st.integers(1, 2000),
    num_squared_tokens=st.integers(1, 4_000_000),
    num_targets=st.integers(0, 2000),
    num_modules=st.integers(0, 300),
    num_multiplications=st.integers(0, 10**9),
    num_stepped_parameters=st.integers(0, 10**7),
    num_segments=st.integers(0, 50),
)


def test_seconds_by_hand() -> None:
    parts = [MicrobatchWork(30, 900, 10, 4, 1_000_000, 0, 2), MicrobatchWork(10, 100, 10, 2, 0, 500_000, 5)]
    expected = 0.1 + 2e-3 * 50 + 1e-6 * 1000 + 1e-3 * 20 + 1e-4 * 6 + 1e-9 * 1e6 + 1e-8 * 5e5
    expected += 3e-3 * 7
    assert microbatch_seconds(PROFILE, parts) == pytest.approx(expected)
    assert microbatch_seconds(PROFILE, [*parts, MicrobatchWork(60)]) == pytest.approx(expected + 2e-3 * 50)


@given(st.lists(PARTS, min_size=1, max_size=5), PARTS)
@settings(deadline=None)
def test_more_work_never_costs_less(parts: list[MicrobatchWork], more: MicrobatchWork) -> None:
    assert microbatch_seconds(PROFILE, [*parts, more]) >= microbatch_seconds(PROFILE, parts)
    assert microbatch_seconds(PROFILE, parts) == pytest.approx(microbatch_seconds(PROFILE, [total(parts)]))


def test_loads_of_methods_by_hand() -> None:
    sites = (
        Site("a.q_proj", 64, 32),
        Site("a.up_proj", 64, 128),
        Site("norm", 0, 64, SiteKind.NORM),
        Site("embed", 0, 64, SiteKind.EMBEDDING),
    )
    lora = adapter_load(Lora(8, 16.0, ("q_proj", "up_proj")), sites)
    assert lora == AdapterLoad(2, 8 * (64 + 32) + 8 * (64 + 128), 8 * (64 + 32) + 8 * (64 + 128))
    vera = adapter_load(Vera(rank=4, target_modules=("q_proj",)), sites)
    assert vera.num_multiplications == vera.num_parameters + 4 * (64 + 32)
    assert adapter_load(Ia3(("q_proj",), ()), sites).num_multiplications == 32
    assert adapter_load(Prompt(length=5), sites) == AdapterLoad(1, 0, 5 * 64)


def _samples(profile: CostProfile, random: np.random.Generator, count: int, noise: float = 0.0) -> list[CostSample]:
    samples = []
    for _ in range(count):
        ranges = int(random.integers(1, 5))
        tokens, length, modules, multiplications = random.integers([8, 8, 8, 1], [800, 512, 99, 10**6]).tolist()
        stepped = int(random.integers(0, 2)) * 10**6
        part = MicrobatchWork(tokens, tokens * length, tokens * random.random(), modules, tokens * multiplications,
                              stepped, int(random.integers(1, 9)))  # fmt: skip
        parts = (part,) * ranges
        samples.append(CostSample(parts, microbatch_seconds(profile, parts) * (1 + noise * random.standard_normal())))
    return samples


@pytest.mark.parametrize("knee", [0.0, 400.0])
def test_known_prices_predict_shapes_never_fitted(knee: float) -> None:
    truth = CostProfile(**{**vars(PROFILE), "knee_tokens": knee})
    random = np.random.default_rng(0)
    fitted = fit(_samples(truth, random, 60))
    held_out = _samples(truth, random, 60)
    assert max(abs(microbatch_seconds(fitted, s.parts) / s.seconds - 1) for s in held_out) < 0.05
    assert abs(fitted.knee_tokens - knee) < 120


def test_a_noisy_machine_and_one_stall_do_not_spoil_the_fit() -> None:
    random = np.random.default_rng(1)
    samples = _samples(PROFILE, random, 60, noise=0.05)
    samples[7] = CostSample(samples[7].parts, 20 * samples[7].seconds)
    assert error_of(fit(samples), _samples(PROFILE, random, 60)) < 0.05


def test_a_fit_is_monotone_even_of_nonsense() -> None:
    random = np.random.default_rng(2)
    samples = [CostSample(s.parts, float(random.uniform(0.1, 9))) for s in _samples(PROFILE, random, 12)]
    fitted = vars(fit(samples))
    assert min(price for name, price in fitted.items()) >= 0


def test_a_refit_follows_the_machines_speed_and_what_was_never_tried() -> None:
    """Calibrates on small microbatches without adapters' arithmetic; then the machine is 1.7 times as slow."""
    random = np.random.default_rng(3)
    small = [MicrobatchWork(n, n * n, n / 2, 4) for n in (16.0, 32.0, 64.0, 128.0)]
    start = [CostSample((part,), microbatch_seconds(PROFILE, [part])) for part in small]
    slower = [CostSample(s.parts, 1.7 * s.seconds) for s in _samples(PROFILE, random, 80)]
    refitted = refit(start, slower[:40])
    errors = [abs(microbatch_seconds(refitted, s.parts) / s.seconds - 1) for s in slower[40:]]
    assert np.median(errors) < 0.02 and np.quantile(errors, 0.95) < 0.1
    assert refit(start, []) == fit(start)


@pytest.mark.parametrize("seconds", [None, 0.0, -1.0])
def test_a_fit_without_usable_samples_is_refused(seconds: float | None) -> None:
    samples = [] if seconds is None else [CostSample((MicrobatchWork(1),), seconds)]
    with pytest.raises(ValueError, match="positive time"):
        fit(samples)


@given(
    hnp.arrays(np.float64, (7, 4), elements=st.floats(-10, 10).map(lambda x: round(x, 2))),
    hnp.arrays(np.float64, 7, elements=st.floats(-10, 10).map(lambda x: round(x, 2))),
)
@settings(max_examples=examples(200), deadline=None)
def test_nonnegative_least_squares_as_trying_every_support(a: np.ndarray, b: np.ndarray) -> None:
    """The minimum over x >= 0 is the least unconstrained minimum, over all supports, that is itself >= 0."""
    solution = nonnegative_least_squares(a, b)
    assert solution.min() >= 0
    best = np.linalg.norm(b)
    for size in range(1, 5):
        for support in itertools.combinations(range(4), size):
            x = np.linalg.lstsq(a[:, support], b, rcond=None)[0]
            if x.min() >= 0:
                best = min(best, np.linalg.norm(a[:, support] @ x - b))
    assert np.linalg.norm(a @ solution - b) <= best + 1e-6 * max(1.0, float(best))
