"""LoRA that starts from the weights' factors (PiSSA, OLoRA) equals numpy's factors and PEFT's training.

PEFT subtracts the factors from its copy of the weights; muxtune does not change the shared weights.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from engine.errors import InvalidInputError
from engine.methods import Lora, LoraInit, Prefix
from engine.peft import lora
from engine.peft.lora_init import orthonormal_factors, principal_factors
from engine.runtime.checkpoint import CheckpointState
from engine.task import Optimizer
from tests.engine.runtime.tiny import CONFIGS, executor_with, fit, model_of, task_of, train

TOKENS = torch.arange(3, 20).unsqueeze(0)


def weights(decay: float, num_in: int, num_out: int) -> torch.Tensor:
    random = np.random.default_rng(num_in)
    u, _ = np.linalg.qr(random.normal(size=(num_in, num_in)))
    v, _ = np.linalg.qr(random.normal(size=(num_out, num_out)))
    width = min(num_in, num_out)
    return torch.from_numpy((u[:, :width] * decay ** np.arange(width)) @ v[:width]).float()


@pytest.mark.parametrize(("num_in", "num_out"), [(40, 90), (90, 40), (33, 33)])
@pytest.mark.parametrize("rank", [1, 7, 33])
def test_principal_factors_are_the_truncated_decomposition(num_in: int, num_out: int, rank: int) -> None:
    weight_KN = weights(0.9, num_in, num_out)
    a_RK, b_NR = principal_factors(weight_KN, rank, "op")
    left, values, right = np.linalg.svd(weight_KN.T.double().numpy(), full_matrices=False)
    expected = (left[:, :rank] * values[:rank]) @ right[:rank]
    np.testing.assert_allclose((b_NR @ a_RK).numpy(), expected, atol=2e-6)
    balanced = torch.linalg.vector_norm(a_RK, dim=1), torch.linalg.vector_norm(b_NR, dim=0)
    for norms in balanced:
        np.testing.assert_allclose(norms.square().numpy(), values[:rank], rtol=1e-4)
    assert torch.equal(a_RK, principal_factors(weight_KN, rank, "op")[0])


def test_a_flat_spectrum_is_approximated_well() -> None:
    weight_KN = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))  # no gap after the rank
    a_RK, b_NR = principal_factors(weight_KN, 8, "op")
    left_over = np.linalg.norm((weight_KN.T - b_NR @ a_RK).double().numpy()) ** 2
    values = np.linalg.svd(weight_KN.double().numpy(), compute_uv=False)
    assert left_over <= (values[8:] ** 2).sum() * (1 + 1e-3)


@pytest.mark.parametrize(("num_in", "num_out"), [(40, 90), (90, 40)])
def test_orthonormal_factors_are_the_first_columns_of_qr(num_in: int, num_out: int) -> None:
    weight_KN = weights(0.95, num_in, num_out)
    a_RK, b_NR = orthonormal_factors(weight_KN, 6)
    q, r = np.linalg.qr(weight_KN.T.double().numpy())
    np.testing.assert_allclose((b_NR @ a_RK).numpy(), q[:, :6] @ r[:6], atol=2e-6)
    np.testing.assert_allclose((b_NR.T @ b_NR).numpy(), np.eye(6), atol=1e-5)


STARTS = {
    "pissa": (dict(init_lora_weights="pissa"), Lora(4, 8.0, ("q_proj", "down_proj"), init=LoraInit.PISSA)),
    "olora": (dict(init_lora_weights="olora"), Lora(4, 8.0, ("q_proj", "down_proj"), init=LoraInit.OLORA)),
    "pissa-rslora-patterns": (
        dict(init_lora_weights="pissa", use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}),
        Lora(
            4, 8.0, ("q_proj", "down_proj"), use_rslora=True, rank_pattern={"q_proj": 2},
            alpha_pattern={"down_proj": 3.0}, init=LoraInit.PISSA,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("optimizer", Optimizer)
@pytest.mark.parametrize("name", STARTS)
def test_it_trains_as_peft_and_does_not_change_the_backbone(name: str, optimizer: Optimizer, tmp_path: Path) -> None:
    options, method = STARTS[name]
    model: Any = model_of(CONFIGS["llama-tied"])
    rate = 1e-3 if optimizer is Optimizer.ADAMW else 1e-2
    task = task_of("a", method=method, num_steps=20, optimizer=optimizer, learning_rate=rate, lengths=(7, 31, 3, 9, 12))
    near = [task_of("b", seed=3, num_steps=20), task_of("c", seed=4, method=Prefix(3), num_steps=20)]
    executor = executor_with(model, [near[0], task, near[1]])
    before = {key: tensor.clone() for key, tensor in executor.backbone.model.state_dict().items()}
    results = train(executor, [near[0], task, near[1]], 20)["a"]
    assert all(torch.equal(tensor, before[key]) for key, tensor in executor.backbone.model.state_dict().items())
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **options)
    theirs = get_peft_model(copy.deepcopy(model), config)
    losses, _ = fit(theirs, task)
    assert [result.loss for result in results] == pytest.approx(losses, rel=1e-5)
    executor.export("a", tmp_path)
    ours = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    expected = theirs(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(ours(input_ids=TOKENS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    assert (model(input_ids=TOKENS, use_cache=False).logits - expected).abs().max() > 1e-2, "it did not train"
    merged = ours.merge_and_unload()(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("init", [LoraInit.PISSA, LoraInit.OLORA])
def test_it_resumes_exactly_where_the_factors_would_differ(init: LoraInit, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("a", method=Lora(4, 8.0, ("q_proj",), init=init), num_steps=6)
    executor = executor_with(model_of(CONFIGS["llama"]), [task])
    train(executor, [task], 3)
    state = executor.checkpoint("a")
    state = CheckpointState.from_files(state.files(), state.metadata)
    expected = train(executor, [task], 6)["a"]
    for name in ("principal_factors", "orthonormal_factors"):  # signs as on another machine
        right = getattr(lora, name)
        monkeypatch.setattr(lora, name, lambda *args, right=right: tuple(-factor for factor in right(*args)))
    following = executor_with(model_of(CONFIGS["llama"]), [])
    following.attach(task.assignment, state)
    assert [result.loss for result in train(following, [task], 6)["a"]] == [result.loss for result in expected]


@pytest.mark.parametrize(
    ("method", "field"),
    [
        (Lora(4, 8.0, ("q_proj",), 0.1, init=LoraInit.PISSA), "init"),
        (Lora(4, 8.0, ("q_proj",), use_dora=True, init=LoraInit.OLORA), "init"),
        (Lora(4, 8.0, ("q_proj",), rank_pattern={"q_proj": 129}, init=LoraInit.OLORA), "init"),
    ],
)
def test_an_invalid_combination_names_its_field(method: Lora, field: str) -> None:
    assert [error.field for error in method.validate()] == [field]


def test_a_rank_over_the_width_is_refused(tmp_path: Path) -> None:
    executor = executor_with(model_of(CONFIGS["llama"]), [])
    for init in (LoraInit.PISSA, LoraInit.OLORA):
        with pytest.raises(
            InvalidInputError, match=r"spec\.lora\.rank: 17 is over the 16 that model\.layers\.0\.self_attn\.k_proj"
        ):
            executor.attach(task_of("a", method=Lora(17, 8.0, ("k_proj",), init=init)).assignment)
    task = task_of("a", method=Lora(4, 8.0, ("k_proj",)))
    executor.attach(task.assignment)
    executor.export("a", tmp_path)
    again = task_of("b", method=Lora(4, 8.0, ("k_proj",), init=LoraInit.PISSA))
    with pytest.raises(InvalidInputError, match=r"initial_adapter.*PISSA"):
        executor.attach(again.assignment, None, tmp_path)
