"""A backbone is accepted only if it runs a packed stream exactly; its shadow costs no memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from engine.errors import BackboneUnsupportedError
from engine.runtime.backbone import Backbone
from tests.engine.runtime.tiny import CONFIGS, VOCAB, model_of

REFUSED: dict[str, hf.PretrainedConfig] = {
    "falcon": hf.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "gpt-j": hf.GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "gpt-neo": hf.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=4,
    ),
    "bloom": hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "gpt-oss": hf.GptOssConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=16, num_local_experts=2, num_experts_per_tok=1,
    ),
    "mamba": hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4),
}  # fmt: skip


@pytest.mark.parametrize("architecture", REFUSED)
@pytest.mark.parametrize("deviation", [0.02, 0.2])
def test_a_backbone_that_cannot_be_exact_is_refused(architecture: str, deviation: float) -> None:
    config = REFUSED[architecture]
    config.initializer_range = deviation
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with pytest.raises(BackboneUnsupportedError, match=r"cannot be trained exactly|needs attention"):
        Backbone(model)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt"])
def test_the_probe_sees_through_a_tiny_initialisation(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments that see each other must not pass the probe because logits are small."""
    from engine.runtime import attention

    whole = attention.itertools.pairwise
    monkeypatch.setattr(attention.itertools, "pairwise", lambda bounds: whole([bounds[0], bounds[-1]]))
    model = model_of(CONFIGS[architecture])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    with pytest.raises(BackboneUnsupportedError):
        Backbone(model)


def test_a_fault_of_a_library_is_not_reported_as_an_unsupported_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 has no enable_gqa: each backbone was refused, with a text about its forward."""
    text = "varlen_attn() got an unexpected keyword argument 'enable_gqa'"

    def fail(*_: object) -> None:
        raise TypeError(text)

    monkeypatch.setattr("engine.runtime.attention.fallback_reason", fail)
    with pytest.raises(TypeError, match="enable_gqa"):
        Backbone(model_of(CONFIGS["llama"]))


def test_attention_that_is_chunked_is_refused() -> None:
    config = hf.LlamaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    config.layer_types = ["chunked_attention"]
    with pytest.raises(BackboneUnsupportedError, match="chunked_attention"):
        Backbone(hf.LlamaForCausalLM(config))


def test_quantised_operators_are_refused() -> None:
    model = model_of(CONFIGS["llama"])

    class Int8Linear(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.0

    model.model.layers[0].mlp.up_proj = Int8Linear(32, 48, bias=False)
    with pytest.raises(BackboneUnsupportedError, match="Int8Linear"):
        Backbone(model)

    class PackedLinear(torch.nn.Module):  # like those of GPTQ and AWQ: not an nn.Linear that a target could name
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(48, 4, dtype=torch.int32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(*x.shape[:-1], 48)

    model.model.layers[0].mlp.up_proj = PackedLinear()
    with pytest.raises(BackboneUnsupportedError, match=r"up_proj\.qweight holds quantised weights"):
        Backbone(model)


def test_rope_that_changes_with_the_longest_sequence_bounds_the_sequences() -> None:
    """longrope and dynamic scaling read the longest position of the whole batch: a task's sequence beyond the original
    length would change another task's."""
    rope = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    config = hf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64,
        rope_parameters=rope,
    )  # fmt: skip
    assert Backbone(hf.LlamaForCausalLM(config)).max_sequence_tokens == 64
    factors = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    longrope = hf.Phi3Config(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0,
        max_position_embeddings=256, original_max_position_embeddings=32,
        rope_parameters=dict(
            rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=32, **factors
        ),
    )  # fmt: skip
    assert Backbone(hf.AutoModelForCausalLM.from_config(longrope)).max_sequence_tokens == 32
    assert Backbone(model_of(CONFIGS["llama"])).max_sequence_tokens == 128


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "gemma2"])
def test_the_shadow_shares_every_weight(architecture: str) -> None:
    backbone = Backbone(model_of(CONFIGS[architecture]))
    addresses = {p.data_ptr() for p in backbone.model.parameters()}
    assert {p.data_ptr() for p in backbone.shadow.parameters()} == addresses
    assert backbone.weight_bytes() >= sum(
        {p.data_ptr(): p.numel() * p.element_size() for p in backbone.model.parameters()}.values()
    )
    assert not any(p.requires_grad for p in backbone.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_folder_loads_in_the_requested_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model_of(CONFIGS["qwen3"]).save_pretrained(tmp_path)
    backbone = Backbone.load(tmp_path, dtype)
    assert (backbone.dtype, backbone.device.type) == (dtype, "cpu")
    assert next(iter(backbone.operators)) == "model.layers.0.self_attn.q_proj"
    assert "lm_head" not in backbone.operators


def _spoil(folder: Path, what: str) -> None:
    if what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "pickle only":
        torch.save({}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif what == "truncated weights":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "remote code":
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text("raise SystemExit('ran')")


@pytest.mark.parametrize("what", ["no weights", "pickle only", "truncated weights", "no config", "remote code"])
def test_a_folder_that_does_not_load_says_so(tmp_path: Path, what: str) -> None:
    model_of(CONFIGS["llama"]).save_pretrained(tmp_path)
    _spoil(tmp_path, what)
    with pytest.raises(BackboneUnsupportedError, match="does not load"):
        Backbone.load(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneUnsupportedError, match="does not load"):
        Backbone.load(tmp_path / "absent")
