"""A dataset as tokens of one backbone in flat arrays, its split into training and held-out rows, and their order.

All of it is a pure function of (dataset bytes, tokenizer, training, seed) with random access, so that resuming at any
step costs nothing.

Legend: N rows, S tokens of all rows, L tokens of one row.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from engine.alignment.jsonl_rows import Row
from engine.alignment.row_tokenizer import tokenize_all
from engine.alignment.tokenized_rows import RefusedRow, TokenizedRows
from engine.alignment.tokenizer import BackboneTokenizer
from engine.errors import InvalidInputError
from engine.task import Overlength, Training


@dataclass(frozen=True)
class TokenizedDataset:
    """The rows that are trained on, one after another: row i has the tokens [offsets[i], offsets[i + 1])."""

    token_ids_S: NDArray[np.int32]
    bears_loss_S: NDArray[np.bool_]
    offsets: NDArray[np.int64]  # N + 1
    lines: NDArray[np.int64]  # N: the line of each row in the file
    original_lengths: NDArray[np.int64]  # of every row that could be tokenized, before truncation
    refused: tuple[RefusedRow, ...]
    num_truncated: int
    num_special_text_rows: int = 0  # rows that spell out special tokens, which are read as text

    @property
    def num_rows(self) -> int:
        return len(self.lines)

    @property
    def num_bytes(self) -> int:
        arrays = (self.token_ids_S, self.bears_loss_S, self.offsets, self.lines, self.original_lengths)
        return sum(array.nbytes for array in arrays) + self.lines.nbytes  # `num_targets_N` has as many values

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.token_ids_S[part], self.bears_loss_S[part]

    @cached_property
    def num_targets_N(self) -> NDArray[np.int64]:
        """The number of each row's tokens that bear loss. The first token can't: no token precedes it."""
        first_N = self.offsets[:-1]
        counts_N: NDArray[np.int64] = np.add.reduceat(self.bears_loss_S, first_N, dtype=np.int64)
        return counts_N - self.bears_loss_S[first_N]

    def num_targets(self, index: int) -> int:
        return int(self.num_targets_N[index])


def tokenize_dataset(rows: Iterable[Row], tokenizer: BackboneTokenizer, training: Training) -> TokenizedDataset:
    """Tokenize all rows and apply `overlength`.

    Raises InvalidInputError if no row remains, or if a row is too long and `overlength` is REFUSE.
    """
    parts, lengths, num_truncated = list[TokenizedRows](), list[NDArray[np.int64]](), 0
    for part in tokenize_all(rows, tokenizer, training.parse_special_tokens):
        rows_within, num_cut = _apply_limit(part, training.max_sequence_tokens, training.overlength)
        parts.append(rows_within)
        lengths.append(part.lengths_N)
        num_truncated += num_cut
    refused = tuple(row for part in parts for row in part.refused)
    if not any(len(part.lines) for part in parts):
        reason = f"every row is refused; line {refused[0].line}: {refused[0].reason}" if refused else "has no rows"
        raise InvalidInputError.of_field("dataset", reason)
    return TokenizedDataset(
        token_ids_S=np.concatenate([part.token_ids_S for part in parts]),
        bears_loss_S=np.concatenate([part.bears_loss_S for part in parts]),
        offsets=np.concatenate([[0], *(part.lengths_N for part in parts)]).cumsum(),
        lines=np.concatenate([part.lines for part in parts]),
        original_lengths=np.concatenate(lengths),
        refused=refused,
        num_truncated=num_truncated,
        num_special_text_rows=sum(int(part.spells_special_N.sum()) for part in parts),
    )


def _apply_limit(rows: TokenizedRows, limit: int, overlength: Overlength) -> tuple[TokenizedRows, int]:
    """Truncate, drop or refuse rows of more than `limit` tokens; return the others and the number of truncated ones."""
    is_overlong_N = rows.lengths_N > limit
    if not is_overlong_N.any():
        return rows, 0
    if overlength is Overlength.REFUSE:
        index = int(is_overlong_N.argmax())
        raise InvalidInputError.of_field(
            "training.max_sequence_tokens",
            f"line {rows.lines[index]} has {rows.lengths_N[index]} tokens, over {limit}: raise the limit or set "
            "overlength to TRUNCATE or DROP",
        )
    if overlength is Overlength.DROP:
        is_refused_N = is_overlong_N
        reasons = [
            f"{num_tokens} tokens, over max_sequence_tokens {limit}" for num_tokens in rows.lengths_N[is_refused_N]
        ]
    else:
        is_refused_N = is_overlong_N & (rows.num_targets_N(limit) == 0)
        reasons = [f"no token bears loss within max_sequence_tokens {limit}"] * int(is_refused_N.sum())
    return rows.select(~is_refused_N, limit, reasons), int((is_overlong_N & ~is_refused_N).sum())


@dataclass(frozen=True)
class Split:
    """The indices of rows that train and of rows that are held out, both in the dataset's order."""

    train: NDArray[np.int64]
    heldout: NDArray[np.int64]


def split(num_rows: int, training: Training) -> Split:
    """Draw the held-out rows by the seed, at least one, and leave at least one to train. Raises InvalidInputError."""
    all_rows = np.arange(num_rows, dtype=np.int64)
    if training.heldout_fraction <= 0:
        return Split(all_rows, all_rows[:0])
    if num_rows < 2:
        raise InvalidInputError.of_field(
            "training.heldout_fraction", f"{training.heldout_fraction} of 1 row cannot be held out: add rows or set 0"
        )
    count = min(num_rows - 1, max(1, round(num_rows * training.heldout_fraction)))
    heldout = np.sort(_permutation(training.seed, -1, num_rows)[:count])
    return Split(np.setdiff1d(all_rows, heldout), heldout)


def num_steps(training: Training, num_train_rows: int) -> int:
    """Return the task's optimizer steps: `num_steps`, or epochs of ceil(rows / global batch) steps."""
    if training.num_steps is not None:
        return training.num_steps
    assert training.num_epochs is not None
    return training.num_epochs * math.ceil(num_train_rows / training.global_batch_size)


class RowOrder:
    """The order of the training rows: one permutation for each epoch. Caches the epoch that was read last."""

    def __init__(self, training: Training, train: NDArray[np.int64]) -> None:
        self._training, self._train = training, train
        self._epoch, self._rows = -1, train

    def batch(self, step: int) -> NDArray[np.int64]:
        """Return the rows of optimizer step `step` (from 0). The last batch of an epoch may be smaller."""
        size = self._training.global_batch_size
        epoch, index = divmod(step, math.ceil(len(self._train) / size))
        return self.epoch(epoch)[index * size : (index + 1) * size]

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """Return all training rows in the order of one epoch (from 0)."""
        if self._training.shuffle and epoch != self._epoch:
            self._rows = self._train[_permutation(self._training.seed, epoch, len(self._train))]
            self._epoch = epoch
        return self._rows


def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Return a permutation by numpy's Philox with the key (seed, epoch + 1); epoch -1 draws the held-out split."""
    key = np.array([seed % 2**64, epoch + 1], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)
