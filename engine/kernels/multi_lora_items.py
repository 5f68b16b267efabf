"""What multi_lora's kernels read beside the tensors: uses, and the work items they are cut into.

How a use is cut depends on its own tokens, its rank and the operator's width alone, so its sums are the same, bit for
bit, whoever its neighbours are. Structs as in cuda/multi_lora.cuh.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.kernels.launch import POINTER, THREADS, struct_of

TILE = 64  # tokens, columns or ranks: cuda/tile.cuh
PAIR = 16  # the step of an accumulator's columns
SHRINK_COLUMNS = 1024  # of the stream, summed by one item
EXPAND_COLUMNS = 512  # of the stream, written by one item
OUTER_TOKENS = 1024  # summed by one item
GAIN_RANKS, GAIN_COLUMNS = 32, 64

USE = struct_of(
    [(name, np.int32) for name in ("start", "num_tokens", "rank", "first_run", "num_runs", "threshold")]
    + [("scale", np.float32), ("keep_scale", np.float32), ("seed", np.uint64), ("step_site", np.uint64)]
    + [(name, POINTER) for name in ("a", "b", "shrink_gain", "expand_gain")]
    + [("a_stride", np.int64), ("b_stride", np.int64), ("is_a_rank_major", np.int32), ("is_b_rank_major", np.int32)]
    + [(name, np.int64) for name in ("shrunk", "da", "db", "dd", "dg")]
)
RUN = struct_of([("position", np.int64), ("token", np.int32), ("unused", np.int32)])
ITEM = struct_of(
    [(name, np.int32) for name in ("use", "token", "end_token", "column", "end_column", "rank")]
    + [(name, np.int32) for name in ("split", "num_splits", "counter", "unused")]
    + [("partial", np.int64)]
)
LAUNCH = struct_of(
    [(name, POINTER) for name in ("uses", "runs", "items", "stream", "shrunk", "other")]
    + [(name, POINTER) for name in ("gradients", "partials", "counters")]
    + [("stream_stride", np.int64)]
    + [(name, np.int32) for name in ("num_items", "width", "is_input_side", "rank_capacity")]
)

Ints = NDArray[np.int64]


def shrink_items(num_tokens_U: Ints, ranks_U: Ints, width: int) -> NDArray[Any]:
    """Sums along columns, split every SHRINK_COLUMNS."""
    items, i, j, split = _cut(num_tokens_U, TILE, ranks_U, TILE, _like(num_tokens_U, width), SHRINK_COLUMNS)
    _tokens(items, i, TILE, num_tokens_U)
    _columns(items, split, SHRINK_COLUMNS, width)
    items["rank"] = j * TILE
    _split(items, split, num_tokens_U, ranks_U, -(-width // SHRINK_COLUMNS))
    return items


def expand_items(num_tokens_U: Ints, ranks_U: Ints, width: int) -> NDArray[Any]:
    """Sums along ranks, all in one item."""
    one_U = np.minimum(ranks_U, 1)
    items, i, j, _ = _cut(num_tokens_U, TILE, _like(num_tokens_U, width), EXPAND_COLUMNS, one_U, 1)
    _tokens(items, i, TILE, num_tokens_U)
    _columns(items, j, EXPAND_COLUMNS, width)
    items["num_splits"] = 1
    return items


def outer_items(num_tokens_U: Ints, ranks_U: Ints, width: int) -> NDArray[Any]:
    """Sums along tokens, split every OUTER_TOKENS. A use without tokens has zeros written by one item a tile."""
    at_least_one_U = np.maximum(num_tokens_U, 1)
    items, i, j, split = _cut(_like(num_tokens_U, width), TILE, ranks_U, TILE, at_least_one_U, OUTER_TOKENS)
    _tokens(items, split, OUTER_TOKENS, num_tokens_U)
    _columns(items, i, TILE, width)
    items["rank"] = j * TILE
    splits_U = -(-at_least_one_U // OUTER_TOKENS)
    _split(items, split, num_tokens_U, ranks_U, splits_U[items["use"]])
    return items


def shrink_gain_items(num_tokens_U: Ints, ranks_U: Ints, width: int) -> NDArray[Any]:
    """Ranks, GAIN_RANKS an item."""
    one_U = _like(ranks_U, 1)
    items, i, _, _ = _cut(ranks_U, GAIN_RANKS, one_U, 1, one_U, 1)
    items["rank"], items["num_splits"] = i * GAIN_RANKS, 1
    return items


def expand_gain_items(num_tokens_U: Ints, ranks_U: Ints, width: int) -> NDArray[Any]:
    """Columns, GAIN_COLUMNS an item."""
    one_U = np.minimum(ranks_U, 1)
    items, i, _, _ = _cut(_like(ranks_U, width), GAIN_COLUMNS, one_U, 1, one_U, 1)
    _columns(items, i, GAIN_COLUMNS, width)
    items["num_splits"] = 1
    return items


def partial_floats(items: NDArray[Any], ranks_U: Ints) -> int:
    """Floats of all partial sums."""
    split = items[items["num_splits"] > 1]
    return int((split["partial"] + split["num_splits"] * _tile_floats(split, ranks_U)).max(initial=0))


def runs_of(positions_L: Ints) -> NDArray[Any]:
    """Where positions are consecutive: sorted runs, the first from token 0."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(positions_L) != 1) + 1]).astype(np.int64)
    runs = np.zeros(len(starts) if len(positions_L) else 0, RUN)
    if len(positions_L):
        runs["token"], runs["position"] = starts, positions_L[starts]
    return runs


def _like(values_U: Ints, value: int) -> Ints:
    return np.full(len(values_U), value, np.int64)


def _cut(a_U: Ints, a: int, b_U: Ints, b: int, c_U: Ints, c: int) -> tuple[NDArray[Any], Ints, Ints, Ints]:
    """(items of all uses, their places in a grid of a_U / a by b_U / b by c_U / c cells for each use)."""
    counts_U3 = -(-np.stack([a_U, b_U, c_U], axis=1) // np.array([a, b, c]))
    sizes_U = counts_U3.prod(axis=1)
    use = np.repeat(np.arange(len(sizes_U)), sizes_U)
    place = np.arange(len(use)) - np.repeat(np.cumsum(sizes_U) - sizes_U, sizes_U)
    rest, k = np.divmod(place, counts_U3[use, 2])
    i, j = np.divmod(rest, counts_U3[use, 1])
    items = np.zeros(len(use), ITEM)
    items["use"] = use
    return items, i, j, k


def _tokens(items: NDArray[Any], index: Ints, step: int, num_tokens_U: Ints) -> None:
    items["token"] = index * step
    items["end_token"] = np.minimum((index + 1) * step, num_tokens_U[items["use"]])


def _columns(items: NDArray[Any], index: Ints, step: int, width: int) -> None:
    items["column"] = index * step
    items["end_column"] = np.minimum((index + 1) * step, width)


def _split(items: NDArray[Any], split: Ints, num_tokens_U: Ints, ranks_U: Ints, num_splits: Any) -> None:
    """Numbers the tiles whose sums are split, and lays out their partial sums."""
    items["split"], items["num_splits"] = split, num_splits
    is_first = (split == 0) & (items["num_splits"] > 1)
    floats = np.where(is_first, items["num_splits"] * _tile_floats(items, ranks_U), 0)
    items["counter"] = np.maximum(np.cumsum(is_first) - 1, 0)
    items["partial"] = np.cumsum(floats) - np.where(items["num_splits"] > 1, _group(items, ranks_U), 0)


def _group(items: NDArray[Any], ranks_U: Ints) -> Ints:
    return items["num_splits"] * _tile_floats(items, ranks_U)


def _tile_floats(items: NDArray[Any], ranks_U: Ints) -> Ints:
    num_pairs = -(-np.minimum(TILE, ranks_U[items["use"]] - items["rank"]) // PAIR)
    floats: Ints = num_pairs.astype(np.int64) * 2 * THREADS * 4
    return floats


def padded(ranks_U: Sequence[int] | Ints) -> Ints:
    """Width of S's rows."""
    return -(-np.asarray(ranks_U, np.int64) // 8) * 8
