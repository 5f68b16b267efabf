"""Preview of how a task would read a dataset, before the task is created. Legend: N rows, L tokens of one row."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.alignment.dataset import RowOrder, TokenizedDataset, num_steps, split
from engine.alignment.tokenized_rows import RefusedRow
from engine.alignment.tokenizer import BackboneTokenizer
from engine.task import Training

_NUM_QUANTILES = 64


@dataclass(frozen=True)
class LossSpan:
    """Consecutive tokens that all bear loss, or that all bear none."""

    text: str
    bears_loss: bool
    num_tokens: int


@dataclass(frozen=True)
class RenderedRow:
    """A row as text, cut where the loss starts or ends."""

    line: int
    num_tokens: int
    pieces: tuple[LossSpan, ...]
    is_heldout: bool


@dataclass(frozen=True)
class Preflight:
    """The preview. `length_histogram` maps [from, to) tokens, powers of two, to the number of rows before truncation.

    `length_quantiles`: tokens of the training rows after truncation. `num_special_text_rows`: see TokenizedDataset.
    """

    num_rows: int
    num_train_rows: int
    num_heldout_rows: int
    num_tokens_per_epoch: int
    num_target_tokens_per_epoch: int
    num_steps: int
    num_train_tokens: int
    samples: tuple[RenderedRow, ...]
    length_histogram: Mapping[tuple[int, int], int]
    num_truncated_rows: int
    refused: tuple[RefusedRow, ...]
    length_quantiles: tuple[int, ...]
    num_special_text_rows: int


def preflight(
    dataset: TokenizedDataset,
    tokenizer: BackboneTokenizer,
    training: Training,
    num_samples: int,
    yield_turn: Callable[[], object] = lambda: None,
) -> Preflight:
    """Return the preview, with the first `num_samples` rows. Raises InvalidInputError if the dataset is too small.

    `yield_turn` is called between pieces of the work.
    """
    parts = split(dataset.num_rows, training)
    lengths = np.diff(dataset.offsets)
    steps = num_steps(training, len(parts.train))
    num_samples = min(num_samples, dataset.num_rows)
    heldout = set(parts.heldout[parts.heldout < num_samples].tolist())
    return Preflight(
        num_rows=dataset.num_rows + len(dataset.refused),
        num_train_rows=len(parts.train),
        num_heldout_rows=len(parts.heldout),
        num_tokens_per_epoch=int(lengths[parts.train].sum()),
        num_target_tokens_per_epoch=int(_num_targets_N(dataset)[parts.train].sum()),
        num_steps=steps,
        num_train_tokens=_train_tokens(dataset, training, steps),
        samples=tuple(_render(dataset, tokenizer, i, i in heldout, yield_turn) for i in range(num_samples)),
        length_histogram=_histogram(dataset),
        num_truncated_rows=dataset.num_truncated,
        refused=dataset.refused,
        length_quantiles=_quantiles(lengths[parts.train]),
        num_special_text_rows=dataset.num_special_text_rows,
    )


def _train_tokens(dataset: TokenizedDataset, training: Training, steps: int) -> int:
    """Count the effective tokens of all steps: whole epochs, then the batches of the last one."""
    train, lengths = split(dataset.num_rows, training).train, np.diff(dataset.offsets)
    per_epoch = -(-len(train) // training.global_batch_size)
    epochs, rest = divmod(steps, per_epoch)
    order = RowOrder(training, train).epoch(epochs)
    tail = int(lengths[order[: rest * training.global_batch_size]].sum())
    return epochs * int(lengths[train].sum()) + tail


def _num_targets_N(dataset: TokenizedDataset) -> NDArray[np.int64]:
    """Return TokenizedDataset.num_targets of all rows; no row is empty."""
    starts = dataset.offsets[:-1]
    return np.add.reduceat(dataset.bears_loss_S.astype(np.int64), starts) - dataset.bears_loss_S[starts]


def _histogram(dataset: TokenizedDataset) -> dict[tuple[int, int], int]:
    exponents = np.frexp(dataset.original_lengths.astype(float))[1]  # length in [2**(e-1), 2**e)
    return {(1 << (int(e) - 1), 1 << int(e)): int((exponents == e).sum()) for e in np.unique(exponents)}


def _quantiles(lengths: NDArray[np.int64]) -> tuple[int, ...]:
    """Return quantiles of the lengths; each is the length of a row."""
    at = (np.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES
    return tuple(np.quantile(lengths, at, method="inverted_cdf").astype(int).tolist()) if len(lengths) else ()


def _render(
    dataset: TokenizedDataset,
    tokenizer: BackboneTokenizer,
    index: int,
    is_heldout: bool,
    yield_turn: Callable[[], object],
) -> RenderedRow:
    ids_L, bears_loss_L = dataset.row(index)
    bounds = [0, *(np.flatnonzero(np.diff(bears_loss_L)) + 1).tolist(), len(ids_L)]
    text = tokenizer.decode(ids_L)
    # Cut the whole text: tokens decoded separately would lose spaces and characters that span two tokens.
    cuts = list[int]()
    for at in bounds[:-1]:
        yield_turn()
        cuts.append(min(len(text), len(tokenizer.decode(ids_L[:at]))))
    cuts.append(len(text))
    pieces = tuple(
        LossSpan(text[cut:next_cut], bool(bears_loss_L[a]), b - a)
        for (a, b), (cut, next_cut) in zip(itertools.pairwise(bounds), itertools.pairwise(cuts), strict=True)
    )
    return RenderedRow(int(dataset.lines[index]), len(ids_L), pieces, is_heldout)
