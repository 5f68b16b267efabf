"""Constants that the kernels in `cuda/` share with the Python that prepares their launches.

This is their only definition. Compilers get them as `macros()`; the CUDA source reads `TILE` as MUXTUNE_TILE.
"""

WARP = 32  # threads of a warp
THREADS = 128  # threads of every block
VECTOR_BYTES = 16  # of one access; also the padding of a tile's rows, so that a column's rows lie in different banks

TILE = 64  # tokens, columns or ranks of a tile in shared memory
PAIR = 16  # columns of an accumulator that are computed together
OCTET = 8  # ranks of one use side by side in a tile
STAGES = 3  # tiles on their way into shared memory
FLOAT_STAGES = 2  # the same of floats, which have twice the bytes: some architectures have 99 KB a block (sm_86, sm_89)
FACTOR_TILES = 2  # tiles of the operand that comes through registers: one is read while the next is written
ONE_PASS_RANKS = 32  # ranks up to which multi_lora sums E and dB in one pass over dY
MAX_OPERATORS = 8  # operators of one multi_lora call
DROPOUT_LANES = 16  # 16-bit lanes of one Philox block

# Blocks that fit a multiprocessor: the compiler bounds the registers, the launch fills the device.
MULTI_LORA_BLOCKS = 3
GROUPED_GEMM_BLOCKS = 3
MULTI_AFFINE_BLOCKS = 6
MULTI_ADAMW_BLOCKS = 8
MULTI_GRAD_NORM_BLOCKS = 8
SEGMENT_CROSS_ENTROPY_BLOCKS = 8


def macros() -> tuple[str, ...]:
    """Return the compiler's options that define every constant: -DMUXTUNE_TILE=64 and so on."""
    return tuple(f"-DMUXTUNE_{name}={value}" for name, value in globals().items() if name.isupper())
