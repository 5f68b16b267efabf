"""A backbone's tokenizer, from the files beside its weights; no torch and no transformers.

Legend: L tokens of one row.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engine.alignment.templates import ChatTemplate, TemplateRefusedError
from engine.errors import InvalidInputError


@dataclass(frozen=True)
class Encoded:
    """`token_ids_L` int32 and, for each token, the characters [start, end) of the text it stands for."""

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
        self.special_ids = frozenset(added)
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

    def encode(self, text: str, *, add_special_tokens: bool) -> Encoded:
        """Special tokens written out in `text` are read as such, as a chat template needs."""
        tokenizer = self._tokenizer if add_special_tokens else self._exact
        encoding = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return Encoded(np.array(encoding.ids, dtype=np.int32), offsets)

    def encode_rendered(self, text: str, plain_spans: Sequence[tuple[int, int]]) -> Encoded:
        """`encode` without tokens added; but what stands in the spans, in order, is text whatever it spells."""
        bounds = [0, *(bound for span in plain_spans for bound in span), len(text)]
        ids, offsets = [], []
        for index, (start, end) in enumerate(itertools.pairwise(bounds)):
            tokenizer = self._plain if index % 2 else self._exact
            encoding = tokenizer.encode(text[start:end], add_special_tokens=False)
            ids.append(np.array(encoding.ids, dtype=np.int32))
            offsets.append(np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + start)
        return Encoded(np.concatenate(ids), np.concatenate(offsets))

    def decode(self, token_ids_L: NDArray[np.int32]) -> str:
        text: str = self._tokenizer.decode(token_ids_L.tolist(), skip_special_tokens=False)
        return text


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _default_template(config: dict[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template
