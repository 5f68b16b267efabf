"""An exported folder is what peft would write, and is checked; a folder that peft wrote is loaded or refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from engine.errors import ExportMismatchError, InvalidInputError
from engine.methods import Bottleneck, Ia3, Lora, LoraInit, Miss, Selective, Vera
from engine.runtime.executor import Executor
from tests.engine.runtime.tiny import CONFIGS, executor_with, model_of, task_of, train

TARGETS = {
    "all": ("all-linear",),
    "suffixes": ("q_proj", "down_proj"),
    "one full name": ("model.layers.1.mlp.up_proj",),
    "dotted suffix": ("1.self_attn.o_proj", "k_proj"),
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_peft_adapts_the_same_modules_and_loads_without_a_warning(targets: tuple[str, ...], tmp_path: Path) -> None:
    task = task_of("a", targets=targets, rank=3, alpha=12)
    executor = executor_with(model_of(CONFIGS["llama"]), [task])
    train(executor, [task], 2)
    report = executor.export("a", tmp_path)
    assert report.num_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert report.max_logit_difference < 1e-4
    wanted = list(targets) if targets != ("all-linear",) else "all-linear"
    theirs = get_peft_model(model_of(CONFIGS["llama"]), LoraConfig(r=3, target_modules=wanted, task_type="CAUSAL_LM"))
    names = {n.replace(".default", "") for n, _ in theirs.named_parameters() if "lora_" in n}
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == names
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(model_of(CONFIGS["llama"]), tmp_path)
    assert loaded.peft_config["default"].lora_alpha == 12
    config: dict[str, Any] = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["task_type"]) == ("LORA", 3, "CAUSAL_LM")


NORMS = {
    "v_proj": "post_attention_layernorm.weight",
    "q_proj": "input_layernorm.weight",
    "1.mlp.down_proj": "norm.weight",
}
NAMES = ("v_proj", "1.mlp.down_proj", "q_proj", "v_proj")
LISTS = {
    "lora": lambda names: Lora(3, 6.0, names),
    "pissa": lambda names: Lora(3, 6.0, names, init=LoraInit.PISSA),
    "vera": lambda names: Vera(8, names),
    "ia3": lambda names: Ia3(names, ("1.mlp.down_proj",)),
    "bottleneck": lambda names: Bottleneck(4, names),
    "miss": lambda names: Miss(4, names),
    "selective": lambda names: Selective(tuple(NORMS[name] for name in names)),
}


@pytest.mark.parametrize("make", LISTS.values(), ids=LISTS)
def test_the_order_of_a_methods_names_and_doubled_names_change_no_byte(make: Any, tmp_path: Path) -> None:
    """Admission stores them sorted and once each; PEFT, too, reads them as a set."""
    folders = []
    for number, names in enumerate((NAMES, tuple(sorted(set(NAMES))))):
        task = task_of("a", method=make(names))
        executor = executor_with(model_of(CONFIGS["llama"]), [task])
        train(executor, [task], 2)
        folders.append(tmp_path / str(number))
        executor.export("a", folders[-1])
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    first_config, second_config = (json.loads(files.pop("adapter_config.json")) for files in (first, second))
    for config in (first_config, second_config):
        config.pop("parameters", None)  # of our own format, in the order of the spec
    assert first == second and first_config == second_config


def test_an_export_with_other_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("a")
    executor = executor_with(model_of(CONFIGS["llama"]), [task])
    train(executor, [task], 3)
    from engine.runtime import export

    right = export._config

    def wrong(*arguments: Any) -> LoraConfig:
        config = right(*arguments)
        config.lora_alpha *= 2
        return config

    monkeypatch.setattr(export, "_config", wrong)
    with pytest.raises(ExportMismatchError):
        executor.export("a", tmp_path / "wrong")
    monkeypatch.undo()
    executor.export("a", tmp_path / "right")  # the failed export left nothing behind
    with torch.no_grad():
        executor.tasks["a"].parameters_P.fill_(float("nan"))
    with pytest.raises(ExportMismatchError):
        executor.export("a", tmp_path / "nan")


def test_an_export_is_compared_with_what_the_tenants_loader_computes(tmp_path: Path) -> None:
    task = task_of("a", method=Bottleneck(4, ("mlp",)))
    backbone = executor_with(model_of(CONFIGS["llama"]), []).backbone
    for loader, error in ((lambda model, folder: None, ExportMismatchError), (None, ValueError)):
        executor = Executor(backbone, tenant_loader=loader)
        executor.attach(task.assignment)
        train(executor, [task], 2)
        with pytest.raises(error):
            executor.export("a", tmp_path)
        executor.detach("a")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter written by peft itself: rank 4, alpha 8, attention only."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model_of(CONFIGS["llama"]), config).save_pretrained(tmp_path)
    return tmp_path


def attach(folder: Path, **changes: Any) -> Executor:
    executor = executor_with(model_of(CONFIGS["llama"]), [])
    task = task_of("a", **({"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]} | changes))
    executor.attach(task.assignment, None, folder)
    return executor


def test_an_adapter_of_peft_is_loaded_exactly(folder: Path) -> None:
    executor = attach(folder)
    saved = load_file(folder / "adapter_model.safetensors")
    for name, tensor in executor.tasks["a"].tensors.items():
        assert torch.equal(tensor, saved[f"base_model.model.{name}.weight"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(rank=8, alpha=16), "has rank 4"),
        (dict(alpha=4), "has alpha 8 at rank 4, the task has alpha 4"),
        (dict(targets=["q_proj"]), "rank or target modules"),
        (dict(targets=["q_proj", "v_proj", "o_proj"]), "rank or target modules"),
    ],
)
def test_an_adapter_of_another_task_is_refused(folder: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        attach(folder, **changes)


@pytest.mark.parametrize(
    "config",
    [
        dict(use_rslora=True), dict(use_dora=True), dict(alpha_pattern={"q_proj": 16}), dict(r=0), dict(r="x"),
        dict(peft_type="IA3"), dict(peft_type="NONSENSE"), dict(bias="all"), dict(init_lora_weights="pissa"),
        dict(modules_to_save=["lm_head"]), [1, 2],
    ],
    ids=str,
)  # fmt: skip
def test_an_adapter_that_is_not_plain_lora_is_refused(folder: Path, config: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config if isinstance(config, dict) else config))
    with pytest.raises(InvalidInputError, match="initial_adapter"):
        attach(folder)


@pytest.mark.parametrize("what", ["no weights", "no config", "truncated", "not json", "nan", "missing tensor"])
def test_an_adapter_that_cannot_be_read_is_refused(folder: Path, what: str) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    name = next(iter(tensors))
    if what == "no weights":
        weights.unlink()
    elif what == "no config":
        config.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif what == "not json":
        config.write_text("{")
    else:
        tensors |= {name: torch.full_like(tensors[name], float("nan"))}
        save_file(tensors if what == "nan" else {n: t for n, t in tensors.items() if n != name}, weights)
    with pytest.raises(InvalidInputError, match="initial_adapter"):
        attach(folder)
