"""A dataset as one backbone reads it: flat arrays of tokens, split, and put in order. All of it is a pure function of
(dataset bytes, tokenizer, training, seed), with random access: resuming at any step costs nothing.

Legend: N rows, S tokens of all rows, L tokens of one row.
"""

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.alignment.reading import RowRefusedError, TokenizedRow, tokenize_all
from engine.alignment.rows import Row
from engine.alignment.tokens import BackboneTokenizer
from engine.errors import FieldViolation, InvalidInputError
from engine.task import Overlength, Training


@dataclass(frozen=True)
class Refused:
    """A row left out, and why (never quoting it)."""

    line: int
    reason: str


@dataclass(frozen=True)
class TokenizedDataset:
    """`token_ids_S` and `bears_loss_S` of the rows that are kept, row i at [offsets[i], offsets[i + 1])."""

    token_ids_S: NDArray[np.int32]
    bears_loss_S: NDArray[np.bool_]
    offsets: NDArray[np.int64]  # N + 1
    lines: NDArray[np.int64]  # N: the line each row stood on
    original_lengths: NDArray[np.int64]  # of every row that tokenized, before truncation
    refused: tuple[Refused, ...]
    num_truncated: int
    num_special_text_rows: int = 0  # rows kept that spell out special tokens, which are read as text

    @property
    def num_rows(self) -> int:
        return len(self.lines)

    @property
    def num_bytes(self) -> int:
        arrays = (self.token_ids_S, self.bears_loss_S, self.offsets, self.lines, self.original_lengths)
        return sum(array.nbytes for array in arrays)

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.token_ids_S[part], self.bears_loss_S[part]

    def num_targets(self, index: int) -> int:
        """Loss-bearing positions of a row: its first token has nothing before it to be predicted from."""
        return int(self.row(index)[1][1:].sum())


def tokenize_dataset(rows: Iterable[Row], tokenizer: BackboneTokenizer, training: Training) -> TokenizedDataset:
    """Raises InvalidInputError if no row is left, or if one is too long and `overlength` is REFUSE."""
    kept, refused, num_special = _Kept(), [], 0
    limit = training.max_sequence_tokens
    lengths, num_truncated = array("q"), 0
    for row, tokenized in tokenize_all(rows, tokenizer, training.parse_special_tokens):
        if isinstance(tokenized, RowRefusedError):
            refused.append(Refused(row.line, str(tokenized)))
            continue
        num_tokens = len(tokenized.ids)
        lengths.append(num_tokens)
        if num_tokens > limit:
            if reason := _overlong(tokenized, limit, training.overlength):
                refused.append(Refused(row.line, reason))
                continue
            num_truncated += 1
        kept.add(tokenized, limit)
        num_special += tokenized.spells_special
    if not kept.lines:
        why = f"every row is refused; line {refused[0].line}: {refused[0].reason}" if refused else "has no rows"
        raise InvalidInputError.of_field("dataset", why)
    return TokenizedDataset(
        **kept.arrays(),
        original_lengths=np.array(lengths, np.int64),
        refused=tuple(refused),
        num_truncated=num_truncated,
        num_special_text_rows=num_special,
    )


class _Kept:
    """Rows one after another, flat as they come: few bytes a token, and no object a row."""

    def __init__(self) -> None:
        self.ids, self.lines, self.ends = array("i"), array("q"), array("q", [0])
        self.span_starts, self.span_ends = array("q"), array("q")  # of tokens that bear loss

    def add(self, row: TokenizedRow, limit: int) -> None:
        """Its first `limit` tokens."""
        base = len(self.ids)
        self.ids.extend(row.ids[:limit])
        self.lines.append(row.line)
        self.ends.append(len(self.ids))
        for start, end in row.spans:
            if start < limit:
                self.span_starts.append(base + start)
                self.span_ends.append(base + min(end, limit))

    def arrays(self) -> dict[str, Any]:
        num_spans_S = np.zeros(len(self.ids) + 1, np.int16)  # that a token is in: counted up where one begins
        np.add.at(num_spans_S, np.array(self.span_starts, np.int64), 1)
        np.subtract.at(num_spans_S, np.array(self.span_ends, np.int64), 1)
        return {
            "token_ids_S": np.array(self.ids, np.int32),
            "bears_loss_S": num_spans_S[:-1].cumsum(dtype=np.int16).astype(np.bool_),
            "offsets": np.array(self.ends, np.int64),
            "lines": np.array(self.lines, np.int64),
        }


@dataclass(frozen=True)
class Split:
    """Row indices that train and those held out, both in the dataset's order."""

    train: NDArray[np.int64]
    heldout: NDArray[np.int64]


def split(num_rows: int, training: Training) -> Split:
    """Held-out rows are drawn by the seed; at least one of each kind. Raises InvalidInputError for too few rows."""
    everything = np.arange(num_rows, dtype=np.int64)
    if training.heldout_fraction <= 0:
        return Split(everything, everything[:0])
    if num_rows < 2:
        violation = FieldViolation("training.heldout_fraction", f"{num_rows} row cannot be split; add rows or use 0")
        raise InvalidInputError(f"{violation.field}: {violation.description}", [violation])
    count = min(num_rows - 1, max(1, round(num_rows * training.heldout_fraction)))
    heldout = np.sort(_permutation(training.seed, -1, num_rows)[:count])
    return Split(np.setdiff1d(everything, heldout), heldout)


def num_steps(training: Training, num_train_rows: int) -> int:
    """Optimizer steps in all: as asked, or epochs of ceil(rows / global batch) steps."""
    if training.num_steps is not None:
        return training.num_steps
    assert training.num_epochs is not None
    return training.num_epochs * math.ceil(num_train_rows / training.global_batch_size)


class Order:
    """Which rows train in which step, in order: a permutation an epoch. Holds the last epoch asked for."""

    def __init__(self, training: Training, train: NDArray[np.int64]) -> None:
        self._training, self._train = training, train
        self._epoch, self._rows = -1, train

    def batch(self, step: int) -> NDArray[np.int64]:
        """Rows of optimizer step `step` (from 0). The last batch of an epoch may be smaller."""
        size = self._training.global_batch_size
        epoch, index = divmod(step, math.ceil(len(self._train) / size))
        return self.epoch(epoch)[index * size : (index + 1) * size]

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """All training rows in the order of one epoch (from 0)."""
        if self._training.shuffle and epoch != self._epoch:
            self._rows = self._train[_permutation(self._training.seed, epoch, len(self._train))]
            self._epoch = epoch
        return self._rows


def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """numpy's Philox keyed by (seed, epoch + 1): epoch -1 draws the held-out split."""
    key = np.array([seed % 2**64, epoch + 1], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)


def _overlong(row: TokenizedRow, limit: int, overlength: Overlength) -> str:
    """Why an overlong row is left out; empty: it is truncated. Raises InvalidInputError for REFUSE."""
    num_tokens = len(row.ids)
    if overlength is Overlength.REFUSE:
        raise InvalidInputError.of_field(
            "training.max_sequence_tokens",
            f"line {row.line} has {num_tokens} tokens, over {limit}; raise the limit or choose TRUNCATE or DROP",
        )
    if overlength is Overlength.DROP:
        return f"{num_tokens} tokens, over max_sequence_tokens {limit}"
    return "" if row.has_target(limit) else f"no token bears loss within max_sequence_tokens {limit}"
