"""A backbone's tokenizer, from the files beside its weights; no torch and no transformers.

Legend: L tokens of one row, V vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from engine.alignment.templates import ChatTemplate, TemplateRefusedError
from engine.errors import InvalidInputError


@dataclass(frozen=True)
class Piece:
    """A text to encode. `adds_tokens`: with what the tokenizer puts around a text; `is_plain`: special tokens that it
    spells out stay text, else they are read as such, as a chat template needs; `has_offsets`: see Encoded."""

    text: str
    adds_tokens: bool = False
    is_plain: bool = False
    has_offsets: bool = False


@dataclass(frozen=True)
class Encoded:
    """`token_ids_L` int32 and, if asked for, the characters [start, end) of the text that each token stands for."""

    token_ids_L: NDArray[np.int32]
    offsets_L2: NDArray[np.int64]


class BackboneTokenizer:
    """Encodes text as transformers' AutoTokenizer does for the same folder."""

    def __init__(self, tokenizer: Tokenizer, config: dict[str, Any], template: str | None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        # Post-processors add special tokens and may trim white space off the offsets: none where offsets are read.
        self._exact = Tokenizer.from_str(tokenizer.to_str())
        self._exact.post_processor = None
        self._plain = Tokenizer.from_str(self._exact.to_str())
        self._plain.encode_special_tokens = True  # as text
        special = {
            name: _text(config[name])
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if config.get(name)
        }
        self.template = ChatTemplate(template, special) if template else None
        self.eos_token = special.get("eos_token")
        self.eos_token_id = tokenizer.token_to_id(self.eos_token) if self.eos_token else None
        added = {i: token for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._is_special_V = np.zeros(1 + max(tokenizer.get_vocab().values(), default=0), np.bool_)
        self._is_special_V[list(added)] = True
        self.special_tokens = frozenset(token.content for token in added.values())

    @classmethod
    def load(cls, folder: Path) -> "BackboneTokenizer":
        """Reads tokenizer.json, tokenizer_config.json and, where it stands apart, chat_template.jinja.

        Raises InvalidInputError if the folder holds no tokenizer that can be read.
        """
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            config_path = folder / "tokenizer_config.json"
            config: dict[str, Any] = json.loads(config_path.read_text()) if config_path.exists() else {}
        except Exception as error:  # the Rust side raises a bare Exception
            raise InvalidInputError.of_field("backbone", f"no tokenizer in {folder}: {error}") from error
        apart = folder / "chat_template.jinja"
        template = apart.read_text() if apart.exists() else _default_template(config)
        try:
            return cls(tokenizer, config, template)
        except TemplateRefusedError as error:
            raise InvalidInputError.of_field("backbone", f"{folder}: {error}") from error

    def encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        """All at once, on all cores. Text alone is the same whatever stands beside it."""
        encoded: dict[int, Encoded] = {}
        kinds = [(piece.adds_tokens, piece.is_plain, piece.has_offsets) for piece in pieces]
        for kind in set(kinds):
            adds_tokens, is_plain, has_offsets = kind
            tokenizer = self._tokenizer if adds_tokens else self._plain if is_plain else self._exact
            encode = tokenizer.encode_batch if has_offsets else tokenizer.encode_batch_fast
            own = [i for i, other in enumerate(kinds) if other == kind]
            found = encode([pieces[i].text for i in own], add_special_tokens=adds_tokens)
            encoded |= {i: _encoded(encoding, has_offsets) for i, encoding in zip(own, found, strict=True)}
        return [encoded[i] for i in range(len(pieces))]

    def are_special(self, token_ids_L: NDArray[np.int32]) -> NDArray[np.bool_]:
        """[L]: which of them are special tokens."""
        return self._is_special_V[token_ids_L]

    def decode(self, token_ids_L: NDArray[np.int32]) -> str:
        text: str = self._tokenizer.decode(token_ids_L.tolist(), skip_special_tokens=False)
        return text


def _encoded(encoding: Encoding, has_offsets: bool) -> Encoded:
    offsets = encoding.offsets if has_offsets else []
    return Encoded(np.array(encoding.ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2))


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _default_template(config: dict[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template
