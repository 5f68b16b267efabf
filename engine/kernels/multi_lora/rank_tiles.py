"""Packs the ranks of uses side by side into tiles of 64, so that one pass over a stream serves several uses.

On the input side uses of different operators on the same tokens share tiles, eight ranks at a time, and so share the
pass over X. A use with dropout does not: each site has another mask, and a masked copy of X's tile in shared
memory for each would cost 9 KB a member and one more barrier, on top of the bits that each has to draw anyway. It gets
tiles of its own; their items are adjacent to those of its neighbours, so that X comes from the L2 cache: 64 tokens by
1024 columns are 128 KB, and 132 of them in flight 17 MB.
An element of a product does not depend on its place in a tile, so sharing a tile changes no bit.
Legend: U uses, P tiles.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from engine.kernels.constants import OCTET, PAIR
from engine.kernels.multi_lora.structs import OCTETS, RANKS, Ints, Rows

Octet = tuple[int, int]  # use, its first rank


@dataclass(frozen=True)
class RankTiles:
    """Tiles of ranks, with the tokens and the stream of each: stream 0 is X, 1 + i the i-th operator's Y."""

    rows: Rows
    start_P: Ints
    num_tokens_P: Ints
    stream_P: Ints
    width_P: Ints

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_pairs_P(self) -> Ints:
        pairs: Ints = -(-self.rows["num_octets"].astype(np.int64) * OCTET // PAIR)
        return pairs


def input_tiles(uses: Rows, factors: Rows, widths: Sequence[int], chosen: Iterable[int]) -> RankTiles:
    """Return tiles of A of the `chosen` uses. Tiles of one range are adjacent; `ends_sum` marks the last of a mask."""
    by_range: dict[tuple[int, int], list[int]] = {}
    for index in chosen:
        by_range.setdefault((int(uses[index]["start"]), int(uses[index]["num_tokens"])), []).append(index)
    sums: list[list[list[Octet]]] = []
    for _, same in sorted(by_range.items()):
        without_dropout = [index for index in same if not uses[index]["threshold"]]
        layouts = [
            [i for i in without_dropout if bool(factors[i]["is_a_rank_major"]) is major] for major in (True, False)
        ]
        sums.append([tile for layout in layouts for tile in _octet_rows(uses, layout)])
        sums += [_octet_rows(uses, [index]) for index in same if uses[index]["threshold"]]
    return _tiles(uses, sums, widths, lambda _: 0)


def output_tiles(uses: Rows, widths: Sequence[int], chosen: Iterable[int]) -> RankTiles:
    """Return tiles of B of the `chosen` uses. Uses do not share tiles."""
    sums = [_octet_rows(uses, [index]) for index in chosen]
    return _tiles(uses, sums, widths, lambda index: 1 + int(uses[index]["op"]))


def _octet_rows(uses: Rows, same: Iterable[int]) -> list[list[Octet]]:
    octets = [(index, rank) for index in same for rank in range(0, int(uses[index]["rank"]), OCTET)]
    return [octets[i : i + OCTETS] for i in range(0, len(octets), OCTETS)]


def _tiles(
    uses: Rows, sums: Sequence[Sequence[Sequence[Octet]]], widths: Sequence[int], stream_of: Callable[[int], int]
) -> RankTiles:
    flat = [(octets, octets is tiles[-1]) for tiles in sums for octets in tiles]
    rows, first_P = np.zeros(len(flat), RANKS), np.array([octets[0][0] for octets, _ in flat], np.int64)
    for row, (octets, is_last) in zip(rows, flat, strict=True):
        row["use"][: len(octets)], row["rank"][: len(octets)] = zip(*octets, strict=True)
        row["num_octets"], row["ends_sum"] = len(octets), is_last
    stream_P = np.array([stream_of(index) for index in first_P.tolist()], np.int64)
    start_P, num_tokens_P = (uses[name][first_P].astype(np.int64) for name in ("start", "num_tokens"))
    return RankTiles(rows, start_P, num_tokens_P, stream_P, np.asarray(widths, np.int64)[stream_P])
