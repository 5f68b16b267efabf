"""The characters of each token, computed from the tokens' lengths, so that the tokenizer need not record them.

A byte-level BPE without normalization (GPT-2, Llama 3, SmolLM2; Qwen for ASCII text) splits a text's bytes, and each
token stands for as many bytes as it has. Legend: B bytes and T tokens of a text (or of several, one after another), V
vocabulary.
"""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

Offsets = tuple[NDArray[np.int64], NDArray[np.int64]]  # T each: starts and ends of tokens; neither decreases


class TokenLengths:
    """The bytes of each token of a tokenizer that loses no byte of a text."""

    def __init__(self, num_bytes_V: NDArray[np.int64], normalizes: bool) -> None:
        self._num_bytes_V, self._normalizes = num_bytes_V, normalizes

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "TokenLengths | None":
        """Return the lengths, or None where a token may stand for more or less than its own bytes."""
        config: dict[str, Any] = json.loads(tokenizer.to_str())
        if not _is_byte_level(config):
            return None
        pieces = tokenizer.get_vocab(with_added_tokens=False)
        added = {i: len(token.content.encode()) for i, token in tokenizer.get_added_tokens_decoder().items()}
        num_bytes = {i: len(piece) for piece, i in pieces.items()} | added  # each letter of a piece is a byte
        num_bytes_V = np.zeros(1 + max(num_bytes), np.int64)
        num_bytes_V[list(num_bytes)] = list(num_bytes.values())
        return cls(num_bytes_V, config["normalizer"] is not None)

    def offsets(self, text: str, ids_T: NDArray[np.int32]) -> Offsets | None:
        """Return starts and ends, in characters of `text`, as the tokenizers library does.

        A part of a character counts as the whole. Texts that were encoded separately may be joined into one `text`.
        None where lengths don't suffice: a token swallowed blanks beside it, or a byte had no token. Both make the
        sum of lengths too small, and nothing makes it larger.
        """
        if self._normalizes and not text.isascii():
            return None
        num_bytes_T = self._num_bytes_V[ids_T]
        ends_T = num_bytes_T.cumsum()
        starts_T = ends_T - num_bytes_T
        num_bytes = int(num_bytes_T.sum())
        if text.isascii():
            return (starts_T, ends_T) if num_bytes == len(text) else None
        data_B = np.frombuffer(text.encode(), np.uint8)
        if num_bytes != len(data_B):
            return None
        num_begun_B = ((data_B & 0xC0) != 0x80).cumsum()  # characters up to and with each byte
        return num_begun_B[starts_T] - 1, num_begun_B[ends_T - 1]


def _is_byte_level(config: dict[str, Any]) -> bool:
    """Return whether a BPE reads the text's bytes unchanged (NFC does not change ASCII) and adds nothing to them.

    It has no affixes and no token for unknown bytes.
    """
    model, normalizer = config["model"], config["normalizer"]
    steps = _steps(config["pre_tokenizer"])
    return (
        model["type"] == "BPE"
        and not any(model.get(added) for added in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"))
        and (normalizer is None or normalizer["type"] == "NFC")
        and [step["type"] for step in steps].count("ByteLevel") == 1
        and all(map(_keeps_all, steps))
    )


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer.get("pretokenizers", [pre_tokenizer]))


def _keeps_all(step: dict[str, Any]) -> bool:
    match step["type"]:
        case "ByteLevel":
            return not bool(step["add_prefix_space"])
        case "Split":
            return bool(step["behavior"] != "Removed")
        case kind:
            return bool(kind == "Digits")
