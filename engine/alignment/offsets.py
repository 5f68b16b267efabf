"""Characters that tokens stand for, from the tokens' own lengths: a tokenizer need not keep them while it encodes.

A byte-level BPE that normalizes nothing (GPT-2, Llama 3, SmolLM2; Qwen where a text is ASCII) cuts a text's bytes up,
and a token stands for as many bytes as it has. Legend: B bytes of a text.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

Offsets = tuple[list[int], list[int]]  # where each token starts and ends


class TokenLengths:
    """Bytes of each token of a tokenizer that loses nothing."""

    def __init__(self, num_bytes: Sequence[int], normalizes: bool) -> None:
        self._num_bytes, self._normalizes = num_bytes, normalizes

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "TokenLengths | None":
        """None where a token may stand for more or less than its own bytes."""
        described: dict[str, Any] = json.loads(tokenizer.to_str())
        if not _is_byte_level(described):
            return None
        pieces = tokenizer.get_vocab(with_added_tokens=False)
        added = {i: len(token.content.encode()) for i, token in tokenizer.get_added_tokens_decoder().items()}
        num_bytes = {i: len(piece) for piece, i in pieces.items()} | added  # of a piece each letter is a byte
        by_token = [num_bytes.get(i, 0) for i in range(1 + max(num_bytes))]
        return cls(by_token, described["normalizer"] is not None)

    def offsets(self, text: str, ids: list[int]) -> Offsets | None:
        """Starts and ends, in characters of `text`, as tokenizers tells them: a part of a character counts as
        the whole. None where they can't be told this way: a token swallowed blanks beside it, or there was none for a
        byte. Either makes their lengths' sum too small, and nothing makes it larger."""
        if self._normalizes and not text.isascii():
            return None
        ends = list(itertools.accumulate(map(self._num_bytes.__getitem__, ids)))
        starts, num_bytes = ([0, *ends[:-1]], ends[-1]) if ends else ([], 0)
        if text.isascii():
            return (starts, ends) if num_bytes == len(text) else None
        data_B = np.frombuffer(text.encode(), np.uint8)
        if num_bytes != len(data_B):
            return None
        num_begun_B = ((data_B & 0xC0) != 0x80).cumsum()  # characters up to each byte, its own included
        return (num_begun_B[starts] - 1).tolist(), num_begun_B[np.array(ends) - 1].tolist()


def _is_byte_level(described: dict[str, Any]) -> bool:
    """Whether the text's bytes reach a BPE as they are (NFC leaves ASCII be) and it adds nothing to them: no affixes,
    no token for what it does not know."""
    model, normalizer = described["model"], described["normalizer"]
    steps = _steps(described["pre_tokenizer"])
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
