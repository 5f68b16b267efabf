"""Plans a group's launches: tiles and work items on the device, made once for a layout of uses.

All layers whose operators have the same widths share a plan. Legend: U uses, S streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from engine.kernels.constants import FACTOR_TILES, FLOAT_STAGES, PAIR, STAGES, THREADS, TILE, VECTOR_BYTES
from engine.kernels.launch import DeviceTable, Uploader
from engine.kernels.multi_lora import work_items
from engine.kernels.multi_lora.descriptors import gaps_of, num_gradients, num_shrunk
from engine.kernels.multi_lora.rank_tiles import RankTiles, input_tiles, output_tiles
from engine.kernels.multi_lora.structs import RANKS, Ints, Rows

_STAGED_BYTES = TILE * (TILE * 4 + VECTOR_BYTES)
_FLAG_BYTES = 16


@dataclass(frozen=True)
class KernelWork:
    """The work of one launch. `tiles` is None if items refer to uses directly."""

    items: DeviceTable
    tiles: DeviceTable | None
    num_items: int
    num_counters: int
    num_partials: int
    shared_bytes: int


class LaunchPlan:
    """The work of each kernel, made at first use. `widths_S`: K, then N of each operator."""

    def __init__(
        self,
        uses: Rows,
        factors: Rows,
        num_tokens: int,
        widths_S: Sequence[int],
        dtype: torch.dtype,
        uploader: Uploader,
    ) -> None:
        """The plan depends on the layouts and gains of `factors`, not on their addresses."""
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
        return self._kernel_work(tiles, work_items.shrink_items(tiles), self._tile_bytes(self._stages + FACTOR_TILES))

    @cached_property
    def shrink_output(self) -> KernelWork:
        """Work for uses whose dB is not summed in the same pass."""
        tiles = self._output(self._all_U[~self._is_one_pass_U])
        return self._kernel_work(tiles, work_items.shrink_items(tiles), self._tile_bytes(self._stages + FACTOR_TILES))

    @cached_property
    def outer_input(self) -> KernelWork:
        tiles = self._input(np.flatnonzero(self._uses["da"] >= 0))
        return self._kernel_work(tiles, work_items.outer_items(tiles), self._tile_bytes(2 * self._stages))

    @cached_property
    def outer_output(self) -> KernelWork:
        tiles = self._output(np.flatnonzero((self._uses["db"] >= 0) & ~self._is_one_pass_U))
        return self._kernel_work(tiles, work_items.outer_items(tiles), self._tile_bytes(2 * self._stages))

    @cached_property
    def shrink_outer(self) -> KernelWork:
        tiles = self._output(np.flatnonzero(self._is_one_pass_U))
        num_rows = np.minimum(tiles.num_tokens_P, work_items.one_pass_tokens(self.itemsize))
        row_tiles, pairs = -(-num_rows // TILE), tiles.num_pairs_P
        shrunk_bytes = row_tiles * TILE * (pairs * PAIR * self.itemsize + VECTOR_BYTES)
        sums_bytes = row_tiles * pairs * (TILE * PAIR * 4)
        extra_bytes = int((shrunk_bytes + sums_bytes).max(initial=0))
        items = work_items.shrink_outer_items(tiles, self.itemsize)
        return self._kernel_work(tiles, items, self._tile_bytes(self._stages + FACTOR_TILES) + extra_bytes)

    @cached_property
    def expand_input(self) -> KernelWork:
        """Work that writes every row of dX."""
        return self._expand(self._input(self._all_U), gaps_of(self._uses, self.num_tokens), [0])

    def expand_output(self, ops: tuple[int, ...], adds: bool) -> KernelWork:
        """Return the work for these operators: write every row, or add to the rows that uses cover."""
        if (ops, adds) not in self._expands:
            chosen = np.flatnonzero(np.isin(self._uses["op"], ops))
            self._expands[ops, adds] = self._expand_output(chosen, ops, adds)
        return self._expands[ops, adds]

    @cached_property
    def shrink_gain(self) -> KernelWork:
        chosen = np.flatnonzero(self._uses["dd"] >= 0)
        items = work_items.gain_items(chosen, self._uses["rank"].astype(np.int64), work_items.GAIN_RANKS)
        return self._kernel_work(None, items, 4 * THREADS)

    @cached_property
    def expand_gain(self) -> KernelWork:
        chosen = np.flatnonzero(self._uses["dg"] >= 0)
        widths_U = np.asarray(self.widths_S[1:], np.int64)[self._uses["op"]]
        return self._kernel_work(None, work_items.gain_items(chosen, widths_U, work_items.GAIN_COLUMNS), 0)

    @property
    def _all_U(self) -> Ints:
        return np.arange(len(self._uses))

    @property
    def _is_one_pass_U(self) -> NDArray[np.bool_]:
        is_low_rank, has_tokens = (
            self._uses["rank"] <= work_items.one_pass_ranks(self.itemsize),
            self._uses["num_tokens"] > 0,
        )
        result: NDArray[np.bool_] = is_low_rank & has_tokens & (self._uses["db"] >= 0)
        return result

    def _input(self, chosen: Ints) -> RankTiles:
        return input_tiles(self._uses, self._factors, self.widths_S, chosen.tolist())

    def _output(self, chosen: Ints) -> RankTiles:
        return output_tiles(self._uses, self.widths_S, chosen.tolist())

    def _expand_output(self, chosen: Ints, ops: tuple[int, ...], adds: bool) -> KernelWork:
        by_op = [] if adds else [gaps_of(self._uses[self._uses["op"] == op], self.num_tokens) for op in ops]
        streams = [1 + op for op, gaps in zip(ops, by_op, strict=False) for _ in gaps]
        return self._expand(self._output(chosen), np.concatenate([np.zeros((0, 2), np.int64), *by_op]), streams)

    def _expand(self, tiles: RankTiles, gaps: Ints, streams: Sequence[int]) -> KernelWork:
        stream_of = np.resize(np.asarray(streams, np.int64), len(gaps))
        items = work_items.expand_items(tiles, gaps, stream_of, np.asarray(self.widths_S, np.int64))
        return self._kernel_work(tiles, items, self._tile_bytes(2 * FACTOR_TILES) + _STAGED_BYTES)

    def _kernel_work(self, tiles: RankTiles | None, work: work_items.WorkItems, shared_bytes: int) -> KernelWork:
        rows = None if tiles is None else self._upload(tiles.rows)
        assert rows is None or rows.dtype == RANKS
        items = self._upload(work.items)
        return KernelWork(
            items, rows, len(work.items), work.num_counters, work.num_partials, shared_bytes + _FLAG_BYTES
        )

    @property
    def _stages(self) -> int:
        return FLOAT_STAGES if self.itemsize == 4 else STAGES

    def _tile_bytes(self, count: int) -> int:
        return count * TILE * (TILE * self.itemsize + VECTOR_BYTES)
