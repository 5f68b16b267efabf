"""A backbone's tokenizer, loaded from the files beside its weights without torch and transformers.

Legend: L tokens of one row, V vocabulary.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Tokenizer

from engine.alignment.chat_template import ChatTemplate, TemplateRefusedError
from engine.alignment.token_offsets import Offsets, TokenLengths
from engine.errors import InvalidInputError


class TextPiece(NamedTuple):
    """A text to encode.

    `adds_tokens`: the tokenizer adds its special tokens around the text. `is_plain`: special tokens that the text
    spells out stay text (transformers' split_special_tokens), else they are encoded as special tokens, as a chat
    template needs. `has_offsets`: the piece may be passed to BackboneTokenizer.offsets.
    """

    text: str
    adds_tokens: bool = False
    is_plain: bool = False
    has_offsets: bool = False


class EncodedPieces(NamedTuple):
    """The token ids of each piece.

    `forged`: indices of pieces in which text became special tokens unasked (see BackboneTokenizer). `recorded_offsets`:
    offsets by index of the piece, where they don't follow from the tokens' lengths.
    """

    ids: list[list[int]]
    forged: set[int]
    recorded_offsets: dict[int, Offsets]


class BackboneTokenizer:
    """Encodes text as transformers' AutoTokenizer does for the same folder.

    Some models (Unigram is one) have special tokens among their pieces and encode text that spells them as special
    tokens even where it must stay text (tokenizers' encode_special_tokens). Also, a token may be searched in normalized
    text, so that other letters spell it, too. Such forged tokens are detected by counting special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, config: dict[str, Any], template: str | None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._by_kind = {
            (adds_tokens, is_plain): _variant(tokenizer, adds_tokens, is_plain)
            for adds_tokens in (False, True)
            for is_plain in (False, True)
        }
        special = {
            name: _text(config[name])
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if config.get(name)
        }
        self.template = ChatTemplate(template, special) if template else None
        self.eos_token = special.get("eos_token")
        self.eos_token_id = tokenizer.token_to_id(self.eos_token) if self.eos_token else None
        added = {i: token for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.special_ids = frozenset(added)
        self.is_special_V = np.zeros(1 + max([*tokenizer.get_vocab().values(), *added], default=0), np.bool_)
        self.is_special_V[list(added)] = True
        self.special_tokens = frozenset(token.content for token in added.values())
        self.special_pattern = _any_of(self.special_tokens)
        self._forgeable = self.special_ids - {_unknown(tokenizer)} if self._may_forge(added) else frozenset()
        self._num_added = tokenizer.num_special_tokens_to_add(False)
        self._lengths = TokenLengths.of(tokenizer)

    @classmethod
    def load(cls, folder: Path) -> "BackboneTokenizer":
        """Read tokenizer.json, tokenizer_config.json and, if it exists, chat_template.jinja.

        Raises InvalidInputError if the folder contains no valid tokenizer.
        """
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            config_path = folder / "tokenizer_config.json"
            config: dict[str, Any] = json.loads(config_path.read_text()) if config_path.exists() else {}
        except Exception as error:  # the Rust side raises a bare Exception
            raise InvalidInputError.of_field(
                "backbone", f"{folder} has no valid tokenizer.json and tokenizer_config.json: {error}"
            ) from error
        template_path = folder / "chat_template.jinja"
        template = template_path.read_text() if template_path.exists() else _default_template(config)
        try:
            return cls(tokenizer, config, template)
        except TemplateRefusedError as error:
            raise InvalidInputError.of_field("backbone", f"{folder}: {error}") from error

    def encode(self, pieces: Sequence[TextPiece]) -> EncodedPieces:
        """Encode all pieces on all cores. A piece's tokens do not depend on the other pieces."""
        by_kind = defaultdict[tuple[bool, bool, bool], list[int]](list)
        for i, (_, adds_tokens, is_plain, has_offsets) in enumerate(pieces):
            by_kind[adds_tokens, is_plain, has_offsets].append(i)
        encoded = EncodedPieces([[]] * len(pieces), set(), {})
        for (adds_tokens, is_plain, has_offsets), indices in by_kind.items():
            tokenizer = self._by_kind[adds_tokens, is_plain]
            records_offsets = has_offsets and self._lengths is None
            encode = tokenizer.encode_batch if records_offsets else tokenizer.encode_batch_fast
            encodings = encode([pieces[i].text for i in indices], add_special_tokens=adds_tokens)
            for i, encoding in zip(indices, encodings, strict=True):
                encoded.ids[i] = encoding.ids
                if records_offsets:
                    encoded.recorded_offsets[i] = _offsets(encoding)
        if self._forgeable:  # few tokenizers
            expected = map(self._num_expected_special, pieces)
            encoded.forged.update(i for i, num in enumerate(expected) if self._num_special(encoded.ids[i]) > num)
        return encoded

    def offsets(self, pieces: Mapping[int, TextPiece], encoded: EncodedPieces, ids_T: NDArray[np.int32]) -> Offsets:
        """Return the characters of each token, counted through the joined texts of these pieces.

        `pieces`: encoded pieces with `has_offsets`, by their indices; `ids_T`: all their tokens.
        """
        computed = self._lengths and self._lengths.offsets("".join([piece.text for piece in pieces.values()]), ids_T)
        if computed:
            return computed
        empty = np.zeros(0, np.int64)
        starts, ends, num_characters = [empty], [empty], 0
        for i, piece in pieces.items():
            starts_L, ends_L = encoded.recorded_offsets.get(i) or self._offsets(piece, encoded.ids[i])
            starts.append(starts_L + num_characters)
            ends.append(ends_L + num_characters)
            num_characters += len(piece.text)
        return np.concatenate(starts), np.concatenate(ends)

    def _offsets(self, piece: TextPiece, ids: list[int]) -> Offsets:
        computed = self._lengths and self._lengths.offsets(piece.text, np.array(ids, np.int32))
        if computed:
            return computed
        variant = self._by_kind[piece.adds_tokens, piece.is_plain]
        return _offsets(variant.encode(piece.text, add_special_tokens=piece.adds_tokens))

    def _num_special(self, ids: list[int]) -> int:
        return sum(token in self._forgeable for token in ids)

    def _num_expected_special(self, piece: TextPiece) -> int:
        spelled = 0 if piece.is_plain else len(self.special_pattern.findall(piece.text))
        return spelled + (self._num_added if piece.adds_tokens else 0)

    def _may_forge(self, special: Mapping[int, AddedToken]) -> bool:
        plain = self._by_kind[False, True]
        return any(
            (token.normalized and plain.normalizer is not None)
            or any(
                number in plain.encode(text, add_special_tokens=False).ids
                for text in (token.content, f"a{token.content}", f" {token.content}")
            )
            for number, token in special.items()
        )

    def decode(self, token_ids_L: NDArray[np.int32]) -> str:
        text: str = self._by_kind[True, False].decode(token_ids_L.tolist(), skip_special_tokens=False)
        return text


def _variant(tokenizer: Tokenizer, adds_tokens: bool, is_plain: bool) -> Tokenizer:
    """Return a copy for one way to encode: threads share a tokenizer's settings for special tokens."""
    variant = Tokenizer.from_str(tokenizer.to_str())
    if not adds_tokens:  # post-processors add special tokens, and may trim white space off the offsets
        variant.post_processor = None
    variant.encode_special_tokens = is_plain
    return variant


def _any_of(texts: frozenset[str]) -> re.Pattern[str]:
    """Return a pattern of the texts, longest first, as the tokenizers library matches."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _offsets(encoding: Encoding) -> Offsets:
    """Return recorded offsets, made non-decreasing: a normalizer may have moved a letter past another."""
    offsets_L2 = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    starts_L, ends_L = np.maximum.accumulate(offsets_L2).T
    return starts_L, ends_L


def _unknown(tokenizer: Tokenizer) -> int | None:
    """Return the token for text without a piece, which text may produce legitimately."""
    model = json.loads(tokenizer.to_str())["model"]
    return tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else model.get("unk_id")


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _default_template(config: dict[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template
