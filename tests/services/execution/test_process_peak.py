"""Compares the memory model with the peak of a whole process: interpreter, libraries, weights, activations, and memory
that malloc keeps after it was freed. Each case has a new process, because a process's peak never falls."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[3]
SIZES = {"small": (256, 6, 4000, 704), "wide": (512, 8, 8000, 1376)}  # hidden, layers, vocabulary, intermediate


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, (hidden, layers, vocabulary, intermediate) in SIZES.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048,
        )  # fmt: skip
        folders[name] = tmp_path_factory.mktemp(name)
        LlamaForCausalLM(config).save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize(
    ("size", "ranks", "num_tokens"),
    [
        ("small", [8, 16], 512),
        pytest.param("wide", [8, 16], 256, marks=pytest.mark.thorough),
        pytest.param("wide", [32], 1024, marks=pytest.mark.thorough),
    ],
)
def test_the_peak_of_a_process_is_predicted(
    folders: dict[str, Path], size: str, ranks: list[int], num_tokens: int
) -> None:
    """The prediction is within a tenth, and at most three hundredths too low."""
    script = Path(__file__).with_name("process_peak.py")
    command = [sys.executable, str(script), str(folders[size]), json.dumps(ranks), str(num_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    peaks = json.loads(done.stdout.splitlines()[-1])
    assert 0.97 <= peaks["predicted"] / peaks["peak"] <= 1.10, peaks
