"""Many tokenized rows in flat arrays. Legend: N rows, S tokens of all of them, L tokens of one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RefusedRow:
    """A row that is left out. `reason` never quotes it."""

    line: int
    reason: str


class TokenizedRow(NamedTuple):
    """The token ids of a row. A token that bears loss is predicted from the tokens before it.

    `spells_special`: a `text`, `prompt` or `completion` spells out a special token that is read as text.
    """

    line: int
    token_ids_L: NDArray[np.int32]
    bears_loss_L: NDArray[np.bool_]
    spells_special: bool


@dataclass(frozen=True)
class TokenizedRows:
    """Rows one after another, with the fields of TokenizedRow: row i has the tokens [offsets[i], offsets[i + 1]).

    `refused`: rows that are left out, in order.
    """

    token_ids_S: NDArray[np.int32]
    bears_loss_S: NDArray[np.bool_]
    offsets: NDArray[np.int64]  # N + 1
    lines: NDArray[np.int64]  # N
    spells_special_N: NDArray[np.bool_]
    refused: Sequence[RefusedRow]

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def row(self, index: int) -> TokenizedRow:
        part = slice(self.offsets[index], self.offsets[index + 1])
        line, spells_special = int(self.lines[index]), bool(self.spells_special_N[index])
        return TokenizedRow(line, self.token_ids_S[part], self.bears_loss_S[part], spells_special)

    def num_targets_N(self, limit: int) -> NDArray[np.int64]:
        """Count the tokens that bear loss among each row's first `limit`, without the very first."""
        num_before_S = np.zeros(len(self.bears_loss_S) + 1, np.int64)
        np.cumsum(self.bears_loss_S, out=num_before_S[1:])
        ends = np.minimum(self.offsets[1:], self.offsets[:-1] + limit)
        return num_before_S[ends] - num_before_S[np.minimum(self.offsets[:-1] + 1, ends)]

    def select(self, is_selected_N: NDArray[np.bool_], limit: int, reasons: Iterable[str]) -> "TokenizedRows":
        """Return the first `limit` tokens of the selected rows; refuse each other row with the next of `reasons`."""
        position_S = np.arange(len(self.token_ids_S)) - self.offsets[:-1].repeat(self.lengths_N)
        is_selected_S = is_selected_N.repeat(self.lengths_N) & (position_S < limit)
        offsets = np.zeros(1 + is_selected_N.sum(), np.int64)
        np.minimum(self.lengths_N[is_selected_N], limit).cumsum(out=offsets[1:])
        refused = map(RefusedRow, self.lines[~is_selected_N].tolist(), reasons)
        return TokenizedRows(
            self.token_ids_S[is_selected_S],
            self.bears_loss_S[is_selected_S],
            offsets,
            self.lines[is_selected_N],
            self.spells_special_N[is_selected_N],
            sorted([*self.refused, *refused], key=lambda row: row.line),
        )
