// The low-rank products of many tasks on one packed stream: engine/kernels/multi_lora.py has the equations.
//
//     shrink:  S = drop(X) A^T           and, on the output side,  E = scale * (g o dY) B
//     expand:  Y += scale * g o ((d o S) B^T)                 and  dX += drop'((d o E) A)
//     outer:   dA = (d o E)^T drop(X)                         and  dB = scale * (g o dY)^T (d o S)
//     gains:   dd = sum(E o S)                                and  dg = scale * rowsum(B o (dY^T (d o S)))
// A block takes work items in turn. How a use is cut into items, and the order of every sum, depend on that use alone.
// Sums are floats, products run on tensor cores in the stream's type (float: three of tf32).
#include "multi_lora.cuh"

constexpr int STAGES = 3;
template <typename T>
constexpr DEVICE int tile_size() {
    return TILE * row_stride<T>(TILE);
}

template <typename T>
DEVICE Matrix<T> stream_of(const LoraLaunch& launch, const LoraUse& use) {
    return matrix(static_cast<const T*>(launch.stream) + use.start * launch.stream_stride, launch.stream_stride);
}
template <typename T>
DEVICE Matrix<T> shrunk_of(const LoraLaunch& launch, const LoraUse& use) {
    return matrix(static_cast<const T*>(launch.shrunk) + use.shrunk, padded(use.rank));
}

// [L, padded rank] of S or E, in T; columns beyond the rank are zero.
template <typename T>
DEVICE void store_shrunk(const Accumulator& c, const LoraLaunch& launch, const LoraUse& use, const LoraItem& item) {
    const float scale = launch.is_input_side ? (use.threshold ? use.keep_scale : 1.0f) : use.scale;
    T* to = static_cast<T*>(launch.shrunk) + use.shrunk;
    const int width = padded(use.rank);
#pragma unroll
    for (int i = 0; i < PAIRS * 8; i += 2) {
        const int pair = i / 8, half = i / 4 % 2;
        const int row = item.token + thread_index() / WARP * 16 + fragment_row(i % 4);
        const int rank = item.rank + fragment_column(pair, half, i % 4);
        const float(&v)[4] = c.v[pair][half];
        if (row < item.end_token && rank < width)
            store_two(to + static_cast<i64>(row) * width + rank, scale * v[i % 4], scale * v[i % 4 + 1]);
    }
}

template <typename T>
DEVICE void shrink_item(const LoraLaunch& launch, const LoraItem& item) {
    T* const stream_tiles = reinterpret_cast<T*>(shared_memory());
    T* const factor_tiles = stream_tiles + STAGES * tile_size<T>();
    int* const flag = reinterpret_cast<int*>(factor_tiles + 2 * tile_size<T>());
    const LoraUse& use = launch.uses[item.use];
    const Matrix<T> stream = stream_of<T>(launch, use);
    Factor factor = factor_of(launch, use);
    if (!launch.is_input_side) factor.column_gain = use.expand_gain;
    const int num_pairs = ceil_div(least(TILE, use.rank - item.rank), PAIR), rows = item.end_token - item.token;
    const int num_steps = ceil_div(item.end_column - item.column, TILE);
    const bool drops = launch.is_input_side && use.threshold > 0;
    const auto copy = [&](int step) {
        const int column = item.column + step * TILE;
        if (step < num_steps)
            copy_tile(stream_tiles + step % STAGES * tile_size<T>(), TILE, TILE, stream, item.token, column, rows,
                      item.end_column - column);
        cp_async_commit();
    };
    for (int step = 0; step < STAGES - 1; ++step) copy(step);
    FactorTile<T> next;
    next.fetch(factor, item.rank, item.column, num_pairs);
    next.store(factor_tiles, factor, num_pairs);
    Accumulator c;
    c.clear();
    for (int step = 0; step < num_steps; ++step) {
        T* const tile = stream_tiles + step % STAGES * tile_size<T>();
        const int column = item.column + step * TILE;
        cp_async_wait<STAGES - 2>();
        block_barrier();
        copy(step + STAGES - 1);
        if (step + 1 < num_steps) next.fetch(factor, item.rank, column + TILE, num_pairs);
        if (drops) {
            drop_tile(tile, use, launch.runs, launch.width, item.token, column, rows);
            block_barrier();
        }
        multiply_tiles(c, tile, row_stride<T>(TILE), true, factor_tiles + step % 2 * tile_size<T>(),
                       row_stride<T>(TILE), factor.is_rank_major, thread_index() / WARP * 16, TILE, num_pairs);
        if (step + 1 < num_steps) next.store(factor_tiles + (step + 1) % 2 * tile_size<T>(), factor, num_pairs);
    }
    if (combine_splits(c, launch, item, num_pairs, flag)) store_shrunk<T>(c, launch, use, item);
}

// Adds a finished tile, staged as floats, to the stream: 16 columns of one token at a time, so that one block of
// dropout lanes serves them.
template <typename T>
DEVICE void add_staged(const float* staged, const LoraLaunch& launch, const LoraUse& use, int token, int rows,
                       int column, int columns) {
    constexpr int V = vector_length<T>();
    const Matrix<T> stream = stream_of<T>(launch, use);
    const bool drops = launch.is_input_side && use.threshold > 0;
    const DropoutKey key{use.seed, use.step_site, use.threshold};
    const float scale = launch.is_input_side ? (drops ? use.keep_scale : 1.0f) : use.scale;
    const float* const gain = launch.is_input_side ? nullptr : use.expand_gain;
    for (int i = thread_index(); i < rows * (TILE / LANES); i += THREADS) {
        const int row = i / (TILE / LANES), first = i % (TILE / LANES) * LANES;
        if (first >= columns) continue;
        u32 bits = ~0u;
        if (drops) {
            const u64 position = position_of(launch.runs + use.first_run, use.num_runs, token + row);
            bits = keep_bits(key, position * ceil_div(launch.width, LANES) + (column + first) / LANES);
        }
        T* to = const_cast<T*>(stream.data) + (token + row) * stream.stride + column + first;
        const float* from = staged + row * row_stride<float>(TILE) + first;
#pragma unroll
        for (int j = 0; j < LANES; j += V) {
            union {
                uint4 whole;
                T each[V];
            } y;
            const int valid = least(V, columns - first - j);
            if (valid <= 0) break;
            const bool whole = stream.is_aligned && valid == V;
            if (whole) y.whole = load_16(to + j);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                if (k >= valid || !(bits >> (j + k) & 1)) continue;
                const float product = scale * (gain ? gain[column + first + j + k] : 1.0f) * from[j + k];
                const T sum = from_float<T>(to_float(whole ? y.each[k] : to[j + k]) + product);
                (whole ? y.each[k] : to[j + k]) = sum;
            }
            if (whole) store_16(to + j, y.whole);
        }
    }
}

template <typename T>
DEVICE void expand_item(const LoraLaunch& launch, const LoraItem& item) {
    const int shrunk_stride = row_stride<T>(launch.rank_capacity);
    T* const shrunk_tile = reinterpret_cast<T*>(shared_memory());
    T* const factor_tiles = shrunk_tile + TILE * shrunk_stride;
    float* const staged = reinterpret_cast<float*>(factor_tiles + 2 * tile_size<T>());
    const LoraUse& use = launch.uses[item.use];
    Factor factor = factor_of(launch, use);
    factor.rank_gain = use.shrink_gain;
    const int rows = item.end_token - item.token, num_chunks = ceil_div(use.rank, TILE);
    const int num_steps = num_chunks * ceil_div(item.end_column - item.column, TILE);
    const auto pairs_of = [&](int step) {  // of the factor as it is loaded: 16 ranks each
        return ceil_div(least(TILE, use.rank - step % num_chunks * TILE), PAIR);
    };
    copy_tile(shrunk_tile, launch.rank_capacity, TILE, shrunk_of<T>(launch, use), item.token, 0, rows,
              padded(use.rank));
    cp_async_commit();
    FactorTile<T> next;
    next.fetch(factor, 0, item.column, pairs_of(0));
    next.store(factor_tiles, factor, pairs_of(0));
    cp_async_wait<0>();
    block_barrier();
    Accumulator c;
    for (int step = 0; step < num_steps; ++step) {
        const int chunk = step % num_chunks, column = item.column + step / num_chunks * TILE;
        const int columns = least(TILE, item.end_column - column), num_pairs = ceil_div(columns, PAIR);
        const int next_column = item.column + (step + 1) / num_chunks * TILE;
        if (chunk == 0) c.clear();
        if (step + 1 < num_steps)
            next.fetch(factor, (step + 1) % num_chunks * TILE, next_column, pairs_of(step + 1));
        multiply_tiles(c, shrunk_tile + chunk * TILE, shrunk_stride, true, factor_tiles + step % 2 * tile_size<T>(),
                       row_stride<T>(TILE), !factor.is_rank_major, thread_index() / WARP * 16, pairs_of(step) * PAIR,
                       num_pairs);
        if (step + 1 < num_steps)
            next.store(factor_tiles + (step + 1) % 2 * tile_size<T>(), factor, pairs_of(step + 1));
        if (chunk == num_chunks - 1) {
#pragma unroll
            for (int i = 0; i < PAIRS * 8; i += 2) {
                const int row = thread_index() / WARP * 16 + fragment_row(i % 4);
                const float(&v)[4] = c.v[i / 8][i / 4 % 2];
                store_two(staged + row * row_stride<float>(TILE) + fragment_column(i / 8, i / 4 % 2, i % 4), v[i % 4],
                          v[i % 4 + 1]);
            }
            block_barrier();
            add_staged<T>(staged, launch, use, item.token, rows, column, columns);
        }
        block_barrier();
    }
}

// dA [R, K] or dB [N, R]. Where g is trained dB is left without it: `expand_gain_item` then needs it so.
DEVICE void store_outer(const Accumulator& c, const LoraLaunch& launch, const LoraUse& use, const LoraItem& item) {
    const bool input = launch.is_input_side != 0;
    const float scale = input ? (use.threshold ? use.keep_scale : 1.0f) : use.scale;
    const float* const column_gain = input || use.dg >= 0 ? nullptr : use.expand_gain;
#pragma unroll
    for (int i = 0; i < PAIRS * 8; ++i) {
        const int column = item.column + thread_index() / WARP * 16 + fragment_row(i % 4);
        const int rank = item.rank + fragment_column(i / 8, i / 4 % 2, i % 4);
        if (column >= item.end_column || rank >= use.rank) continue;
        float value = scale * c.v[i / 8][i / 4 % 2][i % 4];
        if (use.shrink_gain != nullptr) value *= use.shrink_gain[rank];
        if (column_gain != nullptr) value *= column_gain[column];
        if (input)
            launch.gradients[use.da + static_cast<i64>(rank) * launch.width + column] = value;
        else
            launch.gradients[use.db + static_cast<i64>(column) * use.rank + rank] = value;
    }
}

template <typename T>
DEVICE void outer_item(const LoraLaunch& launch, const LoraItem& item) {
    T* const stream_tiles = reinterpret_cast<T*>(shared_memory());
    T* const shrunk_tiles = stream_tiles + STAGES * tile_size<T>();
    int* const flag = reinterpret_cast<int*>(shrunk_tiles + STAGES * tile_size<T>());
    const LoraUse& use = launch.uses[item.use];
    const Matrix<T> stream = stream_of<T>(launch, use), shrunk = shrunk_of<T>(launch, use);
    const int num_pairs = ceil_div(least(TILE, use.rank - item.rank), PAIR);
    const int num_steps = ceil_div(item.end_token - item.token, TILE);
    const bool drops = launch.is_input_side && use.threshold > 0;
    const auto copy = [&](int step) {
        const int token = item.token + step * TILE, rows = item.end_token - token, at = step % STAGES * tile_size<T>();
        if (step < num_steps) {
            copy_tile(stream_tiles + at, TILE, TILE, stream, token, item.column, rows, item.end_column - item.column);
            copy_tile(shrunk_tiles + at, TILE, TILE, shrunk, token, item.rank, rows, padded(use.rank) - item.rank);
        }
        cp_async_commit();
    };
    for (int step = 0; step < STAGES - 1; ++step) copy(step);
    Accumulator c;
    c.clear();
    for (int step = 0; step < num_steps; ++step) {
        const int at = step % STAGES * tile_size<T>(), token = item.token + step * TILE;
        cp_async_wait<STAGES - 2>();
        block_barrier();
        copy(step + STAGES - 1);
        if (drops) {
            drop_tile(stream_tiles + at, use, launch.runs, launch.width, token, item.column,
                      least(TILE, item.end_token - token));
            block_barrier();
        }
        multiply_tiles(c, stream_tiles + at, row_stride<T>(TILE), false, shrunk_tiles + at, row_stride<T>(TILE), false,
                       thread_index() / WARP * 16, TILE, num_pairs);
    }
    if (combine_splits(c, launch, item, num_pairs, flag)) store_outer(c, launch, use, item);
}

// dd of 32 ranks: a lane a rank, each warp every fourth token.
template <typename T>
DEVICE void shrink_gain_item(const LoraLaunch& launch, const LoraItem& item) {
    float* const sums = reinterpret_cast<float*>(shared_memory());
    const LoraUse& use = launch.uses[item.use];
    const int warp = thread_index() / WARP, rank = item.rank + thread_index() % WARP;
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

// dg of some outputs, a warp each; dB gets the gain that `outer_item` left out.
DEVICE void expand_gain_item(const LoraLaunch& launch, const LoraItem& item) {
    const LoraUse& use = launch.uses[item.use];
    const int lane = thread_index() % WARP;
    for (int column = item.column + thread_index() / WARP; column < item.end_column; column += WARPS) {
        float* const db = launch.gradients + use.db + static_cast<i64>(column) * use.rank;
        float sum = 0.0f;
        for (int rank = lane; rank < use.rank; rank += WARP) {
            const i64 at = use.is_b_rank_major ? rank * use.b_stride + column : column * use.b_stride + rank;
            sum += use.b[at] * db[rank];
            db[rank] *= use.expand_gain[column];
        }
        for (int mask = WARP / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (lane == 0) launch.gradients[use.dg + column] = sum;
    }
}

#define MULTI_LORA_KERNEL(name, run_item)                                      \
    KERNEL(name, LoraLaunch, 3) {                                              \
        for (int i = block_index(); i < launch.num_items; i += num_blocks()) { \
            run_item(launch, launch.items[i]);                                 \
            block_barrier(); /* the next item's tiles take this one's place */ \
        }                                                                      \
    }
#define MULTI_LORA_KERNELS(suffix, T)                           \
    MULTI_LORA_KERNEL(multi_lora_shrink_##suffix, shrink_item<T>) \
    MULTI_LORA_KERNEL(multi_lora_expand_##suffix, expand_item<T>) \
    MULTI_LORA_KERNEL(multi_lora_outer_##suffix, outer_item<T>)   \
    MULTI_LORA_KERNEL(multi_lora_shrink_gain_##suffix, shrink_gain_item<T>)

MULTI_LORA_KERNELS(bf16, bf16)
MULTI_LORA_KERNELS(fp16, fp16)
MULTI_LORA_KERNELS(fp32, float)
MULTI_LORA_KERNEL(multi_lora_expand_gain, expand_gain_item)
