"""Adapters that peft wrote are loaded exactly or refused with the reason; exported ones merge wherever peft merges."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)

from engine.errors import InvalidInputError
from engine.methods import Bottleneck, Ia3, Lora, LoraBias, Method, Miss, Prefix, Prompt, Selective, Vera
from muxtune.adapters import load_adapter
from tests.engine.runtime.test_methods import IN_PEFT, OWN
from tests.engine.runtime.tiny import CONFIGS, executor_with, model_of, task_of, train

QV = ["q_proj", "v_proj"]
LORA: dict[str, Any] = dict(r=4, lora_alpha=8, target_modules=QV, init_lora_weights=False)
WRITTEN: dict[str, tuple[Any, Method]] = {
    "lora": (LoraConfig(**LORA), Lora(4, 8.0, tuple(QV))),
    "rslora": (LoraConfig(**LORA, use_rslora=True), Lora(4, 8.0, tuple(QV), use_rslora=True)),
    "dora": (LoraConfig(**LORA, use_dora=True), Lora(4, 8.0, tuple(QV), use_dora=True)),
    "patterns": (
        LoraConfig(**LORA, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
        Lora(4, 8.0, tuple(QV), rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3.0}),
    ),
    "bias": (LoraConfig(**LORA, bias="all"), Lora(4, 8.0, tuple(QV), bias=LoraBias.ALL)),
    "vera": (
        VeraConfig(r=8, target_modules=QV, projection_prng_key=5, init_weights=False),
        Vera(8, tuple(QV), projection_prng_key=5),
    ),
    "ia3": (
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
        Ia3(("k_proj", "down_proj"), ("down_proj",)),
    ),
    "miss": (MissConfig(r=4, target_modules=QV, init_weights=False), Miss(4, tuple(QV))),
    "norms": (LNTuningConfig(target_modules=["input_layernorm"]), Selective(("input_layernorm.weight",))),
    "prompt": (PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), Prompt(4)),
    "prefix": (PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), Prefix(4)),
}
TOKENS = torch.arange(3, 20).unsqueeze(0)


def write(config: Any, folder: Path) -> None:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model_of(CONFIGS["llama-tied"]), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", WRITTEN)
def test_an_adapter_of_peft_is_loaded_and_exported_unchanged(name: str, tmp_path: Path) -> None:
    config, method = WRITTEN[name]
    write(config, tmp_path / "theirs")
    executor = executor_with(model_of(CONFIGS["llama-tied"]), [])
    executor.attach(task_of("a", method=method).assignment, None, tmp_path / "theirs")
    executor.export("a", tmp_path / "ours")
    logits = []
    for folder in ("theirs", "ours"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(model_of(CONFIGS["llama-tied"]), tmp_path / folder)
        logits.append(loaded(input_ids=TOKENS, use_cache=False).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("written", WRITTEN)
def test_an_adapter_is_refused_by_every_task_that_it_does_not_fit(written: str, tmp_path: Path) -> None:
    write(WRITTEN[written][0], tmp_path)
    others: dict[str, Method] = {name: method for name, (_, method) in WRITTEN.items() if name != written}
    others |= {
        "other ia3": Ia3(("k_proj", "down_proj"), ("k_proj",)),
        "other key": Vera(8, tuple(QV), projection_prng_key=6),
        "own bias": Lora(4, 8.0, tuple(QV), bias=LoraBias.LORA_ONLY),
        "longer prompt": Prompt(5),
        "longer prefix": Prefix(3),
        "other norm": Selective(("post_attention_layernorm.weight",)),
        "bottleneck": Bottleneck(8, tuple(QV)),
    }
    executor = executor_with(model_of(CONFIGS["llama-tied"]), [])
    for name, method in others.items():
        with pytest.raises(InvalidInputError, match="initial_adapter"):
            executor.attach(task_of(name, method=method).assignment, None, tmp_path)
    assert not executor.tasks


@pytest.mark.parametrize("name", [name for name in IN_PEFT if name not in ("prompt", "long-prompt", "prefix")])
def test_exported_adapters_merge(name: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS["llama-tied"])
    task = task_of("a", method=IN_PEFT[name], num_steps=3)
    executor = executor_with(model, [task])
    train(executor, [task], 3)
    executor.export("a", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(model, tmp_path)
    expected = loaded(input_ids=TOKENS, use_cache=False).logits
    merged = loaded.merge_and_unload()(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OWN)
def test_an_adapter_of_our_format_is_applied_to_a_model_and_removed(name: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS["llama-tied"])
    task = task_of("a", method=OWN[name], num_steps=3)
    executor = executor_with(model, [task])
    train(executor, [task], 3)
    executor.export("a", tmp_path)
    before = model(input_ids=TOKENS, use_cache=False).logits
    handles = load_adapter(model, tmp_path)
    assert (model(input_ids=TOKENS, use_cache=False).logits - before).abs().max() > 1e-3
    for handle in handles:
        handle.remove()
    assert torch.equal(model(input_ids=TOKENS, use_cache=False).logits, before)
    follower = executor_with(model, [])
    follower.attach(task.assignment, None, tmp_path)
    assert torch.equal(follower.tasks["a"].parameters_P, executor.tasks["a"].parameters_P)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, text in (({"format_version": 2}, "version 2"), ({"peft_type": "LORA"}, "load it with peft")):
        (tmp_path / text).mkdir()
        (tmp_path / text / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=text):
            load_adapter(model, tmp_path / text)
    with pytest.raises(ValueError, match="which this model does not have"):
        load_adapter(model_of(CONFIGS["gpt2"]), tmp_path)
