"""What a group's launches read beside the tensors: tiles and work items on the device, made once for a layout of uses.

It is the same for all layers whose operators have the same widths. Legend: U uses, S streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from engine.kernels.launch import Table, Uploader
from engine.kernels.multi_lora import work_items as cut
from engine.kernels.multi_lora.descriptors import gaps_of, num_gradients, num_shrunk
from engine.kernels.multi_lora.rank_tiles import Tiles, input_tiles, output_tiles
from engine.kernels.multi_lora.structs import PAIR, RANKS, TILE, Ints, Rows

_STAGED_BYTES = TILE * (TILE * 4 + 16)
_FLAG_BYTES = 16


@dataclass(frozen=True)
class KernelWork:
    """One launch's items. `tiles` is None where items name uses themselves."""

    items: Table
    tiles: Table | None
    num_items: int
    num_counters: int
    num_partials: int
    shared_bytes: int


class LaunchPlan:
    """The work of each kernel, made when first asked for. `widths_S`: K, then N of each operator."""

    def __init__(
        self,
        uses: Rows,
        factors: Rows,
        num_tokens: int,
        widths_S: Sequence[int],
        dtype: torch.dtype,
        uploader: Uploader,
    ) -> None:
        """Of `factors`, how they lie and which gains are there settles the plan; no address does."""
        self.num_tokens, self.widths_S, self.itemsize = num_tokens, tuple(widths_S), dtype.itemsize
        self.device, self._upload = uploader.device, uploader.upload
        self.uses = self._upload(uses)
        self.num_gradients = num_gradients(uses, self.widths_S[0], self.widths_S[1:])
        self.num_shrunk = num_shrunk(uses)
        self.used_ops = frozenset(uses["op"].tolist())
        self._uses, self._factors = uses, factors
        self._expands: dict[tuple[tuple[int, ...], bool], KernelWork] = {}

    @cached_property
    def shrink_input(self) -> KernelWork:
        tiles = self._input(self._all_U)
        return self._ready(tiles, cut.shrink_items(tiles), self._tile_bytes(self._stages + 2))

    @cached_property
    def shrink_output(self) -> KernelWork:
        """Of uses whose dB is not summed in the same pass."""
        tiles = self._output(self._all_U[~self._is_one_pass_U])
        return self._ready(tiles, cut.shrink_items(tiles), self._tile_bytes(self._stages + 2))

    @cached_property
    def outer_input(self) -> KernelWork:
        tiles = self._input(np.flatnonzero(self._uses["da"] >= 0))
        return self._ready(tiles, cut.outer_items(tiles), self._tile_bytes(2 * self._stages))

    @cached_property
    def outer_output(self) -> KernelWork:
        tiles = self._output(np.flatnonzero((self._uses["db"] >= 0) & ~self._is_one_pass_U))
        return self._ready(tiles, cut.outer_items(tiles), self._tile_bytes(2 * self._stages))

    @cached_property
    def shrink_outer(self) -> KernelWork:
        tiles = self._output(np.flatnonzero(self._is_one_pass_U))
        num_rows = np.minimum(tiles.num_tokens_P, cut.one_pass_tokens(self.itemsize))
        row_tiles, pairs = -(-num_rows // TILE), tiles.num_pairs_P
        shrunk = row_tiles * TILE * (pairs * PAIR * self.itemsize + 16)
        own = int((shrunk + row_tiles * pairs * (TILE * PAIR * 4)).max(initial=0))
        items = cut.shrink_outer_items(tiles, self.itemsize)
        return self._ready(tiles, items, self._tile_bytes(self._stages + 2) + own)

    @cached_property
    def expand_input(self) -> KernelWork:
        """Every row of dX is written."""
        return self._expand(self._input(self._all_U), gaps_of(self._uses, self.num_tokens), [0])

    def expand_output(self, ops: tuple[int, ...], adds: bool) -> KernelWork:
        """Of these operators; every row is written, or what uses cover is added to."""
        if (ops, adds) not in self._expands:
            chosen = np.flatnonzero(np.isin(self._uses["op"], ops))
            self._expands[ops, adds] = self._expand_output(chosen, ops, adds)
        return self._expands[ops, adds]

    @cached_property
    def shrink_gain(self) -> KernelWork:
        chosen = np.flatnonzero(self._uses["dd"] >= 0)
        items = cut.gain_items(chosen, self._uses["rank"].astype(np.int64), cut.GAIN_RANKS)
        return self._ready(None, items, 4 * 128)

    @cached_property
    def expand_gain(self) -> KernelWork:
        chosen = np.flatnonzero(self._uses["dg"] >= 0)
        widths_U = np.asarray(self.widths_S[1:], np.int64)[self._uses["op"]]
        return self._ready(None, cut.gain_items(chosen, widths_U, cut.GAIN_COLUMNS), 0)

    @property
    def _all_U(self) -> Ints:
        return np.arange(len(self._uses))

    @property
    def _is_one_pass_U(self) -> NDArray[np.bool_]:
        ranks, is_there = self._uses["rank"] <= cut.one_pass_ranks(self.itemsize), self._uses["num_tokens"] > 0
        result: NDArray[np.bool_] = ranks & is_there & (self._uses["db"] >= 0)
        return result

    def _input(self, chosen: Ints) -> Tiles:
        return input_tiles(self._uses, self._factors, self.widths_S, chosen.tolist())

    def _output(self, chosen: Ints) -> Tiles:
        return output_tiles(self._uses, self.widths_S, chosen.tolist())

    def _expand_output(self, chosen: Ints, ops: tuple[int, ...], adds: bool) -> KernelWork:
        by_op = [] if adds else [gaps_of(self._uses[self._uses["op"] == op], self.num_tokens) for op in ops]
        streams = [1 + op for op, gaps in zip(ops, by_op, strict=False) for _ in gaps]
        return self._expand(self._output(chosen), np.concatenate([np.zeros((0, 2), np.int64), *by_op]), streams)

    def _expand(self, tiles: Tiles, gaps: Ints, streams: Sequence[int]) -> KernelWork:
        stream_of = np.resize(np.asarray(streams, np.int64), len(gaps))
        items = cut.expand_items(tiles, gaps, stream_of, np.asarray(self.widths_S, np.int64))
        return self._ready(tiles, items, self._tile_bytes(4) + _STAGED_BYTES)

    def _ready(self, tiles: Tiles | None, made: cut.WorkItems, shared_bytes: int) -> KernelWork:
        rows = None if tiles is None else self._upload(tiles.rows)
        assert rows is None or rows.dtype == RANKS
        items = self._upload(made.items)
        return KernelWork(
            items, rows, len(made.items), made.num_counters, made.num_partials, shared_bytes + _FLAG_BYTES
        )

    @property
    def _stages(self) -> int:
        """cuda/multi_lora.cuh: floats have twice the bytes, and 99 KB a block is what some architectures have."""
        return 2 if self.itemsize == 4 else 3

    def _tile_bytes(self, count: int) -> int:
        return count * TILE * (TILE * self.itemsize + 16)
