"""Times of rounds: the least latency against every number of microbatches."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.planning.cost.round_time import StageModel, least_latency
from engine.planning.types import CostProfile
from tests.thoroughness import examples


@given(
    st.sampled_from([0.0, 1.0, 10.0, 200.0]),
    st.sampled_from([0.0, 0.01, 1.0]),
    st.sampled_from([0.0, 100.0, 700.0]),
    st.integers(1, 8),
    st.integers(1, 5000),
    st.sampled_from([0.0, 5.0, 1000.0]),
    st.integers(1, 8),
    st.integers(0, 300),
)
@settings(max_examples=examples(1000), deadline=None)
def test_the_least_latency_is_that_of_the_best_number_of_microbatches(
    fixed: float, token: float, knee: float, stages: int, tokens: int, extra: float, fewest: int, more: int
) -> None:
    profile = CostProfile(fixed_seconds=fixed, token_seconds=token, knee_tokens=knee)
    stage = StageModel(profile, 1024, num_stages=stages, hop_seconds=20.0)

    def latency(number: int) -> float:
        work = fixed * number + token * max(tokens, number * knee) + extra
        return work / stages * (1 + (stages - 1) / number) + 2 * (stages - 1) * 20.0

    best = min(latency(number) for number in range(fewest, fewest + more + 1))
    arrays = (np.array([float(value)]) for value in (tokens, extra, fewest))
    assert np.isclose(least_latency(*arrays, fewest + more, stage)[0], best, rtol=1e-12)
