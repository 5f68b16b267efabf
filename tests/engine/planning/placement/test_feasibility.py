"""Tests the remedy for a task that fits nowhere: with it the task fits, and with one more it would not."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import WillNeverFitError
from engine.methods import Ia3, Lora
from engine.methods.base import Site
from engine.planning.cost.memory_model import microbatch_tokens, total_bytes
from engine.planning.placement.feasibility import refuse_if_never_fits
from engine.planning.types import BackboneView, ExecutorView, PlannerConfig
from engine.task import TaskSpec, Training
from tests.thoroughness import examples

SITES = tuple(Site(f"layers.{i}.{n}", 2048, 2048) for i in range(16) for n in ("q_proj", "v_proj"))
BACKBONE = BackboneView("b", 10**9, 16, 2048, 32000, 8192, 4 * 10**9, "float32", SITES)
LIMITS = PlannerConfig(token_budget=512)


def spec(micro: int = 16, tokens: int = 256, rank: int = 8) -> TaskSpec:
    training = Training(1e-3, num_steps=1, micro_batch_size=micro, global_batch_size=64, max_sequence_tokens=tokens)
    return TaskSpec("b", Lora(rank, 16.0, ("q_proj", "v_proj")), "d", training)


def bytes_of(task: TaskSpec) -> int:
    return total_bytes([task], BACKBONE, microbatch_tokens([task], LIMITS.token_budget, LIMITS.largest_chunk_tokens))


def executor(memory_bytes: int, name: str = "e") -> ExecutorView:
    return ExecutorView(name, BACKBONE, memory_bytes)


def refusal(task: TaskSpec, *executors: ExecutorView) -> WillNeverFitError:
    with pytest.raises(WillNeverFitError) as caught:
        refuse_if_never_fits(task, executors, LIMITS)
    return caught.value


def test_the_error_has_the_largest_micro_batch_that_fits_and_its_bytes() -> None:
    room = bytes_of(spec(micro=4)) + 10**6
    error = refusal(spec(), executor(room), executor(room // 2, "smaller"))
    needs, most, fits = (f"{value / 1e9:.1f} GB" for value in (bytes_of(spec()), room, bytes_of(spec(micro=4))))
    assert error.message == (
        f"spec.training.micro_batch_size: needs {needs}, the executors of this backbone have at most {most}. "
        f"Reduce micro batch to 4 (needs {fits})."
    )
    assert error.violations[0].field == "spec.training.micro_batch_size"


def test_the_error_names_another_field_if_the_micro_batch_does_not_help() -> None:
    long = spec(micro=1, tokens=4096)
    error = refusal(long, executor(bytes_of(replace(long, training=replace(long.training, max_sequence_tokens=1000)))))
    assert error.violations[0].field == "spec.training.max_sequence_tokens"
    room = bytes_of(spec(micro=1, rank=32))
    error = refusal(spec(micro=1, rank=256), executor(room))
    assert error.violations[0].field == "spec.lora.rank" and ". Reduce rank to 32 (" in error.message
    error = refusal(spec(micro=16, rank=256), executor(room))
    assert (
        error.violations[0].field == "spec.lora.rank" and ". Reduce micro batch to 1 and rank to 32 (" in error.message
    )


def test_the_error_names_the_operator_if_no_change_of_the_task_helps() -> None:
    error = refusal(spec(), executor(bytes_of(spec(1, 1, 1)) - 10**6))
    assert re.search(r"ask its operator for microbatches of \d+ tokens or a larger executor", error.message)
    error = refusal(spec(), executor(BACKBONE.weight_bytes // 2))
    assert error.message.endswith("No change of the task alone helps: ask its operator for a larger executor.")
    assert error.violations[0].field == "spec.backbone"
    ia3 = replace(spec(), method=Ia3(("q_proj",), ()))
    assert refusal(ia3, executor(100)).violations[0].field == "spec.backbone"


def test_a_task_passes_if_one_executor_holds_it_or_none_hosts_its_backbone() -> None:
    refuse_if_never_fits(spec(), [executor(100), executor(bytes_of(spec()), "f")], LIMITS)
    refuse_if_never_fits(spec(), [], LIMITS)
    refuse_if_never_fits(replace(spec(), backbone="other"), [executor(100)], LIMITS)


@given(st.integers(1, 64), st.integers(16, 4096), st.integers(1, 256), st.floats(0.3, 1.0))
@settings(max_examples=examples(200), deadline=None)
def test_a_remedy_works_and_one_more_would_not(micro: int, tokens: int, rank: int, share: float) -> None:
    task = spec(micro, tokens, rank)
    room = BACKBONE.weight_bytes + int(share * (bytes_of(task) - BACKBONE.weight_bytes)) - 1
    error = refusal(task, executor(room))
    match = re.search(r"Reduce (micro batch to 1 and )?(.+) to (\d+) \(", error.message)
    if match is None:
        assert "ask its operator" in error.message
        assert all(bytes_of(spec(*least)) > room for least in ((1, tokens, rank), (1, 1, rank), (1, tokens, 1)))
        return
    micro, value = (1 if match[1] else micro), int(match[3])

    def changed(number: int) -> TaskSpec:
        return {
            "micro batch": spec(number, tokens, rank),
            "max_sequence_tokens": spec(micro, number, rank),
            "rank": spec(micro, tokens, number),
        }[match[2]]

    assert bytes_of(changed(value)) <= room < bytes_of(changed(value + 1))
    refuse_if_never_fits(changed(value), [executor(room)], LIMITS)
