"""multi_lora's products on a device: cuda/multi_lora.cu, launched over the uses of one operator.

Bytes beside the base operator's, at rank R: X, dY and X again read once each (X only where A is trained, dY a second
time where B is); Y and dX read and written; S and E, R / K of X. Partial sums: R / 512 of what each
shrink or outer reads.
Legend: T tokens, K inputs, N outputs, W columns of a stream, R rank, U uses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.kernels import multi_lora_items as items_of
from engine.kernels.dropout import DropoutMask
from engine.kernels.launch import SUFFIXES, Kernel, Launcher, Table, pack, upload

SOURCE = "multi_lora.cu"
_STAGES, _TILE = 3, items_of.TILE
_BLOCKS_PER_MULTIPROCESSOR = 3
Makes = Callable[..., NDArray[Any]]


@dataclass(frozen=True)
class Use:
    """A task's adapter on tokens [start, end): float32 factors, each contiguous along ranks or along columns."""

    start: int
    end: int
    scale: float
    dropout: DropoutMask | None
    keep_scale: float
    a_RK: torch.Tensor
    b_NR: torch.Tensor
    shrink_gain_R: torch.Tensor | None
    expand_gain_N: torch.Tensor | None


@dataclass(frozen=True)
class Wanted:
    """Which gradients of a use are wanted."""

    a: bool
    b: bool
    shrink_gain: bool
    expand_gain: bool


class LowRankProducts:
    """The products of one operator's uses on one stream. `tables` are made once for equal uses."""

    def __init__(self, launcher: Launcher, uses: Sequence[Use], widths: tuple[int, int], dtype: torch.dtype) -> None:
        self.launcher, self.uses, self.dtype = launcher, uses, dtype
        self.width_in, self.width_out = widths
        self.num_tokens_U = np.array([use.end - use.start for use in uses], np.int64)
        self.ranks_U = np.array([use.a_RK.shape[0] for use in uses], np.int64)
        self.device = uses[0].a_RK.device
        sizes_U = self.num_tokens_U * items_of.padded(self.ranks_U)
        self.shrunk_U = np.cumsum(sizes_U) - sizes_U
        self.num_shrunk = int(sizes_U.sum())
        self.rows, self.runs = self._describe()

    def _describe(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """(uses, runs of positions) as structs."""
        rows = np.zeros(len(self.uses), items_of.USE)
        rows["num_tokens"], rows["rank"], rows["shrunk"] = self.num_tokens_U, self.ranks_U, self.shrunk_U
        runs = [np.zeros(0, items_of.RUN)]
        for row, use in zip(rows, self.uses, strict=True):
            row["start"], row["scale"], row["keep_scale"] = use.start, use.scale, use.keep_scale
            row["a"], row["b"] = use.a_RK.data_ptr(), use.b_NR.data_ptr()
            for name, gain in (("shrink_gain", use.shrink_gain_R), ("expand_gain", use.expand_gain_N)):
                row[name] = 0 if gain is None else gain.data_ptr()
            (row["a_stride"], row["is_a_rank_major"]) = _layout(use.a_RK)
            (row["b_stride"], row["is_b_rank_major"]) = _layout(use.b_NR.T)
            if use.dropout is not None:
                row["seed"], row["step_site"] = use.dropout.key
                row["threshold"] = use.dropout.threshold
                row["first_run"] = sum(map(len, runs))
                runs.append(items_of.runs_of(use.dropout.positions_L))
                row["num_runs"] = len(runs[-1])
        for name in ("da", "db", "dd", "dg"):
            rows[name] = -1
        return rows, np.concatenate(runs)

    def forward(self, x_TK: torch.Tensor, y_TN: torch.Tensor) -> torch.Tensor:
        """Y += the low-rank products, in place. Returns S, which backward needs."""
        shrunk = torch.empty(self.num_shrunk, dtype=self.dtype, device=x_TK.device)
        self._shrink(x_TK, shrunk, is_input_side=True, scratch=self.rows)
        self._expand(y_TN, shrunk, is_input_side=False, rows=self.rows)
        return shrunk

    def backward(
        self,
        x_TK: torch.Tensor | None,
        dy_TN: torch.Tensor,
        shrunk: torch.Tensor,
        dx_TK: torch.Tensor | None,
        wanted: Sequence[Wanted],
    ) -> list[list[torch.Tensor | None]]:
        """dX += the low-rank products, in place, if there is one. For each use: gradients of A, B, d and g, or None."""
        rows, gradients, views = self._gradient_buffer(wanted)
        grown = torch.empty_like(shrunk)  # E
        need_outer = [w.b or w.expand_gain for w in wanted]
        self._shrink(dy_TN, grown, is_input_side=False, scratch=rows)
        self._outer(dy_TN, shrunk, gradients, rows, need_outer, is_input_side=False)
        if any(w.expand_gain for w in wanted):
            chosen = self._chosen([w.expand_gain for w in wanted])
            self._run("expand_gain", items_of.expand_gain_items, chosen, self.width_out, rows, gradients=gradients)
        if any(w.shrink_gain for w in wanted):
            chosen = self._chosen([w.shrink_gain for w in wanted])
            self._run(
                "shrink_gain", items_of.shrink_gain_items, chosen, self.width_in, rows,
                shrunk=grown, other=shrunk, gradients=gradients,
            )  # fmt: skip
        if x_TK is not None:
            self._outer(x_TK, grown, gradients, rows, [w.a for w in wanted], is_input_side=True)
        if dx_TK is not None:
            self._expand(dx_TK, grown, is_input_side=True, rows=rows)
        return views

    def _gradient_buffer(
        self, wanted: Sequence[Wanted]
    ) -> tuple[NDArray[Any], torch.Tensor, list[list[torch.Tensor | None]]]:
        """(uses that know where their gradients go, one buffer for all, views of it)."""
        rows, size = self.rows.copy(), 0
        places: list[list[tuple[int, torch.Size] | None]] = []
        for row, use, wants in zip(rows, self.uses, wanted, strict=True):
            shapes = [use.a_RK.shape, use.b_NR.shape, use.a_RK.shape[:1], use.b_NR.shape[:1]]
            needed = [wants.a, wants.b or wants.expand_gain, wants.shrink_gain, wants.expand_gain]
            own: list[tuple[int, torch.Size] | None] = []
            for name, shape, is_needed in zip(("da", "db", "dd", "dg"), shapes, needed, strict=True):
                if is_needed:
                    row[name] = size
                    own.append((size, shape))
                    size += shape.numel()
                else:
                    own.append(None)
            places.append(own if wants.b else [own[0], None, *own[2:]])
        gradients = torch.empty(size, dtype=torch.float32, device=self.device)
        views = [
            [None if at is None else gradients[at[0] : at[0] + at[1].numel()].view(at[1]) for at in own]
            for own in places
        ]
        return rows, gradients, views

    def _shrink(self, stream: torch.Tensor, shrunk: torch.Tensor, *, is_input_side: bool, scratch: Any) -> None:
        every = self._chosen([True] * len(self.uses))
        shared = 5 * self._tile_bytes() + 16
        self._run(
            "shrink", items_of.shrink_items, every, stream.shape[1], scratch, shared,
            stream=stream, shrunk=shrunk, is_input_side=is_input_side,
        )  # fmt: skip

    def _expand(self, stream: torch.Tensor, shrunk: torch.Tensor, *, is_input_side: bool, rows: Any) -> None:
        every = self._chosen([True] * len(self.uses))
        size = self.dtype.itemsize
        shared = _TILE * (self.rank_capacity * size + 16) + 2 * self._tile_bytes() + _TILE * (_TILE * 4 + 16)
        self._run(
            "expand", items_of.expand_items, every, stream.shape[1], rows, shared,
            stream=stream, shrunk=shrunk, is_input_side=is_input_side,
        )  # fmt: skip

    def _outer(
        self,
        stream: torch.Tensor,
        shrunk: torch.Tensor,
        gradients: torch.Tensor,
        rows: Any,
        needed: Sequence[bool],
        *,
        is_input_side: bool,
    ) -> None:
        if any(needed):
            self._run(
                "outer", items_of.outer_items, self._chosen(needed), stream.shape[1], rows,
                2 * _STAGES * self._tile_bytes() + 16,
                stream=stream, shrunk=shrunk, gradients=gradients, is_input_side=is_input_side,
            )  # fmt: skip

    @property
    def rank_capacity(self) -> int:
        return _TILE * max(1, -(-int(self.ranks_U.max(initial=0)) // _TILE))

    def _tile_bytes(self) -> int:
        return _TILE * (_TILE * self.dtype.itemsize + 16)

    def _chosen(self, flags: Sequence[bool]) -> NDArray[np.int64]:
        return np.flatnonzero(flags)

    def _run(
        self,
        name: str,
        make: Makes,
        chosen_C: NDArray[np.int64],
        width: int,
        rows: NDArray[Any],
        shared_bytes: int = 4 * 128,
        *,
        stream: torch.Tensor | None = None,
        shrunk: torch.Tensor | None = None,
        other: torch.Tensor | None = None,
        gradients: torch.Tensor | None = None,
        is_input_side: bool = False,
    ) -> None:
        plan = self._plan(make, chosen_C, width)
        if plan.num_items == 0:
            return
        uses, runs = self._upload(rows), self._upload(self.runs)
        partials = torch.empty(plan.num_partials, dtype=torch.float32, device=self.device)
        struct = pack(
            items_of.LAUNCH, uses=uses, runs=runs, items=plan.items, stream=stream, shrunk=shrunk, other=other,
            gradients=gradients, partials=partials, counters=plan.counters,
            stream_stride=0 if stream is None else stream.stride(0), num_items=plan.num_items, width=width,
            is_input_side=is_input_side, rank_capacity=self.rank_capacity,
        )  # fmt: skip
        kernel = f"multi_lora_{name}" + ("" if name == "expand_gain" else f"_{SUFFIXES[self.dtype]}")
        pointed = [t for t in (stream, shrunk, other, gradients, partials, plan.counters) if t is not None]
        factors = [t for use in self.uses for t in (use.a_RK, use.b_NR, use.shrink_gain_R, use.expand_gain_N)]
        num_blocks = min(plan.num_items, _BLOCKS_PER_MULTIPROCESSOR * self.launcher.num_multiprocessors)
        self.launcher.launch(
            Kernel(SOURCE, kernel), num_blocks, shared_bytes, struct, [uses, runs, plan.items],
            pointed + [t for t in factors if t is not None],
        )  # fmt: skip

    def _upload(self, rows: NDArray[Any]) -> Table:
        key = ("table", str(self.device), rows.dtype.itemsize, rows.tobytes())
        return self.launcher.remembered(key, lambda: upload(rows, self.device))

    def _plan(self, make: Makes, chosen_C: NDArray[np.int64], width: int) -> "_Plan":
        tokens_C, ranks_C = self.num_tokens_U[chosen_C], self.ranks_U[chosen_C]
        key = (make.__name__, width, chosen_C.tobytes(), tokens_C.tobytes(), ranks_C.tobytes())
        return self.launcher.remembered(
            key, lambda: _Plan.of(make(tokens_C, ranks_C, width), chosen_C, ranks_C, self.device)
        )


@dataclass(frozen=True)
class _Plan:
    """Work items on the device, with the counters of their splits, which are zero between launches."""

    items: Table
    num_items: int
    num_partials: int
    counters: torch.Tensor

    @classmethod
    def of(
        cls, items: NDArray[Any], chosen_C: NDArray[np.int64], ranks_C: NDArray[np.int64], device: torch.device
    ) -> "_Plan":
        num_partials = items_of.partial_floats(items, ranks_C)
        counters = torch.zeros(int(items["counter"].max(initial=0)) + 1, dtype=torch.int32, device=device)
        items = items.copy()
        items["use"] = chosen_C[items["use"]]
        return cls(upload(items, device), len(items), num_partials, counters)


def _layout(factor_RW: torch.Tensor) -> tuple[int, bool]:
    """(elements from one row of memory to the next, whether such a row is one rank). Raises ValueError."""
    if factor_RW.dtype != torch.float32:
        raise ValueError(f"factors are float32, got {factor_RW.dtype}")
    rank_stride, column_stride = factor_RW.stride()
    if column_stride == 1 or factor_RW.shape[1] == 1:
        return rank_stride, True
    if rank_stride == 1 or factor_RW.shape[0] == 1:
        return column_stride, False
    raise ValueError(f"a factor of strides {factor_RW.stride()} is contiguous neither along ranks nor along columns")
