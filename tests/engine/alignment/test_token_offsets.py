"""Offsets computed from tokens' lengths equal those that the tokenizers library records."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from engine.alignment.token_offsets import TokenLengths
from engine.alignment.tokenizer import BackboneTokenizer, TextPiece
from tests.engine.alignment.test_special_tokens import byte_fallback, texts, unigram, word_piece
from tests.thoroughness import examples
from tests.tiny_tokenizer import write_tokenizer


def bpe(**changes: object) -> Tokenizer:
    """Return a byte-level BPE with special tokens of every kind and with `changes` to its parts."""
    tokenizer = Tokenizer(models.BPE(unk_token=changes.pop("unk_token", None)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    specials = [AddedToken("</s>", special=True), AddedToken("<|a|>", special=True, lstrip=True, rstrip=True)]
    alphabet = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter not in "ĀÃqz"]  # as SmolLM2: gaps
    corpus = ["the quick brown fox", "hello 日本 \U0001f642 12 34", "e\u0301 ﬁ"]
    trainer = trainers.BpeTrainer(
        vocab_size=350, limit_alphabet=250, initial_alphabet=alphabet, special_tokens=specials
    )
    tokenizer.train_from_iterator(corpus * 3, trainer)
    tokenizer.add_tokens(["<think>", "日本"])
    return tokenizer


TOLD = {
    "byte level": bpe(),
    "NFC": bpe(normalizer=normalizers.NFC()),
    "digits apart": bpe(
        pre_tokenizer=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.Split(" ", "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
}


@pytest.mark.parametrize("tokenizer", TOLD.values(), ids=TOLD.keys())
@given(text=texts | st.text(max_size=30))
@settings(max_examples=examples(300), deadline=None)
def test_offsets_equal_those_of_tokenizers(tokenizer: Tokenizer, text: str) -> None:
    theirs = tokenizer.encode(text, add_special_tokens=False)
    lengths = TokenLengths.of(tokenizer)
    assert lengths is not None
    computed = lengths.offsets(text, np.array(theirs.ids, np.int32))
    if computed is not None:
        assert list(zip(*computed, strict=True)) == theirs.offsets
    elif text.isascii():  # then a token swallowed blanks, or a letter has no token
        assert "<|a|>" in text or any(not tokenizer.encode(letter).ids for letter in text)


@pytest.mark.parametrize("tokenizer", TOLD.values(), ids=TOLD.keys())
@given(parts=st.lists(texts | st.text(max_size=30), max_size=5))
@settings(max_examples=examples(100), deadline=None)
def test_offsets_count_through_all_texts(tokenizer: Tokenizer, parts: list[str]) -> None:
    """Whether computed for all texts at once, or one by one because lengths do not suffice for some."""
    ours, pieces = BackboneTokenizer(tokenizer, {}, None), [TextPiece(part, has_offsets=True) for part in parts]
    encoded, expected, num_characters = ours.encode(pieces), list[tuple[int, int]](), 0
    for part in parts:
        theirs = tokenizer.encode(part, add_special_tokens=False).offsets
        expected += [(num_characters + start, num_characters + end) for start, end in theirs]
        num_characters += len(part)
    ids_T = np.array([i for ids in encoded.ids for i in ids], np.int32)
    actual = ours.offsets(dict(enumerate(pieces)), encoded, ids_T)
    assert list(zip(*actual, strict=True)) == expected


@pytest.mark.parametrize(
    "tokenizer",
    [
        bpe(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        bpe(pre_tokenizer=pre_tokenizers.Whitespace()),
        bpe(normalizer=normalizers.NFKC()),
        bpe(normalizer=normalizers.Lowercase()),
        bpe(unk_token="</s>"),
        bpe(
            pre_tokenizer=pre_tokenizers.Sequence(
                [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        ),
    ],
    ids=["prefix space", "white space", "NFKC", "lower case", "unknown", "removed"],
)
def test_offsets_are_recorded_where_the_tokenizer_changes_the_text(tokenizer: Tokenizer) -> None:
    assert TokenLengths.of(tokenizer) is None


@pytest.mark.parametrize("kind", [unigram, byte_fallback, word_piece])
def test_offsets_are_recorded_for_other_models(tmp_path: Path, kind: Callable[[Path], Path]) -> None:
    assert TokenLengths.of(Tokenizer.from_file(str(kind(tmp_path / "folder") / "tokenizer.json"))) is None


def test_the_tests_tokenizer_uses_lengths(tmp_path: Path) -> None:
    """Other tests use that tokenizer: they test offsets by lengths with it."""
    assert TokenLengths.of(Tokenizer.from_file(str(write_tokenizer(tmp_path) / "tokenizer.json"))) is not None
