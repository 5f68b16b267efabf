"""Launches grouped_gemm's products on a device: cuda/grouped_gemm.cu, which declares the same structs.

Legend: M rows, N columns, D depth of one product; U products.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.kernels.constants import FACTOR_TILES, GROUPED_GEMM_BLOCKS, PAIR, STAGES, THREADS, TILE, VECTOR_BYTES
from engine.kernels.launch import POINTER, SUFFIXES, DeviceTable, Kernel, Launcher, pack, struct_of

SPLIT_DEPTH = 1024  # terms summed by one item
USE = struct_of(
    [(name, POINTER) for name in ("a", "b", "bias", "c")]
    + [("a_stride", np.int64), ("b_stride", np.int64)]
    + [(name, np.int32) for name in ("rows", "columns", "depth", "is_a_row_major", "is_b_row_major")]
    + [("scale", np.float32)]
)
ITEM = struct_of(
    [(name, np.int32) for name in ("use", "row", "column", "depth", "end_depth", "split", "num_splits", "counter")]
    + [("partial", np.int64)]
)
LAUNCH = struct_of(
    [(name, POINTER) for name in ("uses", "items", "partials", "counters")]
    + [("num_items", np.int32), ("unused", np.int32)]
)
_FLAG_BYTES = 16


@dataclass(frozen=True)
class MatrixProduct:
    """C [M, N] = scale (A [M, D] B [D, N] + bias [N]), where C is dense, and A and B are dense along one dimension."""

    a_MD: torch.Tensor
    b_DN: torch.Tensor
    c_MN: torch.Tensor
    scale: float
    bias_N: torch.Tensor | None = None


def launch_products(launcher: Launcher, products: Sequence[MatrixProduct]) -> None:
    """Compute all products in one launch. All A have one type; either B is float32 and C of A's type, or vice versa.

    Raises ValueError for other types.
    """
    if not products:
        return
    dtype, device = products[0].a_MD.dtype, products[0].a_MD.device
    is_forward = products[0].c_MN.dtype == dtype
    b_dtype, c_dtype = (torch.float32, dtype) if is_forward else (dtype, torch.float32)
    rows = np.zeros(len(products), USE)
    for row, product in zip(rows, products, strict=True):
        if (product.a_MD.dtype, product.b_DN.dtype, product.c_MN.dtype) != (dtype, b_dtype, c_dtype):
            raise ValueError(f"A, B and C must be {dtype}, {b_dtype} and {c_dtype}, got {product.b_DN.dtype} for B")
        row["a"], row["b"], row["c"] = (t.data_ptr() for t in (product.a_MD, product.b_DN, product.c_MN))
        row["bias"] = 0 if product.bias_N is None else product.bias_N.data_ptr()
        row["a_stride"], row["is_a_row_major"] = _layout(product.a_MD)
        row["b_stride"], row["is_b_row_major"] = _layout(product.b_DN.T)
        (row["rows"], row["columns"]), row["depth"] = product.c_MN.shape, product.a_MD.shape[1]
        row["scale"] = product.scale
    shapes_U3 = np.stack([rows[name] for name in ("rows", "columns", "depth")], axis=1).astype(np.int64)
    plan = launcher.get_or_create(
        ("grouped_gemm", shapes_U3.tobytes()), lambda: _GroupedGemmPlan.of(shapes_U3, launcher)
    )
    if not plan.num_items:
        return
    uses = launcher.get_or_create(("grouped_gemm uses", rows.tobytes()), lambda: launcher.upload(rows))
    partials = torch.empty(plan.num_partials, dtype=torch.float32, device=device)
    struct = pack(
        LAUNCH, uses=uses, items=plan.items, partials=partials, counters=plan.counters, num_items=plan.num_items,
        unused=0,
    )  # fmt: skip
    shared_bytes = (STAGES + FACTOR_TILES) * TILE * (TILE * dtype.itemsize + VECTOR_BYTES) + _FLAG_BYTES
    num_blocks = min(plan.num_items, GROUPED_GEMM_BLOCKS * launcher.num_multiprocessors)
    kernel = Kernel("grouped_gemm.cu", f"grouped_gemm_{'' if is_forward else 'weights_'}{SUFFIXES[dtype]}")
    operands = [tensor for p in products for tensor in (p.a_MD, p.b_DN, p.c_MN, p.bias_N) if tensor is not None]
    pointed = [partials, plan.counters, *operands]
    launcher.launch(kernel, num_blocks, shared_bytes, struct, [uses, plan.items], pointed)


def work_items(shapes_U3: NDArray[np.int64]) -> tuple[NDArray[np.void], int, int]:
    """Return (items, counters, floats of all partial sums) of products (M, N, D).

    An item is a tile of C; the depth is split every SPLIT_DEPTH. A product of depth 0 has one that writes zeros.
    """
    tiles_U3 = -(-shapes_U3 // np.array([TILE, TILE, SPLIT_DEPTH]))
    tiles_U3[:, 2] = np.maximum(1, tiles_U3[:, 2])
    sizes_U = tiles_U3.prod(axis=1)
    use = np.repeat(np.arange(len(shapes_U3)), sizes_U)
    place = np.arange(len(use)) - np.repeat(np.cumsum(sizes_U) - sizes_U, sizes_U)
    rest, split = np.divmod(place, tiles_U3[use, 2])
    row, column = np.divmod(rest, tiles_U3[use, 1])
    items = np.zeros(len(use), ITEM)
    items["use"], items["row"], items["column"] = use, row * TILE, column * TILE
    items["depth"] = split * SPLIT_DEPTH
    items["end_depth"] = np.minimum((split + 1) * SPLIT_DEPTH, shapes_U3[use, 2])
    items["split"], items["num_splits"] = split, tiles_U3[use, 2]
    num_pairs = -(-np.minimum(TILE, shapes_U3[use, 1] - items["column"]) // PAIR)
    is_first = (split == 0) & (items["num_splits"] > 1)
    floats = np.where(items["num_splits"] > 1, items["num_splits"] * num_pairs * 2 * THREADS * 4, 0).astype(np.int64)
    ends = np.cumsum(np.where(is_first, floats, 0))
    items["counter"], items["partial"] = np.maximum(np.cumsum(is_first) - 1, 0), ends - floats
    return items, int(is_first.sum()), int(ends[-1]) if len(ends) else 0


@dataclass(frozen=True)
class _GroupedGemmPlan:
    """Work items on the device. The counters of split tiles are zero between launches."""

    items: DeviceTable
    num_items: int
    num_partials: int
    counters: torch.Tensor

    @classmethod
    def of(cls, shapes_U3: NDArray[np.int64], launcher: Launcher) -> "_GroupedGemmPlan":
        items, num_counters, num_partials = work_items(shapes_U3)
        counters = torch.zeros(num_counters + 1, dtype=torch.int32, device=launcher.device)
        return cls(launcher.upload(items), len(items), num_partials, counters)


def _layout(matrix: torch.Tensor) -> tuple[int, bool]:
    """Return (elements from one line of memory to the next, whether a line is a row). Raises ValueError."""
    row_stride, column_stride = matrix.stride()
    if column_stride == 1 or matrix.shape[1] == 1:
        return row_stride, True
    if row_stride == 1 or matrix.shape[0] == 1:
        return column_stride, False
    raise ValueError(f"a matrix must be dense along one dimension, got strides {matrix.stride()}")
