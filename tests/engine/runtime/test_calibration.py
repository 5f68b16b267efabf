"""Calibration on an executor with a clock of the test: it finds the costs, keeps its budget and leaves no trace."""

import pytest

from engine.alignment.microbatch import Microbatch
from engine.planning.cost.cost_fit import fit
from engine.planning.cost.cost_model import microbatch_seconds
from engine.planning.types import CostProfile
from engine.results import Result
from engine.runtime.backbone import Backbone
from engine.runtime.calibration import Bench, Probe, calibrate, parts_of
from engine.runtime.executor import Executor
from tests.engine.runtime.tiny import CONFIGS, model_of

TRUTH = CostProfile(
    fixed_seconds=0.05, token_seconds=4e-3, square_seconds=2e-5, target_seconds=1e-3, module_seconds=1e-3,
    multiplication_seconds=1e-7, parameter_seconds=1e-6,
    segment_seconds=2e-3,
)  # fmt: skip


class Priced(Executor):
    """Advances its own clock by the time that given costs predict."""

    now = 0.0

    def run(self, microbatch: Microbatch) -> list[Result]:
        self.now += microbatch_seconds(TRUTH, parts_of(microbatch, self))
        return super().run(microbatch)


@pytest.fixture
def executor() -> Priced:
    return Priced(Backbone(model_of(CONFIGS["llama"])))


def test_shapes_never_timed_are_predicted(executor: Priced) -> None:
    fitted = fit(calibrate(executor, 30.0, 4096, lambda: executor.now))
    with Bench(executor, lambda: executor.now) as bench:
        for probe in (
            Probe(50, num_sequences=3, num_ranges=3, rank=12, module_stride=2, target_stride=3),
            Probe(30, num_sequences=9, rank=4, module_stride=1, has_step=True),
            Probe(9, num_ranges=6, rank=32, module_stride=3),
        ):
            assert microbatch_seconds(fitted, bench.parts(probe)) == pytest.approx(bench.seconds(probe), rel=0.05)


@pytest.mark.parametrize("budget_seconds", [0.0, 3.0, 1000.0])
def test_calibration_keeps_its_budget_and_leaves_no_task(executor: Priced, budget_seconds: float) -> None:
    samples = calibrate(executor, budget_seconds, 4096, lambda: executor.now)
    assert executor.tasks == {}
    assert all(not mounted.adapters for mounted in executor.backbone.mounted.values())
    assert len({sample.parts for sample in samples}) >= 8
    one_pass = sum(microbatch_seconds(TRUTH, sample.parts) for sample in samples)
    assert executor.now <= max(2 * one_pass, 1.5 * budget_seconds)


def test_no_microbatch_is_larger_than_allowed(executor: Priced) -> None:
    samples = calibrate(executor, 1000.0, 128, lambda: executor.now)
    assert max(sum(part.num_tokens for part in sample.parts) for sample in samples) == 128
