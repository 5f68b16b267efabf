"""Special tokens spelled out in `text`, `prompt` and `completion` are encoded as by transformers, in both modes."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from engine.alignment.dataset import tokenize_dataset
from engine.alignment.jsonl_rows import Row, parse_lines
from engine.alignment.preflight import preflight
from engine.alignment.row_tokenizer import RowRefusedError, tokenize
from engine.alignment.tokenizer import BackboneTokenizer
from engine.task import Training
from tests.thoroughness import examples
from tests.tiny_tokenizer import write_tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "hello, how are you? 1 2 3", "im start end user assistant unk"]


def byte_level(folder: Path) -> Path:
    return write_tokenizer(folder, adds_bos=True, eos="</s>")


def byte_level_with_greedy_tokens(folder: Path) -> Path:
    """Return a tokenizer with a prefix space, NFC as Qwen, and special tokens that swallow blanks around them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken("</s>", special=True), AddedToken("<|a|>", special=True, lstrip=True, rstrip=True)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, special_tokens=specials)
    )
    tokenizer.add_tokens(["<think>"])  # not a special token: a token in both modes
    return saved(tokenizer, folder)


def unigram(folder: Path) -> Path:
    """Return a tokenizer as sentencepiece's: blanks become a special letter, also before the first word."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    return saved(tokenizer, folder)


def byte_fallback(folder: Path) -> Path:
    """Return a tokenizer as Llama 2's: BPE over text with replaced blanks, with bytes for unknown letters."""
    base = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted({*"".join(CORPUS).replace(" ", "▁"), "▁", "<", ">", "/", "|"})
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *base, *letters, "th", "the", "▁the"])}
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return saved(tokenizer, folder)


def word_piece(folder: Path) -> Path:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=specials))
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]"))
    )
    return saved(tokenizer, folder, eos="[SEP]")


def saved(tokenizer: Tokenizer, folder: Path, eos: str = "</s>") -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


KINDS = [byte_level, byte_level_with_greedy_tokens, unigram, byte_fallback, word_piece]
SPELLED = [
    "<s>",
    "</s>",
    "<unk>",
    "[SEP]",
    "[CLS]",
    "[sep]",
    "<|im_start|>",
    "<|im_end|>",
    "<|a|>",
    "<think>",
    "<0x0A>",
]
pieces = st.one_of(
    st.sampled_from([*SPELLED, " ", "  ", "\n", "the", " the", "▁", "<|", "|>", "\ufb01", "e\u0301", "\u200d", "\0"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)
texts = st.lists(pieces, max_size=8).map("".join)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[BackboneTokenizer, Any]:
    make: Callable[[Path], Path] = request.param
    folder = make(tmp_path_factory.mktemp("tokenizer") / "folder")
    return BackboneTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


def is_unigram(theirs: Any) -> bool:
    return isinstance(theirs.backend_tokenizer.model, models.Unigram)


def forged(ids: list[int], theirs: Any, num_own: int) -> bool:
    """Return whether Unigram, with special tokens among its pieces, forges them from text where transformers splits."""
    special = set(theirs.added_tokens_decoder) - {theirs.convert_tokens_to_ids(token) for token in ("<unk>", "[UNK]")}
    plain = {i for i in special if not theirs.added_tokens_decoder[i].special}
    return sum(i in special - plain for i in ids) > num_own


def closed(ids: list[int], eos: int) -> list[int]:
    """Return the ids with the tokenizer's end token once at the end."""
    return ids if ids[-1:] == [eos] else [*ids, eos]


@given(prompt=texts, completion=texts, parses=st.booleans())
@settings(max_examples=examples(300), deadline=None)
def test_rows_have_the_tokens_of_transformers(
    both: tuple[BackboneTokenizer, Any], prompt: str, completion: str, parses: bool
) -> None:
    ours, theirs = both
    eos = theirs.eos_token_id
    how = {} if parses else {"split_special_tokens": True}
    head, tail = theirs(prompt, **how)["input_ids"], theirs(completion, add_special_tokens=False, **how)["input_ids"]
    num_own = len(theirs("")["input_ids"])
    text, pair = (
        next(parse_lines([json.dumps(fields).encode()]))
        for fields in ({"text": prompt}, {"prompt": prompt, "completion": completion})
    )
    is_forged = not parses and forged(head, theirs, num_own)
    if is_forged or len(closed(head, eos)) < 2:
        with pytest.raises(RowRefusedError, match="special token" if is_forged else "no token bears loss"):
            tokenize(text, ours, parses)
    else:
        assert tokenize(text, ours, parses).token_ids_L.tolist() == closed(head, eos)
    is_forged |= not parses and forged(tail, theirs, 0)
    head, tail = head[:-1] if head[-1:] == [eos] else head, closed(tail, eos)
    if is_forged or len(head) + len(tail) < 2:
        with pytest.raises(RowRefusedError, match="special token" if is_forged else "no token bears loss"):
            tokenize(pair, ours, parses)
        return
    actual = tokenize(pair, ours, parses)
    assert actual.token_ids_L.tolist() == head + tail
    assert actual.bears_loss_L.tolist() == [False] * len(head) + [True] * len(tail)


@given(text=texts)
@settings(max_examples=examples(300), deadline=None)
def test_text_becomes_no_special_token_by_default(both: tuple[BackboneTokenizer, Any], text: str) -> None:
    """The tokenizer itself adds some around any text; <unk> stands for text without a piece."""
    ours, theirs = both
    (row,) = parse_lines([json.dumps({"text": text + "a"}).encode()])
    expected_ids = closed(theirs("a")["input_ids"], theirs.eos_token_id)
    special = set(theirs.all_special_ids) - {theirs.convert_tokens_to_ids(token) for token in ("<unk>", "[UNK]")}
    try:
        actual = tokenize(row, ours).token_ids_L.tolist()
    except RowRefusedError as refused:
        assert "special token" in str(refused) and ours.special_pattern.search(unicodedata.normalize("NFKC", text))
        return
    assert sum(i in special for i in actual) == sum(i in special for i in expected_ids)


@given(rows=st.lists(texts, min_size=1, max_size=6))
@settings(max_examples=examples(50), deadline=None)
def test_preflight_counts_rows_that_spell_special_tokens(both: tuple[BackboneTokenizer, Any], rows: list[str]) -> None:
    ours, theirs = both
    data = [Row(i, "text", {"text": f"{text} fox"}) for i, text in enumerate(rows)]
    data += [
        Row(8, "prompt_completion", {"prompt": "the", "completion": f"{rows[0]} dog"}),
        Row(9, "text", {"text": "the fox"}),
    ]
    spelling = [token.content for token in theirs.added_tokens_decoder.values() if token.special]
    num_special = sum(any(token in text for token in spelling) for text in [*rows, rows[0]])
    for parses in (False, True):
        training = Training(1e-3, num_epochs=1, parse_special_tokens=parses)
        report = preflight(tokenize_dataset(data, ours, training), ours, training, num_samples=0)
        num_refused = sum("special token" in refused.reason for refused in report.refused)
        assert report.num_special_text_rows + num_refused == (0 if parses else num_special)
        assert num_refused == 0 or is_unigram(theirs)


@pytest.mark.parametrize("parses", [True, False])
def test_special_tokens_in_messages_always_stay_text(tmp_path: Path, parses: bool) -> None:
    tokenizer = BackboneTokenizer.load(write_tokenizer(tmp_path))
    said = [{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b</s>"}]
    row = tokenize(Row(1, "messages", {"messages": said}), tokenizer, parses)
    assert sum(i in tokenizer.special_ids for i in row.token_ids_L) == 4  # from the template: two turns, start and end


def test_messages_that_spell_a_token_after_normalization_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(write_tokenizer(tmp_path) / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens([AddedToken("<|stop|>", special=True, normalized=True)])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    ours = BackboneTokenizer.load(tmp_path)
    for said, is_refused in (("the <|STOP|> fox", True), ("the STOP fox", False), ("the <|stop|> fox", False)):
        row = Row(
            1, "messages", {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": "a"}]}
        )
        if is_refused:
            with pytest.raises(RowRefusedError, match="special token"):
                tokenize(row, ours)
        else:
            assert tokenizer.token_to_id("<|stop|>") not in tokenize(row, ours).token_ids_L


@pytest.mark.parametrize("said", ["a</s>b", "a\uff1c/s\uff1eb"], ids=["spelled", "spelled once normalized"])
def test_messages_that_a_model_turns_into_special_tokens_are_refused(tmp_path: Path, said: str) -> None:
    folder = unigram(tmp_path / "unigram")
    form = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(form + "{% if add_generation_prompt %}assistant: {% endif %}")
    tokenizer = BackboneTokenizer.load(folder)
    fair = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "the dog"}]
    row = tokenize(Row(1, "messages", {"messages": fair}), tokenizer)
    assert row.token_ids_L[row.bears_loss_L][-1] == tokenizer.eos_token_id
    hostile = [{"role": "user", "content": said}, *fair[1:]]
    with pytest.raises(RowRefusedError, match="special token"):
        tokenize(Row(1, "messages", {"messages": hostile}), tokenizer)
