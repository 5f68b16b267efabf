"""multi_lora's products on a device: cuda/multi_lora.cu, launched over the uses of one operator.

Bytes beside the base operator's, at rank R: X, dY and X again read once each (X only where A is trained, dY a second
time where B is); Y and dX read and written; S and E, R / K of X. Partial sums: R / 512 of what each shrink or outer
reads.
Legend: T tokens, K inputs, N outputs, W columns of a stream, R rank, U uses, C some of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engine.kernels import multi_lora_items as items_of
from engine.kernels.dropout import DropoutMask
from engine.kernels.launch import SUFFIXES, Kernel, Launcher, Table, pack, upload
from engine.kernels.multi_lora import LoraUse, LowRank

SOURCE = "multi_lora.cu"
_STAGES, _TILE = 3, items_of.TILE
_BLOCKS_PER_MULTIPROCESSOR = 3
_GRADIENTS = ("da", "db", "dd", "dg")
Rows = NDArray[Any]


class Wanted(NamedTuple):
    """Which gradients of a use are wanted: those of A, B, d and g."""

    a: bool
    b: bool
    shrink_gain: bool
    expand_gain: bool


def describe(uses: Sequence[LoraUse], factors: Sequence[LowRank]) -> tuple[Rows, Rows]:
    """(uses without addresses, runs of their positions) as structs. A gain that is there is marked by a 1."""
    rows, runs = np.zeros(len(uses), items_of.USE), [np.zeros(0, items_of.RUN)]
    for row, use, low_rank in zip(rows, uses, factors, strict=True):
        row["start"], row["num_tokens"], row["rank"] = use.start, use.end - use.start, len(low_rank.a_RK)
        row["scale"], row["keep_scale"] = use.scale, use.keep_scale
        row["shrink_gain"] = low_rank.shrink_gain_R is not None
        row["expand_gain"] = low_rank.expand_gain_N is not None
        if isinstance(use.keep_mask, DropoutMask):
            row["seed"], row["step_site"] = use.keep_mask.key
            row["threshold"], row["first_run"] = use.keep_mask.threshold, sum(map(len, runs))
            runs.append(items_of.runs_of(use.keep_mask.positions_L))
            row["num_runs"] = len(runs[-1])
    for name in _GRADIENTS:
        rows[name] = -1
    sizes_U = rows["num_tokens"] * items_of.padded(rows["rank"])
    rows["shrunk"] = np.cumsum(sizes_U) - sizes_U
    return rows, np.concatenate(runs)


def num_shrunk(rows: Rows) -> int:
    """Elements of all shrunk rows S."""
    return int((rows["num_tokens"] * items_of.padded(rows["rank"])).sum())


def laid_out(rows: Rows, width_in: int, width_out: int, wanted: Sequence[Wanted]) -> tuple[Rows, int]:
    """(uses that know where in one float32 buffer their gradients go, the buffer's size). dB is there for dg, too."""
    rows, size = rows.copy(), 0
    for row, wants in zip(rows, wanted, strict=True):
        sizes = (row["rank"] * width_in, row["rank"] * width_out, row["rank"], width_out)
        flags = wants._replace(b=wants.b or wants.expand_gain)
        for name, num_floats, is_needed in zip(_GRADIENTS, sizes, flags, strict=True):
            if is_needed:
                row[name] = size
                size += int(num_floats)
    return rows, size


class LowRankProducts:
    """The products of one operator's uses on one stream. Factors are float32, contiguous along ranks or columns.

    Raises ValueError where a factor is not.
    """

    def __init__(
        self, launcher: Launcher, rows: Rows, runs: Rows, factors: Sequence[LowRank], dtype: torch.dtype
    ) -> None:
        self.launcher, self.rows, self.runs, self.factors, self.dtype = launcher, rows.copy(), runs, factors, dtype
        self.device = factors[0].a_RK.device
        self.width_in, self.width_out = factors[0].a_RK.shape[1], len(factors[0].b_NR)
        self.num_tokens_U, self.ranks_U = (rows[name].astype(np.int64) for name in ("num_tokens", "rank"))
        for row, low_rank in zip(self.rows, factors, strict=True):
            for name, factor in zip(("a", "b", "shrink_gain", "expand_gain"), low_rank, strict=True):
                row[name] = 0 if factor is None else _float32(factor).data_ptr()
            row["a_stride"], row["is_a_rank_major"] = _layout(low_rank.a_RK)
            row["b_stride"], row["is_b_rank_major"] = _layout(low_rank.b_NR.T)

    def forward(self, x_TK: torch.Tensor, y_TN: torch.Tensor) -> torch.Tensor:
        """Y += the low-rank products, in place. Returns S, which backward needs."""
        shrunk = torch.empty(num_shrunk(self.rows), dtype=self.dtype, device=x_TK.device)
        self._shrink(x_TK, shrunk, self.rows, is_input_side=True)
        self._expand(y_TN, shrunk, self.rows, is_input_side=False)
        return shrunk

    def backward(
        self,
        x_TK: torch.Tensor | None,
        dy_TN: torch.Tensor,
        shrunk: torch.Tensor,
        dx_TK: torch.Tensor | None,
        wanted: Sequence[Wanted],
    ) -> torch.Tensor:
        """dX += the low-rank products, in place, if there is one. Gradients of what is `wanted`, as `laid_out` tells.

        X must be there where a gradient of A is wanted.
        """
        rows, size = laid_out(self.rows, self.width_in, self.width_out, wanted)
        gradients = torch.empty(size, dtype=torch.float32, device=self.device)
        grown = torch.empty_like(shrunk)  # E
        self._shrink(dy_TN, grown, rows, is_input_side=False)
        outer = [w.b or w.expand_gain for w in wanted]
        self._outer(dy_TN, shrunk, gradients, rows, outer, is_input_side=False)
        self._gains(grown, shrunk, gradients, rows, wanted)
        if x_TK is not None:
            self._outer(x_TK, grown, gradients, rows, [w.a for w in wanted], is_input_side=True)
        if dx_TK is not None:
            self._expand(dx_TK, grown, rows, is_input_side=True)
        return gradients

    def _shrink(self, stream: torch.Tensor, shrunk: torch.Tensor, rows: Rows, *, is_input_side: bool) -> None:
        plan = self._plan(items_of.shrink_items, np.arange(len(rows)), stream.shape[1])
        shared = 5 * self._tile_bytes() + 16
        self._run("shrink", plan, rows, shared, stream=stream, shrunk=shrunk, is_input_side=is_input_side)

    def _expand(self, stream: torch.Tensor, shrunk: torch.Tensor, rows: Rows, *, is_input_side: bool) -> None:
        plan = self._plan(items_of.expand_items, np.arange(len(rows)), stream.shape[1])
        staged = _TILE * (_TILE * 4 + 16)
        shared = _TILE * (self.rank_capacity * self.dtype.itemsize + 16) + 2 * self._tile_bytes() + staged
        self._run("expand", plan, rows, shared, stream=stream, shrunk=shrunk, is_input_side=is_input_side)

    def _outer(
        self,
        stream: torch.Tensor,
        shrunk: torch.Tensor,
        gradients: torch.Tensor,
        rows: Rows,
        needed: Sequence[Any],
        *,
        is_input_side: bool,
    ) -> None:
        plan = self._plan(items_of.outer_items, np.flatnonzero(needed), stream.shape[1])
        shared = 2 * _STAGES * self._tile_bytes() + 16
        self._run(
            "outer", plan, rows, shared,
            stream=stream, shrunk=shrunk, gradients=gradients, is_input_side=is_input_side,
        )  # fmt: skip

    def _gains(
        self,
        grown: torch.Tensor,
        shrunk: torch.Tensor,
        gradients: torch.Tensor,
        rows: Rows,
        wanted: Sequence[Wanted],
    ) -> None:
        """dg, from dB without it, which dB then gets; dd, from E and S."""
        plan = self._plan(items_of.expand_gain_items, np.flatnonzero([w.expand_gain for w in wanted]), self.width_out)
        self._run("expand_gain", plan, rows, 0, gradients=gradients)
        plan = self._plan(items_of.shrink_gain_items, np.flatnonzero([w.shrink_gain for w in wanted]), 0)
        self._run("shrink_gain", plan, rows, 4 * 128, shrunk=grown, other=shrunk, gradients=gradients)

    @property
    def rank_capacity(self) -> int:
        return _TILE * max(1, -(-int(self.ranks_U.max(initial=0)) // _TILE))

    def _tile_bytes(self) -> int:
        return _TILE * (_TILE * self.dtype.itemsize + 16)

    def _run(
        self,
        name: str,
        plan: "_Plan",
        rows: Rows,
        shared_bytes: int,
        *,
        stream: torch.Tensor | None = None,
        shrunk: torch.Tensor | None = None,
        other: torch.Tensor | None = None,
        gradients: torch.Tensor | None = None,
        is_input_side: bool = False,
    ) -> None:
        if plan.num_items == 0:
            return
        uses, runs = self._upload(rows), self._upload(self.runs)
        partials = torch.empty(plan.num_partials, dtype=torch.float32, device=self.device)
        struct = pack(
            items_of.LAUNCH, uses=uses, runs=runs, items=plan.items, stream=stream, shrunk=shrunk, other=other,
            gradients=gradients, partials=partials, counters=plan.counters,
            stream_stride=0 if stream is None else stream.stride(0), num_items=plan.num_items, width=plan.width,
            is_input_side=is_input_side, rank_capacity=self.rank_capacity,
        )  # fmt: skip
        kernel = f"multi_lora_{name}" + ("" if name == "expand_gain" else f"_{SUFFIXES[self.dtype]}")
        factors = [factor for low_rank in self.factors for factor in low_rank]
        pointed = [stream, shrunk, other, gradients, partials, plan.counters, *factors]
        num_blocks = min(plan.num_items, _BLOCKS_PER_MULTIPROCESSOR * self.launcher.num_multiprocessors)
        self.launcher.launch(
            Kernel(SOURCE, kernel), num_blocks, shared_bytes, struct, [uses, runs, plan.items],
            [tensor for tensor in pointed if tensor is not None],
        )  # fmt: skip

    def _upload(self, rows: Rows) -> Table:
        key = ("table", rows.dtype.itemsize, rows.tobytes())
        return self.launcher.remembered(key, lambda: upload(rows, self.device))

    def _plan(self, make: Callable[..., Rows], chosen_C: NDArray[np.int64], width: int) -> "_Plan":
        tokens_C, ranks_C = self.num_tokens_U[chosen_C], self.ranks_U[chosen_C]
        key = (make.__name__, width, chosen_C.tobytes(), tokens_C.tobytes(), ranks_C.tobytes())
        return self.launcher.remembered(
            key, lambda: _Plan.of(make(tokens_C, ranks_C, width), width, chosen_C, ranks_C, self.device)
        )


@dataclass(frozen=True)
class _Plan:
    """Work items on the device, with the counters of their splits, which are zero between launches."""

    items: Table
    width: int
    num_items: int
    num_partials: int
    counters: torch.Tensor

    @classmethod
    def of(
        cls,
        items: Rows,
        width: int,
        chosen_C: NDArray[np.int64],
        ranks_C: NDArray[np.int64],
        device: torch.device,
    ) -> "_Plan":
        num_partials = items_of.partial_floats(items, ranks_C)
        counters = torch.zeros(int(items["counter"].max(initial=0)) + 1, dtype=torch.int32, device=device)
        items["use"] = chosen_C[items["use"]]
        return cls(upload(items, device), width, len(items), num_partials, counters)


def _float32(factor: torch.Tensor) -> torch.Tensor:
    if factor.dtype != torch.float32:
        raise ValueError(f"factors are float32, got {factor.dtype}")
    if factor.ndim == 1 and not factor.is_contiguous():
        raise ValueError("gains are contiguous")
    return factor


def _layout(factor_RW: torch.Tensor) -> tuple[int, bool]:
    """(elements from one row of memory to the next, whether such a row is one rank). Raises ValueError."""
    rank_stride, column_stride = factor_RW.stride()
    if column_stride == 1 or factor_RW.shape[1] == 1:
        return rank_stride, True
    if rank_stride == 1 or factor_RW.shape[0] == 1:
        return column_stride, False
    raise ValueError(f"a factor of strides {factor_RW.stride()} is contiguous neither along ranks nor along columns")
