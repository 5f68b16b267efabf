// Products of many tasks in one launch, each of its own shape: engine/kernels/grouped_gemm.py has the equations.
//
//     forward, dX:   C_u = scale_u (A_u B_u + bias_u)    A and C in the stream's type, B float
//     dW, db:        C_u = scale_u A_u B_u               A and B in the stream's type, C float
// A block runs work items in turn. How a product is cut into items, and the order of every sum, depend on it alone.
#include "tile.cuh"

constexpr int STAGES = MUXTUNE_STAGES;

// C [rows x columns], dense, of A [rows x depth] and B [depth x columns].
struct GemmUse {
    const void *a, *b;
    const float* bias;  // may be null
    void* c;
    i64 a_stride, b_stride;  // elements from one line of memory to the next
    int rows, columns, depth;
    int is_a_row_major, is_b_row_major;  // whether a line of memory runs along the depth
    float scale;
};

// A tile of C, over a part of the depth.
struct GemmItem {
    int use, row, column, depth, end_depth;
    int split, num_splits, counter;
    i64 partial;  // floats before the tile's partial sums
};

struct GemmLaunch {
    const GemmUse* uses;
    const GemmItem* items;
    float* partials;
    int* counters;
    int num_items, unused;
};

template <typename C>
DEVICE void store_product(const Accumulator<>& c, const GemmUse& use, const GemmItem& item) {
    C* const to = static_cast<C*>(use.c);
    const bool stores_two = use.columns % 2 == 0 && reinterpret_cast<u64>(to) % (2 * sizeof(C)) == 0;
#pragma unroll
    for (int i = 0; i < PAIRS * 8; i += 2) {
        const int row = item.row + thread_index() / WARP * 16 + fragment_row(i % 4);
        const int column = item.column + fragment_column(i / 8, i / 4 % 2, i % 4);
        if (row >= use.rows || column >= use.columns) continue;
        const bool has_second = column + 1 < use.columns;
        const float(&v)[4] = c.v[i / 8][i / 4 % 2];
        const float first = use.scale * (v[i % 4] + (use.bias != nullptr ? use.bias[column] : 0.0f));
        const float second =
            use.scale * (v[i % 4 + 1] + (use.bias != nullptr && has_second ? use.bias[column + 1] : 0.0f));
        C* const at = to + static_cast<i64>(row) * use.columns + column;
        if (stores_two) {
            store_two(at, first, second);
        } else {
            at[0] = from_float<C>(first);
            if (has_second) at[1] = from_float<C>(second);
        }
    }
}

template <typename T, typename B, typename C>
DEVICE void gemm_item(const GemmLaunch& launch, const GemmItem& item) {
    T* const a_tiles = reinterpret_cast<T*>(shared_memory());
    T* const b_tiles = a_tiles + STAGES * tile_size<T>();
    int* const flag = reinterpret_cast<int*>(b_tiles + 2 * tile_size<T>());
    const GemmUse& use = launch.uses[item.use];
    const Matrix<T> a = matrix(static_cast<const T*>(use.a), use.a_stride);
    const Matrix<B> b = matrix(static_cast<const B*>(use.b), use.b_stride);
    const int rows = use.rows - item.row, columns = use.columns - item.column;
    const int num_steps = ceil_div(item.end_depth - item.depth, TILE), num_pairs = ceil_div(least(TILE, columns), PAIR);
    const auto copy = [&](int step) {
        const int depth = item.depth + step * TILE, left = item.end_depth - depth;
        T* const tile = a_tiles + step % STAGES * tile_size<T>();
        if (step < num_steps && use.is_a_row_major) copy_tile(tile, TILE, TILE, a, item.row, depth, rows, left);
        if (step < num_steps && !use.is_a_row_major) copy_tile(tile, TILE, TILE, a, depth, item.row, left, rows);
        cp_async_commit();
    };
    StagedTile<T, B> next;
    const auto fetch = [&](int step) {
        const int depth = item.depth + step * TILE, left = item.end_depth - depth;
        if (use.is_b_row_major)
            next.fetch(b, item.column, depth, columns, left);
        else
            next.fetch(b, depth, item.column, left, columns);
    };
    for (int step = 0; step < STAGES - 1; ++step) copy(step);
    if (num_steps > 0) {
        fetch(0);
        next.store(b_tiles);
    }
    Accumulator<> c;
    c.clear();
    for (int step = 0; step < num_steps; ++step) {
        cp_async_wait<STAGES - 2>();
        block_barrier();
        copy(step + STAGES - 1);
        if (step + 1 < num_steps) fetch(step + 1);
        multiply_tiles(c, a_tiles + step % STAGES * tile_size<T>(), row_stride<T>(TILE), use.is_a_row_major != 0,
                       b_tiles + step % 2 * tile_size<T>(), row_stride<T>(TILE), use.is_b_row_major != 0,
                       thread_index() / WARP * 16, TILE, num_pairs);
        if (step + 1 < num_steps) next.store(b_tiles + (step + 1) % 2 * tile_size<T>());
    }
    if (sum_splits(c, launch.partials + item.partial, item.split, item.num_splits, launch.counters + item.counter,
                   num_pairs, flag))
        store_product<C>(c, use, item);
}

#define GROUPED_GEMM_KERNEL(name, T, B, C)                                     \
    KERNEL(name, GemmLaunch, MUXTUNE_GROUPED_GEMM_BLOCKS) {                    \
        for (int i = block_index(); i < launch.num_items; i += num_blocks()) { \
            gemm_item<T, B, C>(launch, launch.items[i]);                       \
            block_barrier(); /* the next item reuses the shared memory */      \
        }                                                                      \
    }
GROUPED_GEMM_KERNEL(grouped_gemm_bf16, bf16, float, bf16)
GROUPED_GEMM_KERNEL(grouped_gemm_fp16, fp16, float, fp16)
GROUPED_GEMM_KERNEL(grouped_gemm_fp32, float, float, float)
GROUPED_GEMM_KERNEL(grouped_gemm_weights_bf16, bf16, bf16, float)
GROUPED_GEMM_KERNEL(grouped_gemm_weights_fp16, fp16, fp16, float)
