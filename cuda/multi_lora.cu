// Low-rank products of many tasks on one packed stream, for operators that read the same X. The equations are in
// engine/kernels/multi_lora/dispatch.py.
//
//     shrink:        S = drop(X) A^T of all operators from one pass over X;   E = scale * (g o dY) B
//     expand:        Y = b + delta, or Y += delta, delta = scale * g o ((d o S) B^T);   dX = sum of drop'((d o E) A)
//     outer:         dA = (d o E)^T drop(X) of all operators from one pass over X;   dB = scale * (g o dY)^T (d o S)
//     shrink_outer:  E and dB from one pass over dY
//     gains:         dd = sum(E o S);   dg = scale * rowsum(B o (dY^T (d o S)))
// A block runs work items in turn. How a use is cut into items, and the order of every sum, depend on that use alone:
// an element of a product does not depend on where in a tile it is computed.
// Sums are floats, products run on tensor cores in the stream's type (float: three of tf32).
#include "multi_lora_expand.cuh"

// Stores S or E as T; columns beyond the rank are zero.
template <typename T, int P>
DEVICE void store_shrunk(const Accumulator<P>& c, const LoraLaunch& launch, const LoraTile& tile, bool is_input,
                         int token, int end_token) {
#pragma unroll
    for (int octet = 0; octet < 2 * P; ++octet) {
        if (octet >= tile.num_octets) continue;
        const LoraUse& use = launch.uses[tile.use[octet]];
        const LoraFactors& factors = launch.factors[tile.use[octet]];
        const float scale = is_input ? keep_scale_of(use, factors) : factors.scale;
        const float(&v)[4] = c.v[octet / 2][octet % 2];
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const int row = token + thread_index() / WARP * 16 + fragment_row(i);
            if (row >= end_token) continue;
            T* to = shrunk_row<T>(launch.shrunk, use, row, tile.rank[octet]) + fragment_column(0, 0, i);
            store_two(to, scale * v[i], scale * v[i + 1]);
        }
    }
}

template <typename T>
DEVICE void shrink_item(const LoraLaunch& launch, const LoraItem& item) {
    constexpr int STAGES = stages<T>();
    T* const stream_tiles = reinterpret_cast<T*>(shared_memory());
    T* const factor_tiles = stream_tiles + STAGES * tile_size<T>();
    int* const flag = reinterpret_cast<int*>(factor_tiles + 2 * tile_size<T>());
    const LoraTile& ranks = launch.tiles[item.tile];
    const LoraUse& use = use_of(launch, ranks);
    const bool is_input = is_input_side(item), drops = is_input && use.threshold > 0;
    const DropoutKey key = is_input ? key_of(use, launch.factors[ranks.use[0]]) : DropoutKey{0, 0, 0};
    const Matrix<T> stream = stream_of<T>(launch, item.stream);
    const FactorView factor = factor_of(launch, ranks, item.stream, is_input ? Gain::NONE : Gain::COLUMN);
    const int num_pairs = num_pairs_of(ranks), rows = item.end_token - item.token;
    const int num_steps = ceil_div(item.end_column - item.column, TILE);
    const auto copy = [&](int step) {
        const int column = item.column + step * TILE;
        if (step < num_steps)
            copy_tile(stream_tiles + step % STAGES * tile_size<T>(), TILE, TILE, stream, item.token, column, rows,
                      item.end_column - column);
        cp_async_commit();
    };
    for (int step = 0; step < STAGES - 1; ++step) copy(step);
    FactorTile<T> next;
    next.fetch(factor, item.column);
    next.store(factor_tiles, factor);
    Accumulator<> c;
    c.clear();
    for (int step = 0; step < num_steps; ++step) {
        T* const tile = stream_tiles + step % STAGES * tile_size<T>();
        const int column = item.column + step * TILE;
        cp_async_wait<STAGES - 2>();
        block_barrier();
        copy(step + STAGES - 1);
        if (step + 1 < num_steps) next.fetch(factor, column + TILE);
        if (drops) {
            drop_tile(tile, key, launch.positions, factor.width, item.token, column, rows);
            block_barrier();
        }
        multiply_tiles(c, tile, row_stride<T>(TILE), true, factor_tiles + step % 2 * tile_size<T>(),
                       row_stride<T>(TILE), factor.is_rank_major, thread_index() / WARP * 16, TILE, num_pairs);
        if (step + 1 < num_steps) next.store(factor_tiles + (step + 1) % 2 * tile_size<T>(), factor);
    }
    if (combine_splits(c, launch, item.sum, 0, num_pairs, flag))
        store_shrunk<T>(c, launch, ranks, is_input, item.token, item.end_token);
}

// Stores dA [R, K] or dB [N, R]. If g is trained, dB is stored without it, as `expand_gain_item` needs it.
template <int P>
DEVICE void store_outer(const Accumulator<P>& c, const LoraLaunch& launch, const LoraTile& tile, int stream, int first,
                        int end_column) {
    const bool input = stream == 0;
    const int width = launch.streams[stream].width;
#pragma unroll
    for (int octet = 0; octet < 2 * P; ++octet) {
        if (octet >= tile.num_octets) continue;
        const LoraUse& use = launch.uses[tile.use[octet]];
        const LoraFactors& factors = launch.factors[tile.use[octet]];
        const float scale = input ? keep_scale_of(use, factors) : factors.scale;
        const float* const column_gain = input || use.dg >= 0 ? nullptr : factors.expand_gain;
        const float(&v)[4] = c.v[octet / 2][octet % 2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = first + thread_index() / WARP * 16 + fragment_row(i);
            const int rank = tile.rank[octet] + fragment_column(0, 0, i);
            if (column >= end_column || rank >= use.rank) continue;
            float value = scale * v[i];
            if (factors.shrink_gain != nullptr) value *= factors.shrink_gain[rank];
            if (column_gain != nullptr) value *= column_gain[column];
            if (input)
                launch.gradients[use.da + static_cast<i64>(rank) * width + column] = value;
            else
                launch.gradients[use.db + static_cast<i64>(column) * use.rank + rank] = value;
        }
    }
}

template <typename T>
DEVICE void outer_item(const LoraLaunch& launch, const LoraItem& item) {
    constexpr int STAGES = stages<T>();
    T* const stream_tiles = reinterpret_cast<T*>(shared_memory());
    T* const shrunk_tiles = stream_tiles + STAGES * tile_size<T>();
    int* const flag = reinterpret_cast<int*>(shrunk_tiles + STAGES * tile_size<T>());
    const LoraTile& ranks = launch.tiles[item.tile];
    const LoraUse& use = use_of(launch, ranks);
    const bool is_input = is_input_side(item), drops = is_input && use.threshold > 0;
    const DropoutKey key = is_input ? key_of(use, launch.factors[ranks.use[0]]) : DropoutKey{0, 0, 0};
    const Matrix<T> stream = stream_of<T>(launch, item.stream);
    const int num_pairs = num_pairs_of(ranks), width = launch.streams[item.stream].width;
    const int num_steps = ceil_div(item.end_token - item.token, TILE);
    const auto copy = [&](int step) {
        const int token = item.token + step * TILE, rows = item.end_token - token, at = step % STAGES * tile_size<T>();
        if (step < num_steps) {
            copy_tile(stream_tiles + at, TILE, TILE, stream, token, item.column, rows, item.end_column - item.column);
            copy_shrunk(shrunk_tiles + at, row_stride<T>(TILE), is_input ? launch.shrunk : launch.other, launch, ranks,
                        TILE, token, rows);
        }
        cp_async_commit();
    };
    for (int step = 0; step < STAGES - 1; ++step) copy(step);
    Accumulator<> c;
    c.clear();
    for (int step = 0; step < num_steps; ++step) {
        const int at = step % STAGES * tile_size<T>(), token = item.token + step * TILE;
        cp_async_wait<STAGES - 2>();
        block_barrier();
        copy(step + STAGES - 1);
        if (drops) {
            drop_tile(stream_tiles + at, key, launch.positions, width, token, item.column,
                      least(TILE, item.end_token - token));
            block_barrier();
        }
        multiply_tiles(c, stream_tiles + at, row_stride<T>(TILE), false, shrunk_tiles + at, row_stride<T>(TILE), false,
                       thread_index() / WARP * 16, TILE, num_pairs);
    }
    if (combine_splits(c, launch, item.sum, 0, num_pairs, flag))
        store_outer(c, launch, ranks, item.stream, item.column, item.end_column);
}

constexpr int ONE_PASS_PAIRS = MUXTUNE_ONE_PASS_RANKS / PAIR;  // more ranks take two passes

// One pass over dY [tokens x columns] of one use. dB of 64 columns is summed in registers along the tokens; E of all
// the item's tokens in shared memory along the columns, where each thread stores its own fragments.
template <typename T>
struct ShrinkOuter {
    static constexpr int STAGES = stages<T>();
    const LoraLaunch& launch;
    const LoraItem& item;
    const LoraTile& ranks;
    const FactorView factor;
    const int num_pairs, num_rows, num_row_tiles, num_steps, shrunk_stride;
    T *const stream_tiles, *const factor_tiles, *const shrunk;
    float4* const sums;
    int* const flag;

    DEVICE T* stream_tile(int step) const { return stream_tiles + step % STAGES * tile_size<T>(); }
    DEVICE T* factor_tile(int step) const { return factor_tiles + step / num_row_tiles % 2 * tile_size<T>(); }
    DEVICE int column(int step) const { return item.column + step / num_row_tiles * TILE; }

    DEVICE void copy(int step) const {
        const int first = step % num_row_tiles * TILE;
        if (step < num_steps)
            copy_tile(stream_tile(step), TILE, TILE, stream_of<T>(launch, item.stream), item.token + first,
                      column(step), num_rows - first, item.end_column - column(step));
        cp_async_commit();
    }
    // Adds 64 columns to E of one tile of tokens; after the last columns E is stored.
    DEVICE void add_to_e(int step) const {
        const int row_tile = step % num_row_tiles, first = item.token + row_tile * TILE;
        float4* const partial = sums + row_tile * 2 * num_pairs * THREADS + thread_index();
        Accumulator<ONE_PASS_PAIRS> e;
        e.clear();
        if (step >= num_row_tiles) add_partial(e, partial, num_pairs);
        multiply_tiles(e, stream_tile(step), row_stride<T>(TILE), true, factor_tile(step), row_stride<T>(TILE),
                       factor.is_rank_major, thread_index() / WARP * 16, TILE, num_pairs);
        if (step + num_row_tiles < num_steps)
            store_partial(partial, e, num_pairs);
        else if (combine_splits(e, launch, item.sum, row_tile, num_pairs, flag))
            store_shrunk<T>(e, launch, ranks, false, first, least(first + TILE, item.end_token));
    }
    DEVICE void run() const {
        copy_shrunk(shrunk, shrunk_stride, launch.other, launch, ranks, num_row_tiles * TILE, item.token, num_rows);
        for (int step = 0; step < STAGES - 1; ++step) copy(step);
        FactorTile<T, ONE_PASS_PAIRS> next;
        next.fetch(factor, item.column);
        next.store(factor_tiles, factor);
        Accumulator<ONE_PASS_PAIRS> db;
        db.clear();
        for (int step = 0; step < num_steps; ++step) {
            const int row_tile = step % num_row_tiles;
            const bool is_last = row_tile == num_row_tiles - 1, has_next = step + num_row_tiles < num_steps;
            cp_async_wait<STAGES - 2>();
            block_barrier();
            copy(step + STAGES - 1);
            if (row_tile == 0 && has_next) next.fetch(factor, column(step) + TILE);
            multiply_tiles(db, stream_tile(step), row_stride<T>(TILE), false, shrunk + row_tile * TILE * shrunk_stride,
                           shrunk_stride, false, thread_index() / WARP * 16, TILE, num_pairs);
            add_to_e(step);
            if (!is_last) continue;
            if (has_next) next.store(factor_tile(step + 1), factor);
            if (combine_splits(db, launch, item.outer, step / num_row_tiles, num_pairs, flag))
                store_outer(db, launch, ranks, item.stream, column(step), item.end_column);
            db.clear();
        }
    }
};

template <typename T>
DEVICE void shrink_outer_item(const LoraLaunch& launch, const LoraItem& item) {
    const LoraTile& ranks = launch.tiles[item.tile];
    const int num_pairs = num_pairs_of(ranks), num_rows = item.end_token - item.token;
    const int num_row_tiles = ceil_div(num_rows, TILE), stride = row_stride<T>(num_pairs * PAIR);
    T* const stream_tiles = reinterpret_cast<T*>(shared_memory());
    T* const factor_tiles = stream_tiles + stages<T>() * tile_size<T>();
    T* const shrunk = factor_tiles + 2 * tile_size<T>();
    float4* const sums = reinterpret_cast<float4*>(shrunk + num_row_tiles * TILE * stride);
    int* const flag = reinterpret_cast<int*>(sums + num_row_tiles * 2 * num_pairs * THREADS);
    ShrinkOuter<T>{launch, item, ranks, factor_of(launch, ranks, item.stream, Gain::COLUMN), num_pairs, num_rows,
                   num_row_tiles, num_row_tiles * ceil_div(item.end_column - item.column, TILE), stride, stream_tiles,
                   factor_tiles, shrunk, sums, flag}
        .run();
}

// Sums dd of 32 ranks from `item.column` on of use `item.tile`: a lane for each rank, a warp for every fourth token.
template <typename T>
DEVICE void shrink_gain_item(const LoraLaunch& launch, const LoraItem& item) {
    float* const sums = reinterpret_cast<float*>(shared_memory());
    const LoraUse& use = launch.uses[item.tile];
    const int warp = thread_index() / WARP, rank = item.column + thread_index() % WARP;
    const T* const e = static_cast<const T*>(launch.shrunk) + use.shrunk;
    const T* const s = static_cast<const T*>(launch.other) + use.shrunk;
    const i64 width = padded(use.rank), end = use.num_tokens * width;
    float sum = 0.0f;
    if (rank < use.rank)
        for (i64 i = warp * width + rank; i < end; i += WARPS * width) sum += to_float(e[i]) * to_float(s[i]);
    sums[thread_index()] = sum;
    block_barrier();
    if (warp == 0 && rank < use.rank) {
        for (int other = 1; other < WARPS; ++other) sum += sums[other * WARP + thread_index()];
        launch.gradients[use.dd + rank] = sum;
    }
}

// Sums dg of some outputs of use `item.tile`, a warp for each; multiplies dB by the gain that `store_outer` left out.
DEVICE void expand_gain_item(const LoraLaunch& launch, const LoraItem& item) {
    const LoraUse& use = launch.uses[item.tile];
    const LoraFactors& factors = launch.factors[item.tile];
    const int lane = thread_index() % WARP;
    for (int column = item.column + thread_index() / WARP; column < item.end_column; column += WARPS) {
        float* const db = launch.gradients + use.db + static_cast<i64>(column) * use.rank;
        float sum = 0.0f;
        for (int rank = lane; rank < use.rank; rank += WARP) {
            const i64 stride = factors.b_stride;
            sum += factors.b[factors.is_b_rank_major ? rank * stride + column : column * stride + rank] * db[rank];
            db[rank] *= factors.expand_gain[column];
        }
        for (int mask = WARP / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (lane == 0) launch.gradients[use.dg + column] = sum;
    }
}

#define MULTI_LORA_KERNEL(name, run_item)                                      \
    KERNEL(name, LoraLaunch, MUXTUNE_MULTI_LORA_BLOCKS) {                      \
        for (int i = block_index(); i < launch.num_items; i += num_blocks()) { \
            run_item(launch, launch.items[i]);                                 \
            block_barrier(); /* the next item reuses the shared memory */      \
        }                                                                      \
    }
#define MULTI_LORA_KERNELS(suffix, T)                                      \
    MULTI_LORA_KERNEL(multi_lora_shrink_##suffix, shrink_item<T>)          \
    MULTI_LORA_KERNEL(multi_lora_expand_##suffix, expand_or_fill_item<T>)  \
    MULTI_LORA_KERNEL(multi_lora_outer_##suffix, outer_item<T>)            \
    MULTI_LORA_KERNEL(multi_lora_shrink_outer_##suffix, shrink_outer_item<T>) \
    MULTI_LORA_KERNEL(multi_lora_shrink_gain_##suffix, shrink_gain_item<T>)

MULTI_LORA_KERNELS(bf16, bf16)
MULTI_LORA_KERNELS(fp16, fp16)
MULTI_LORA_KERNELS(fp32, float)
MULTI_LORA_KERNEL(multi_lora_expand_gain, expand_gain_item)
