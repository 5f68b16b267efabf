"""Cuts multi_lora's products into work items.

How a use is cut depends only on its own tokens, its rank, and the stream's width and type, so its sums are the same,
bit for bit, with any neighbours. Partial sums are floats, added up by the last item to finish, in a fixed order. They
are written and read once, on top of the stream's bytes; at rank R and two bytes an element they are
    R / 256 of X or dY in shrink,  R / 256 in outer,  R / 128 + R / 64 in shrink_outer,
less if a use has fewer tokens than an item sums. So E and dB in one pass over dY pay up to rank 32 (at 16: 38% of dY
instead of 112%); beyond, shared memory holds so few tokens that reading dY twice is cheaper.
Legend: P tiles, G groups of tiles summed by one item.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.kernels.constants import ONE_PASS_RANKS, THREADS, TILE, WARP
from engine.kernels.multi_lora.rank_tiles import RankTiles
from engine.kernels.multi_lora.structs import ITEM, Ints, Rows

SHRINK_COLUMNS = 1024  # of the stream, summed by one item
EXPAND_COLUMNS = 512  # of the stream, written by one item
OUTER_TOKENS = 1024  # summed by one item
ONE_PASS_COLUMNS = 512  # by an item of shrink_outer
GAIN_RANKS, GAIN_COLUMNS = WARP, TILE  # of one use, summed by one item


def one_pass_ranks(itemsize: int) -> int:
    """Return the largest rank with which E and dB are summed in one pass over dY: a block has 99 KB for both."""
    return ONE_PASS_RANKS if itemsize == 2 else ONE_PASS_RANKS // 2


def one_pass_tokens(itemsize: int) -> int:
    return 256 if itemsize == 2 else 128


@dataclass(frozen=True)
class WorkItems:
    """Work items, with the number of counters and of floats of partial sums that they share."""

    items: Rows
    num_counters: int = 0
    num_partials: int = 0


def shrink_items(tiles: RankTiles) -> WorkItems:
    """Return items that sum along columns, split every SHRINK_COLUMNS."""
    items, tile, i, split = _cut(tiles.num_tokens_P, TILE, tiles.width_P, SHRINK_COLUMNS)
    _place(items, tiles, tile, (i, TILE), (split, SHRINK_COLUMNS))
    count = -(-tiles.width_P // SHRINK_COLUMNS)[tile]
    return _ordered(_split(items, "sum", split, count, (tile, i), np.ones_like(i), tiles))


def outer_items(tiles: RankTiles) -> WorkItems:
    """Return items that sum along tokens, split every OUTER_TOKENS. Those of a use without tokens write zeros."""
    at_least_one_P = np.maximum(tiles.num_tokens_P, 1)
    items, tile, split, j = _cut(at_least_one_P, OUTER_TOKENS, tiles.width_P, TILE)
    _place(items, tiles, tile, (split, OUTER_TOKENS), (j, TILE))
    count = -(-at_least_one_P // OUTER_TOKENS)[tile]
    return _ordered(_split(items, "sum", split, count, (tile, j), np.ones_like(j), tiles))


def shrink_outer_items(tiles: RankTiles, itemsize: int) -> WorkItems:
    """Return items that sum E along columns, split every ONE_PASS_COLUMNS, and dB along tokens, split every
    `one_pass_tokens`."""
    num_tokens = one_pass_tokens(itemsize)
    items, tile, i, j = _cut(tiles.num_tokens_P, num_tokens, tiles.width_P, ONE_PASS_COLUMNS)
    _place(items, tiles, tile, (i, num_tokens), (j, ONE_PASS_COLUMNS))
    rows, columns = (
        -(-(items[end] - items[name]) // TILE) for name, end in (("token", "end_token"), ("column", "end_column"))
    )
    first = _split(items, "sum", j, -(-tiles.width_P // ONE_PASS_COLUMNS)[tile], (tile, i), rows, tiles)
    return _split(items, "outer", i, -(-tiles.num_tokens_P // num_tokens)[tile], (tile, j), columns, tiles, first)


def expand_items(tiles: RankTiles, gaps: NDArray[Any], stream_gaps: Ints, widths: Ints) -> WorkItems:
    """Return items that sum along the ranks of a use or, on the input side, of all uses on the same tokens.

    `gaps` [n, 2]: start and end of tokens that no use covers, in the streams `stream_gaps`; they are written too.
    """
    key_P2 = np.stack([tiles.stream_P, tiles.start_P, tiles.num_tokens_P], axis=1)
    is_first_P = np.ones(len(tiles), bool)
    is_first_P[1:] = (key_P2[1:] != key_P2[:-1]).any(axis=1)
    first_G = np.flatnonzero(is_first_P)
    num_tiles_G = np.diff(np.append(first_G, len(tiles)))
    start_G = np.concatenate([tiles.start_P[first_G], gaps[:, 0]])
    num_tokens_G = np.concatenate([tiles.num_tokens_P[first_G], gaps[:, 1] - gaps[:, 0]])
    stream_G = np.concatenate([tiles.stream_P[first_G], stream_gaps])
    items, group, i, j = _cut(num_tokens_G, TILE, widths[stream_G], EXPAND_COLUMNS)
    items["tile"] = np.append(first_G, np.zeros(len(gaps), np.int64))[group]
    items["num_tiles"] = np.append(num_tiles_G, np.zeros(len(gaps), np.int64))[group]
    items["stream"] = stream_G[group]
    _bounds(items, ("token", "end_token"), i, TILE, start_G[group], num_tokens_G[group])
    _bounds(items, ("column", "end_column"), j, EXPAND_COLUMNS, 0, widths[stream_G][group])
    return _ordered(WorkItems(items))


def gain_items(chosen_U: Ints, widths_U: Ints, step: int) -> WorkItems:
    """Return items for `step` ranks or outputs of one use each."""
    items, use, i, _ = _cut(widths_U[chosen_U], step, np.ones_like(chosen_U), 1)
    items["tile"] = chosen_U[use]
    _bounds(items, ("column", "end_column"), i, step, 0, widths_U[chosen_U][use])
    return WorkItems(items)


def _cut(a_P: Ints, a: int, b_P: Ints, b: int) -> tuple[Rows, Ints, Ints, Ints]:
    """Return (items, the tile of each, its row and column in the tile's grid of a_P / a by b_P / b cells)."""
    counts_P2 = -(-np.stack([a_P, b_P], axis=1) // np.array([a, b]))
    sizes_P = counts_P2.prod(axis=1)
    tile = np.repeat(np.arange(len(sizes_P)), sizes_P)
    place = np.arange(len(tile)) - np.repeat(np.cumsum(sizes_P) - sizes_P, sizes_P)
    i, j = np.divmod(place, counts_P2[tile, 1])
    return np.zeros(len(tile), ITEM), tile, i, j


def _place(items: Rows, tiles: RankTiles, tile: Ints, tokens: tuple[Ints, int], columns: tuple[Ints, int]) -> None:
    items["tile"], items["num_tiles"], items["stream"] = tile, 1, tiles.stream_P[tile]
    _bounds(items, ("token", "end_token"), *tokens, tiles.start_P[tile], tiles.num_tokens_P[tile])
    _bounds(items, ("column", "end_column"), *columns, 0, tiles.width_P[tile])


def _bounds(items: Rows, names: tuple[str, str], index: Ints, step: int, start: Any, size: Any) -> None:
    items[names[0]] = start + index * step
    items[names[1]] = start + np.minimum((index + 1) * step, size)


def _split(
    items: Rows,
    name: str,
    index: Ints,
    count: Ints,
    group: tuple[Ints, Ints],
    num_sums: Ints,
    tiles: RankTiles,
    before: WorkItems | None = None,
) -> WorkItems:
    """Lay out the partial sums of `num_sums` tiles in each `group` of `count` items."""
    before = before or WorkItems(items)
    _, number = np.unique(group[0] * (1 << 32) + group[1], return_inverse=True)
    is_first = (index == 0) & (count > 1)
    floats = num_sums * count * tiles.num_pairs_P[items["tile"]] * (2 * THREADS * 4)
    split = items[name]
    split["index"], split["count"] = index, count
    totals = []
    for field, sizes, start in (("counter", num_sums, before.num_counters), ("partial", floats, before.num_partials)):
        base = np.zeros(number.max(initial=0) + 1, np.int64)
        base[number[is_first]] = start + np.cumsum(sizes[is_first]) - sizes[is_first]
        split[field] = base[number]
        totals.append(start + int(sizes[is_first].sum()))
    return WorkItems(items, *totals)


def _ordered(cut: WorkItems) -> WorkItems:
    """Sort items so that those that read the same tokens and columns are adjacent, and the later ones hit the cache."""
    items = cut.items
    order = np.lexsort((items["tile"], items["column"], items["token"], items["stream"]))
    return WorkItems(items[order], cut.num_counters, cut.num_partials)
