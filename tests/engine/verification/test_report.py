"""`muxtune verify` passes for the engine, and fails if another task changes a tenant's training."""

from itertools import chain

import pytest
import torch

from engine.kernels.multi_lora import reference
from engine.kernels.multi_lora.types import LowRank
from engine.runtime.executor import Executor
from engine.verification import cases, report
from engine.verification.report import Finding, compare, unsupported_methods
from tests.engine.runtime.tiny import CONFIGS, model_of

NAMES = ["lora", "prompt", "norms"]


@pytest.fixture(autouse=True)
def one_option(monkeypatch: pytest.MonkeyPatch) -> None:
    some = dict(list(cases.OPTIONS.items())[4:5])  # SGD: Adam would hide a gradient of another scale
    monkeypatch.setattr(report, "OPTIONS", some)


def findings(names: list[str] = NAMES, num_steps: int = 3) -> list[Finding]:
    return list(compare(cases.small_backbone(), names, num_steps))


def test_it_holds_for_every_method() -> None:
    all_findings = findings(list(cases.METHODS))
    assert [f.method for f in all_findings if f.against != "muxtune alone"] == list(cases.METHODS)
    assert {f.method for f in all_findings if f.against == "torch alone"} == {"houlsby", "parallel", "bitfit"}
    assert all(f.own_rounding is None or 0 < f.own_rounding < 1e-5 for f in all_findings)
    assert all(f.holds and f.num_steps == 3 for f in all_findings)
    assert any(f.loss_difference > 0 for f in all_findings)  # two computations, not the same one twice


def test_a_loss_averaged_over_the_whole_batch_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Executor._target_rows

    def wrong(self: Executor, microbatch, resident):
        rows_M, weights_M = right(self, microbatch, resident)
        return rows_M, weights_M / len(microbatch.ranges)

    monkeypatch.setattr(Executor, "_target_rows", wrong)
    all_findings = findings()
    assert not any(f.holds for f in all_findings if f.method == "lora")


@pytest.mark.parametrize("factor, num_steps", [("b_NR", 3), ("a_RK", 12)])  # B is zero at first, and A's gradient
def test_a_wrong_gradient_is_detected(factor: str, num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right, first = reference.MultiLora.backward, reference._FIRST_FACTOR

    def wrong(ctx, *grads: torch.Tensor):
        gradients_found = right(ctx, *grads)
        factors = [
            LowRank(*gradients)
            for gradients in zip(*[iter(gradients_found[first:])] * len(LowRank._fields), strict=True)
        ]
        return *gradients_found[:first], *chain.from_iterable(negated(each, factor) for each in factors)

    monkeypatch.setattr(reference.MultiLora, "backward", staticmethod(wrong))
    holds = {(f.method, f.against): f.holds for f in findings(num_steps=num_steps)}
    assert not holds["lora", "peft alone"] and holds["prompt", "peft alone"]


def negated(gradients: LowRank, factor: str) -> LowRank:
    gradient = getattr(gradients, factor)
    return gradients if gradient is None else gradients._replace(**{factor: -gradient})


def test_methods_that_a_backbone_does_not_support_are_left_out_with_the_reason() -> None:
    model = model_of(CONFIGS["mistral-window"])  # no biases, attention bounded by a window
    missing = unsupported_methods(model, list(cases.METHODS))
    assert [each.method for each in missing] == ["biases", "prefix", "bitfit"]
    assert "no bias" in missing[2].reason and "sliding window" in missing[1].reason
    names = [name for name in cases.METHODS if name not in {each.method for each in missing}]
    assert all(finding.holds for finding in compare(model, names, 2))
