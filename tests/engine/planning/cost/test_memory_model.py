"""Tests the memory model against numbers worked out by hand and PEFT's count of parameters."""

import dataclasses

import pytest

from engine.errors import InvalidInputError
from engine.methods import Lora
from engine.planning.cost.memory_model import (
    activation_bytes,
    adapter_bytes,
    microbatch_tokens,
    separate_instance_bytes,
    total_bytes,
)
from engine.planning.types import BackboneView, Site
from engine.task import Optimizer, TaskSpec, Training

SITES = tuple(
    Site(f"model.layers.{layer}.{name}", 64, width)
    for layer in range(2)
    for name, width in (("self_attn.q_proj", 64), ("self_attn.v_proj", 32), ("mlp.up_proj", 128))
)
BACKBONE = BackboneView("tiny", 100_000, 2, 64, 1000, 512, 400_000, "float32", SITES)


def _spec(rank: int = 8, targets: tuple[str, ...] = ("q_proj", "v_proj"), **training: object) -> TaskSpec:
    return TaskSpec("tiny", Lora(rank, 16.0, targets), "d", Training(1e-3, num_steps=1, **training))  # type: ignore[arg-type]


def test_adapter_is_rank_times_widths_in_weights_gradients_and_moments() -> None:
    count = 2 * 8 * ((64 + 64) + (64 + 32))
    assert adapter_bytes(_spec(), BACKBONE) == count * 4 * 4
    assert adapter_bytes(_spec(optimizer=Optimizer.SGD), BACKBONE) == count * 4 * 2
    assert adapter_bytes(_spec(optimizer=Optimizer.SGD, momentum=0.9), BACKBONE) == count * 4 * 3
    assert adapter_bytes(_spec(targets=("all-linear",)), BACKBONE) == (count + 2 * 8 * (64 + 128)) * 4 * 4


def test_adapter_has_as_many_parameters_as_pefts() -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    model = transformers.LlamaForCausalLM(config)
    sites = tuple(
        Site(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear" and name != "lm_head"
    )
    backbone = dataclasses.replace(BACKBONE, sites=sites)
    for targets in (("q_proj",), ("self_attn.k_proj", "layers.1.mlp.up_proj"), ("all-linear",)):
        wanted: object = "all-linear" if targets == ("all-linear",) else list(targets)
        adapted = peft.get_peft_model(
            transformers.LlamaForCausalLM(config), peft.LoraConfig(r=4, target_modules=wanted, task_type="CAUSAL_LM")
        )
        count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert adapter_bytes(_spec(4, targets), backbone) == count * 4 * 4


def test_bytes_grow_with_what_costs_them() -> None:
    assert activation_bytes(BACKBONE, 2048) > activation_bytes(BACKBONE, 1024)
    half = dataclasses.replace(BACKBONE, dtype="bfloat16")
    assert activation_bytes(half, 2048) < activation_bytes(BACKBONE, 2048)
    one, two = (total_bytes([_spec()] * n, BACKBONE, 256) for n in (1, 2))
    assert BACKBONE.weight_bytes < one < two
    # Two tasks on one backbone need less than two instances.
    spec = _spec(max_sequence_tokens=128, micro_batch_size=2)
    assert total_bytes([spec, spec], BACKBONE, 256) < 2 * separate_instance_bytes(spec, BACKBONE)


def test_process_memory_counts_once_and_not_against_separate_instances() -> None:
    spec, larger = _spec(), dataclasses.replace(BACKBONE, process_bytes=10**8, allocator_slack=1.5)
    without = dataclasses.replace(larger, process_bytes=0)
    assert total_bytes([spec, spec], larger, 256) == total_bytes([spec, spec], without, 256) + 10**8
    assert separate_instance_bytes(spec, larger) == separate_instance_bytes(spec, without)
    packed = dataclasses.replace(without, packed_weight_bytes=10**8)
    assert total_bytes([spec, spec], packed, 256) == total_bytes([spec, spec], larger, 256)
    assert separate_instance_bytes(spec, packed) == separate_instance_bytes(spec, without)
    moving = total_bytes([spec], dataclasses.replace(without, allocator_slack=1.0), 256) - larger.weight_bytes
    assert total_bytes([spec], without, 256) - larger.weight_bytes == pytest.approx(1.5 * moving, abs=2)


@pytest.mark.parametrize(
    ("micro_batch_size", "max_sequence_tokens", "expected"),
    [(1, 100, 1024), (4, 512, 2048), (64, 512, 4096), (1, 5000, 5008), (3, 400, 1200)],
)
def test_microbatch_holds_a_slice_within_four_budgets_and_always_a_sequence(
    micro_batch_size: int, max_sequence_tokens: int, expected: int
) -> None:
    spec = _spec(micro_batch_size=micro_batch_size, max_sequence_tokens=max_sequence_tokens)
    assert microbatch_tokens([_spec(max_sequence_tokens=64), spec], 1024, 16) == expected


def test_unknown_target_is_named() -> None:
    with pytest.raises(InvalidInputError, match="z_proj"):
        adapter_bytes(_spec(targets=("q_proj", "z_proj")), BACKBONE)
