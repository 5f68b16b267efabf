"""LoRA is initialised as in PEFT, by seed and operator alone; targets match as in PEFT."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from engine.errors import InvalidInputError
from engine.runtime.backbone import Backbone
from engine.runtime.task_state import TaskTrainingState
from engine.target_modules import matching_modules
from tests.engine.runtime.tiny import CONFIGS, model_of, task_of

MODELS = ["llama", "gpt2", "phi3", "gpt-neox", "opt-projected"]


def run_of(architecture: str = "llama", name: str = "a", seed: int = 0, **changes: object) -> TaskTrainingState:
    return TaskTrainingState(task_of(name, seed=seed, **changes).assignment, Backbone(model_of(CONFIGS[architecture])))  # type: ignore[arg-type]


def test_initialised_as_peft_does() -> None:
    for name, tensor in run_of(rank=64).tensors.items():
        if name.endswith("lora_B"):
            assert not tensor.any()
        else:
            bound = 1 / math.sqrt(tensor.shape[1])  # kaiming_uniform_(a=sqrt(5))
            assert tensor.abs().max() <= bound and tensor.abs().max() > 0.95 * bound
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_initial_values_depend_on_seed_and_operator_alone() -> None:
    run, again, other = run_of(), run_of(name="b"), run_of(seed=1)
    first = {n: t for n, t in run.tensors.items() if n.endswith("lora_A")}
    assert all(torch.equal(again.tensors[n], t) for n, t in first.items())
    assert not any(torch.equal(other.tensors[n], t) for n, t in first.items())
    assert len({t[0, 0].item() for t in first.values()}) == len(first)
    fewer = run_of(targets=["v_proj"])
    assert all(torch.equal(fewer.tensors[n], run.tensors[n]) for n in fewer.tensors)


@pytest.mark.parametrize("architecture", MODELS)
def test_all_linear_matches_the_modules_of_peft(architecture: str) -> None:
    model = model_of(CONFIGS[architecture])
    operators = Backbone(copy.deepcopy(model)).operators
    peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert set(matching_modules(["all-linear"], operators)) == set(peft_model.targeted_module_names)


@pytest.mark.parametrize("targets", [["q_proj"], ["1.mlp.up_proj"], ["self_attn.k_proj", "down_proj"]])
def test_a_list_matches_the_modules_of_peft(targets: list[str]) -> None:
    model = model_of(CONFIGS["llama"])
    operators = Backbone(copy.deepcopy(model)).operators
    peft_model = get_peft_model(model, LoraConfig(target_modules=targets))
    assert matching_modules(targets, operators) == peft_model.targeted_module_names


@pytest.mark.parametrize(
    "targets", [[], ["proj"], ["q_proj", "nothing"], ["all-linear", "q_proj"], ["lm_head"], ["embed_tokens"], [""]]
)
def test_a_target_without_a_match_is_refused_by_name(targets: list[str]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        run_of(targets=targets)
    assert caught.value.violations[0].field == "spec.lora.target_modules"
    assert "q_proj" in caught.value.message


def test_task_bytes_count_parameters_gradients_and_moments() -> None:
    run = run_of(rank=2, targets=["q_proj"])
    parameters = 2 * (2 * 32 + 32 * 2)  # two layers, A [2, 32] and B [32, 2]
    assert run.parameters_P.numel() == parameters
    assert run.num_bytes() == 4 * 4 * parameters  # with a gradient and two moments
