"""The structs that multi_lora's kernels read, as cuda/multi_lora.cuh declares them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.kernels.constants import MAX_OPERATORS, OCTET, TILE
from engine.kernels.launch import POINTER, struct_of

OCTETS = TILE // OCTET

Ints = NDArray[np.int64]
Rows = NDArray[Any]


def _all(names: str, kind: Any) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


USE = struct_of(
    [
        *_all("start num_tokens rank op threshold unused", np.int32),
        *_all("shrunk da db dd dg", np.int64),
    ]
)
FACTORS = struct_of(
    [
        *_all("a b shrink_gain expand_gain step", POINTER),
        *_all("seed", np.uint64),
        *_all("site a_stride b_stride", np.int64),
        *_all("scale keep_scale", np.float32),
        *_all("is_a_rank_major is_b_rank_major", np.int32),
    ]
)
RANKS = struct_of([*_all("use rank", (np.int32, OCTETS)), *_all("num_octets ends_sum", np.int32)])
SPLIT = struct_of([*_all("index count counter unused", np.int32), *_all("partial", np.int64)])
ITEM = struct_of(
    [*_all("tile num_tiles stream unused token end_token column end_column", np.int32), *_all("sum outer", SPLIT)]
)
STREAM = struct_of([*_all("data bias", POINTER), *_all("stride", np.int64), *_all("width adds", np.int32)])
LAUNCH = struct_of(
    [
        *_all("uses factors positions tiles items shrunk other gradients partials counters", POINTER),
        *_all("num_items unused", np.int32),
        *_all("streams", (STREAM, MAX_OPERATORS + 1)),
    ]
)


def padded(ranks_U: Sequence[int] | Ints) -> Ints:
    """Return the width of S's rows: ranks rounded up to whole octets."""
    return -(-np.asarray(ranks_U, np.int64) // OCTET) * OCTET
