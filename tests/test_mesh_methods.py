"""Every method through the whole mesh: created by the stubs, trained beside the others, loaded as by its tenant."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from muxtune.adapters import load_adapter
from muxtune.client import Client
from muxtune.errors import InvalidInputError
from muxtune.local.mesh import Mesh
from muxtune.v1 import method_pb2, task_pb2
from tests.tiny_backbone import write_backbone

QUICK = {"MUXTUNE_NUM_THREADS": "1", "MUXTUNE_CHECKPOINT_STEPS": "3", "MUXTUNE_CALIBRATION_SECONDS": "0.1"}
ROWS = [{"prompt": f"fox {i}", "completion": " jumps over" * (1 + i % 5)} for i in range(24)]
TOKENS = torch.arange(3, 11).unsqueeze(0)


def plain_model(backbone: Path):
    return AutoModelForCausalLM.from_pretrained(backbone).eval()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def client(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    options = {
        "execution": {"MUXTUNE_NUM_THREADS": "1", "MUXTUNE_CHECKPOINT_STEPS": "3", "MUXTUNE_CALIBRATION_SECONDS": "0.1"}
    }
    mesh = Mesh(tmp_path_factory.mktemp("mesh"), {"tiny": backbone}, None, options)
    with mesh, mesh.client() as connected:
        yield connected


METHODS = {
    "dora": {"lora": task_pb2.Lora(rank=4, use_dora=True, target_modules=["all-linear"])},
    "vera": {"vera": method_pb2.Vera(rank=32, target_modules=["q_proj", "v_proj"])},
    "ia3": {"ia3": method_pb2.Ia3(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])},
    "olora": {"lora": task_pb2.Lora(rank=4, init=method_pb2.LORA_INIT_OLORA, target_modules=["v_proj", "down_proj"])},
    "bottleneck": {"bottleneck": method_pb2.Bottleneck(size=8, target_modules=["self_attn", "mlp"])},
    "norms": {"selective": method_pb2.Selective(parameters=["all-norms"])},
    "miss": {"miss": method_pb2.Miss(rank=8, target_modules=["q_proj", "up_proj"])},
    "prompt": {"prompt": method_pb2.Prompt(length=4)},
    "prefix": {"prefix": method_pb2.Prefix(length=4)},
}


def test_tasks_of_every_method_train_on_one_backbone(client: Client, backbone: Path, tmp_path: Path) -> None:
    dataset = client.upload_dataset(ROWS).name
    training = task_pb2.Training(
        learning_rate=0.02, num_steps=8, max_sequence_tokens=64, heldout_fraction=0.2, verify_every_steps=4
    )
    tasks = {
        name: client.create_task(task_pb2.TaskSpec(backbone="tiny", dataset=dataset, training=training, **method))
        for name, method in METHODS.items()
    }
    for name, task in tasks.items():
        steps = [event.step_done for event in client.watch_task(task.name) if event.HasField("step_done")]
        checks = [step.shadow_check for step in steps if step.HasField("shadow_check")]
        assert len(checks) == 2 and all(check.gradient_difference < 1e-4 for check in checks), name
        ended = client.get_task(task.name)
        assert ended.state == task_pb2.TASK_STATE_SUCCEEDED, ended.failure
        assert ended.progress.last_heldout_loss < ended.progress.first_heldout_loss, name
        folder, model = client.download_adapter(task.name, tmp_path / name), plain_model(backbone)
        expected = model(TOKENS).logits
        if json.loads((folder / "adapter_config.json").read_text())["peft_type"].startswith("MUXTUNE_"):
            load_adapter(model, folder)
        else:
            model = PeftModel.from_pretrained(model, folder)
        assert (model(TOKENS).logits[:, -8:] - expected).abs().max() > 1e-4, name
        following = task_pb2.TaskSpec()
        following.CopyFrom(task.spec)
        following.initial_adapter = client.upload_adapter(folder).name
        if name == "olora":  # exported as plain LoRA of twice the rank, and so it goes on
            following.lora.CopyFrom(task_pb2.Lora(rank=8, target_modules=["v_proj", "down_proj"]))
        assert client.estimate_task(following).num_steps == 8, name


@pytest.mark.parametrize(
    ("method", "field"),
    [
        ({"ia3": method_pb2.Ia3(target_modules=["q_proj"], feedforward_modules=["k_proj"])}, "ia3.feedforward_modules"),
        ({"vera": method_pb2.Vera(target_modules=["nothing"])}, "vera.target_modules"),
        ({"selective": method_pb2.Selective(parameters=["all-biases"])}, "selective.parameters"),
        ({"bottleneck": method_pb2.Bottleneck(size=-1, target_modules=["q_proj"])}, "bottleneck.size"),
        ({"bottleneck": method_pb2.Bottleneck(size=4, target_modules=["ffn"])}, "bottleneck.target_modules"),
        (
            {"lora": task_pb2.Lora(rank=4, dropout=0.1, init=method_pb2.LORA_INIT_PISSA, target_modules=["q_proj"])},
            "lora.init",
        ),
        ({"lora": task_pb2.Lora(rank=99, init=method_pb2.LORA_INIT_OLORA, target_modules=["q_proj"])}, "lora.rank"),
        ({"prompt": method_pb2.Prompt(length=70)}, "training.max_sequence_tokens"),
        ({"lora": task_pb2.Lora(rank=4, target_modules=["lm_head"])}, "lora.target_modules"),
        ({"lora": task_pb2.Lora(rank=4, target_modules=["q_proj"], rank_pattern={"(a+)+$": 3})}, "lora.rank_pattern"),
        ({}, "method"),
    ],
)
def test_a_method_that_cannot_be_is_refused_by_its_field(client: Client, method: dict, field: str) -> None:
    dataset = client.upload_dataset(ROWS).name
    training = task_pb2.Training(learning_rate=0.02, num_steps=8, max_sequence_tokens=64)
    with pytest.raises(InvalidInputError) as caught:
        client.create_task(task_pb2.TaskSpec(backbone="tiny", dataset=dataset, training=training, **method))
    assert f"spec.{field}" in {violation.field for violation in caught.value.violations}
