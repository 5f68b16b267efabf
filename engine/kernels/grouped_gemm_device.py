"""grouped_gemm's products on a device: cuda/grouped_gemm.cu. Structs as declared there.

Legend: M rows, N columns, D depth of one product; U products.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.kernels.launch import POINTER, SUFFIXES, THREADS, Kernel, Launcher, Table, pack, struct_of

TILE, PAIR = 64, 16  # of rows and columns: cuda/tile.cuh
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
_STAGES, _B_TILES, _BLOCKS_PER_MULTIPROCESSOR = 3, 2, 3


@dataclass(frozen=True)
class Product:
    """C [M, N] = scale (A [M, D] B [D, N] + bias [N]): C dense; A and B dense along one of their dimensions."""

    a_MD: torch.Tensor
    b_DN: torch.Tensor
    c_MN: torch.Tensor
    scale: float
    bias_N: torch.Tensor | None = None


def launched(launcher: Launcher, products: Sequence[Product]) -> None:
    """All of them, in one launch: A of one type; B float32 and C of A's, or B of A's and C float32.

    Raises ValueError where they are not.
    """
    if not products:
        return
    dtype, where = products[0].a_MD.dtype, products[0].a_MD.device
    is_forward = products[0].c_MN.dtype == dtype
    b_dtype, c_dtype = (torch.float32, dtype) if is_forward else (dtype, torch.float32)
    rows = np.zeros(len(products), USE)
    for row, product in zip(rows, products, strict=True):
        if (product.a_MD.dtype, product.b_DN.dtype, product.c_MN.dtype) != (dtype, b_dtype, c_dtype):
            raise ValueError(f"A, B and C are {dtype}, {b_dtype} and {c_dtype}, got {product.b_DN.dtype} for B")
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
    partials = torch.empty(plan.num_partials, dtype=torch.float32, device=where)
    struct = pack(
        LAUNCH, uses=uses, items=plan.items, partials=partials, counters=plan.counters, num_items=plan.num_items,
        unused=0,
    )  # fmt: skip
    shared_bytes = (_STAGES + _B_TILES) * TILE * (TILE * dtype.itemsize + 16) + 16
    num_blocks = min(plan.num_items, _BLOCKS_PER_MULTIPROCESSOR * launcher.num_multiprocessors)
    kernel = Kernel("grouped_gemm.cu", f"grouped_gemm_{'' if is_forward else 'weights_'}{SUFFIXES[dtype]}")
    own = [(p.a_MD, p.b_DN, p.c_MN, p.bias_N) for p in products]
    pointed = [partials, plan.counters, *(tensor for each in own for tensor in each if tensor is not None)]
    launcher.launch(kernel, num_blocks, shared_bytes, struct, [uses, plan.items], pointed)


def work_items(shapes_U3: NDArray[np.int64]) -> tuple[NDArray[np.void], int, int]:
    """(items, counters, floats of all partial sums) of products (M, N, D): tiles of C, the depth cut by SPLIT_DEPTH.

    A product of depth 0 has zeros written.
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
    """Work items on the device, with the counters of split tiles, which are zero between launches."""

    items: Table
    num_items: int
    num_partials: int
    counters: torch.Tensor

    @classmethod
    def of(cls, shapes_U3: NDArray[np.int64], launcher: Launcher) -> "_GroupedGemmPlan":
        items, num_counters, num_partials = work_items(shapes_U3)
        counters = torch.zeros(num_counters + 1, dtype=torch.int32, device=launcher.device)
        return cls(launcher.upload(items), len(items), num_partials, counters)


def _layout(matrix: torch.Tensor) -> tuple[int, bool]:
    """(elements from one line of memory to the next, whether a line is one row). Raises ValueError."""
    row_stride, column_stride = matrix.stride()
    if column_stride == 1 or matrix.shape[1] == 1:
        return row_stride, True
    if row_stride == 1 or matrix.shape[0] == 1:
        return column_stride, False
    raise ValueError(f"a matrix of strides {matrix.stride()} is dense along neither dimension")
