"""Launches multi_lora's products on a device: cuda/multi_lora.cu, over the uses of a group of operators.

Bytes beside the base operators', at rank R: X is read once for S of all members and once more for dA, as far as their
ranks fit one tile (`rank_tiles`); each dY once for E and dB up to rank 32, twice beyond, once if no B is
trained. Y_i is written once if the base product accumulates onto it (`accumulates_into_base_gemm`), else read and
written; dX is written once for all members. S and E are R / K of X. Partial sums: `work_items`.
Legend: T tokens, K inputs, N outputs, R rank, S streams.
"""

from collections.abc import Sequence

import numpy as np
import torch

from engine.kernels.constants import MAX_OPERATORS, MULTI_LORA_BLOCKS
from engine.kernels.launch import SUFFIXES, DeviceTable, Kernel, Launcher, pack
from engine.kernels.multi_lora.launch_plan import KernelWork, LaunchPlan
from engine.kernels.multi_lora.structs import LAUNCH, STREAM, Rows

SOURCE = "multi_lora.cu"
_MIN_ACCUMULATING_WIDTH = 1024


def accumulates_into_base_gemm(width_in: int, has_bias: bool) -> bool:
    """Return whether the low-rank products are written first and the base product accumulates onto them (beta = 1).

    Otherwise they are added to its result. If written first, Y passes through memory once in our kernel instead of
    twice. The base product then reads it, which costs nothing while it is bound by arithmetic: it does 2 K operations
    for each element of 2 bytes, and a GPU does about 300 operations in the time of a byte, so from K of some hundreds
    on. The operands' own bytes, shared by a tile of 128, come on top: 1024. This is not measured yet:
    benchmarks/bench_multi_lora.py times both.

    Only the shape decides, never the number of rows with an adapter: a task's bits would depend on its neighbours. With
    a bias cuBLAS would use another product (one that adds the bias) for the same rows as soon as no task has an adapter
    there, and the bits of a task without one would change, so it never accumulates.
    """
    return width_in >= _MIN_ACCUMULATING_WIDTH and not has_bias


class GroupProducts:
    """The products of a group's uses on one stream.

    `table`: their factors with addresses, which point into the tensors `factors`. `positions_T` int64: positions of the
    stream's tokens in their tasks' own streams, for dropout.
    """

    def __init__(
        self,
        launcher: Launcher,
        plan: LaunchPlan,
        table: DeviceTable,
        factors: Sequence[torch.Tensor],
        dtype: torch.dtype,
        positions_T: torch.Tensor | None = None,
    ) -> None:
        self.launcher, self.plan, self.table, self.factors, self.dtype = launcher, plan, table, list(factors), dtype
        self.positions_T = positions_T

    def shrink(self, x_TK: torch.Tensor) -> torch.Tensor:
        """Return S of all uses, which backward needs."""
        shrunk = torch.empty(self.plan.num_shrunk, dtype=self.dtype, device=x_TK.device)
        self._run("shrink", self.plan.shrink_input, [x_TK], shrunk=shrunk)
        return shrunk

    def write(
        self, ys: Sequence[torch.Tensor | None], biases: Sequence[torch.Tensor | None], shrunk: torch.Tensor
    ) -> None:
        """Write Y_i = b_i + the low-rank products, for each Y that is not None, in all rows."""
        self._expand(ys, biases, shrunk, adds=False)

    def add(self, ys: Sequence[torch.Tensor | None], shrunk: torch.Tensor) -> None:
        """Add the low-rank products to each Y_i that is not None, in place."""
        self._expand(ys, [], shrunk, adds=True)

    def backward(
        self, x_TK: torch.Tensor | None, dys: Sequence[torch.Tensor], shrunk: torch.Tensor, dx_TK: torch.Tensor | None
    ) -> torch.Tensor:
        """Return all gradients that have a place in the plan's uses, and write dX, if there is one.

        dX gets the low-rank part alone. A gradient of A needs X.
        """
        plan, streams = self.plan, [None, *dys]
        gradients = torch.empty(plan.num_gradients, dtype=torch.float32, device=shrunk.device)
        e = torch.empty_like(shrunk)
        self._run("shrink_outer", plan.shrink_outer, streams, shrunk=e, other=shrunk, gradients=gradients)
        self._run("shrink", plan.shrink_output, streams, shrunk=e)
        self._run("outer", plan.outer_output, streams, other=shrunk, gradients=gradients)
        self._run("expand_gain", plan.expand_gain, [], gradients=gradients)
        self._run("shrink_gain", plan.shrink_gain, [], shrunk=e, other=shrunk, gradients=gradients)
        if x_TK is not None:
            self._run("outer", plan.outer_input, [x_TK], shrunk=e, gradients=gradients)
        if dx_TK is not None:
            self._run("expand", plan.expand_input, [dx_TK], shrunk=e)
        return gradients

    def _expand(
        self,
        ys: Sequence[torch.Tensor | None],
        biases: Sequence[torch.Tensor | None],
        shrunk: torch.Tensor,
        *,
        adds: bool,
    ) -> None:
        ops = tuple(index for index, y_TN in enumerate(ys) if y_TN is not None)
        if ops:
            work = self.plan.expand_output(ops, adds)
            self._run("expand", work, [None, *ys], biases=[None, *biases], adds=adds, shrunk=shrunk)

    def _run(
        self,
        name: str,
        work: KernelWork,
        streams: Sequence[torch.Tensor | None],
        *,
        biases: Sequence[torch.Tensor | None] = (),
        adds: bool = False,
        shrunk: torch.Tensor | None = None,
        other: torch.Tensor | None = None,
        gradients: torch.Tensor | None = None,
    ) -> None:
        if work.num_items == 0:
            return
        device = self.plan.device
        partials = torch.empty(work.num_partials, dtype=torch.float32, device=device) if work.num_partials else None
        counters = self._counters(work.num_counters) if work.num_counters else None
        struct = pack(
            LAUNCH, uses=self.plan.uses, factors=self.table, positions=self.positions_T, tiles=work.tiles,
            items=work.items, shrunk=shrunk, other=other, gradients=gradients, partials=partials, counters=counters,
            num_items=work.num_items, unused=0, streams=self._streams(streams, biases, adds),
        )  # fmt: skip
        kernel = f"multi_lora_{name}" + ("" if name == "expand_gain" else f"_{SUFFIXES[self.dtype]}")
        pointed = [*streams, *biases, shrunk, other, gradients, partials, counters, self.positions_T, *self.factors]
        tables = [self.plan.uses, self.table, work.items, *([work.tiles] if work.tiles else [])]
        self.launcher.launch(
            Kernel(SOURCE, kernel), min(work.num_items, MULTI_LORA_BLOCKS * self.launcher.num_multiprocessors),
            work.shared_bytes, struct, tables, [tensor for tensor in pointed if tensor is not None],
        )  # fmt: skip

    def _streams(
        self, streams: Sequence[torch.Tensor | None], biases: Sequence[torch.Tensor | None], adds: bool
    ) -> Rows:
        rows = np.zeros(MAX_OPERATORS + 1, STREAM)
        for index, stream in enumerate(streams):
            if stream is not None:
                bias = biases[index] if index < len(biases) else None
                bias_address = 0 if bias is None else bias.data_ptr()
                rows[index] = (stream.data_ptr(), bias_address, stream.stride(0), stream.shape[1], adds)
        if not streams:  # expand_gain and shrink_gain read none
            return rows
        rows["width"][: len(self.plan.widths_S)] = self.plan.widths_S
        return rows

    def _counters(self, count: int) -> torch.Tensor:
        """Return counters of split sums, zero between launches."""
        key = ("counters", -(-count // 1024))
        return self.launcher.get_or_create(
            key, lambda: torch.zeros(1024 * key[1], dtype=torch.int32, device=self.plan.device)
        )


def add_addresses(rows: Rows, factors: Sequence[torch.Tensor], steps: Sequence[torch.Tensor]) -> Rows:
    """Add addresses to described factors: of the flat `factors`, and of the `steps` of uses with dropout.

    Raises ValueError for factors that are not float32, or gains that are not contiguous.
    """
    rows, factor, step = rows.copy(), iter(factors), iter(steps)
    for row in rows:
        for name in ("a", "b", "shrink_gain", "expand_gain"):
            row[name] = _float32(next(factor)).data_ptr() if row[name] else 0
        row["step"] = next(step).data_ptr() if row["step"] else 0
    return rows


def _float32(factor: torch.Tensor) -> torch.Tensor:
    if factor.dtype != torch.float32:
        raise ValueError(f"factors must be float32, got {factor.dtype}")
    if factor.ndim == 1 and not factor.is_contiguous():
        raise ValueError("gains must be contiguous")
    return factor
