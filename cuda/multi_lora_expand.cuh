// Expands S or E by a factor: sums over ranks and uses, written or added to the stream.
#pragma once
#include "multi_lora.cuh"

// A thread's sums of a 64 x 64 tile of expand: 16 columns of a token each, which one block of dropout lanes covers.
struct TokenRows {
    static constexpr int COUNT = TILE * (TILE / LANES) / THREADS;
    float v[COUNT][LANES];

    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < COUNT * LANES; ++i) v[i / LANES][i % LANES] = 0.0f;
    }
    static DEVICE int row(int i) { return (thread_index() + i * THREADS) / (TILE / LANES); }
    static DEVICE int column() { return thread_index() % (TILE / LANES) * LANES; }
};

// Adds a product of the tile's use, staged as floats, without the elements that its mask drops.
DEVICE void add_staged(TokenRows& sum, const float* staged, const LoraLaunch& launch, const LoraTile& ranks,
                       const LoraItem& item, int column, int columns) {
    const LoraUse& use = use_of(launch, ranks);
    const LoraFactors& factors = launch.factors[ranks.use[0]];
    const bool is_input = is_input_side(item), drops = is_input && use.threshold > 0;
    const DropoutKey key = is_input ? key_of(use, factors) : DropoutKey{0, 0, 0};
    const float scale = is_input ? keep_scale_of(use, factors) : factors.scale;
    const float* const gain = is_input ? nullptr : factors.expand_gain;
    const int first = TokenRows::column(), num_blocks = ceil_div(launch.streams[item.stream].width, LANES);
#pragma unroll
    for (int i = 0; i < TokenRows::COUNT; ++i) {
        const int token = item.token + TokenRows::row(i);
        if (token >= item.end_token || first >= columns) continue;
        u32 bits = ~0u;
        if (drops) {
            const u64 position = static_cast<u64>(launch.positions[token]);
            bits = keep_bits(key, position * num_blocks + (column + first) / LANES);
        }
        const float* from = staged + TokenRows::row(i) * row_stride<float>(TILE) + first;
#pragma unroll
        for (int j = 0; j < LANES; ++j) {
            if (!(bits >> j & 1) || first + j >= columns) continue;
            sum.v[i][j] += scale * (gain ? gain[column + first + j] : 1.0f) * from[j];
        }
    }
}

// Writes a finished tile to the stream: added to it, or to the bias.
template <typename T>
DEVICE void store_rows(const TokenRows& sum, const LoraLaunch& launch, const LoraItem& item, int column, int columns) {
    constexpr int V = vector_length<T>();
    const LoraStream& to_stream = launch.streams[item.stream];
    const Matrix<T> stream = stream_of<T>(launch, item.stream);
    const T* const bias = static_cast<const T*>(to_stream.bias);
    const bool adds = to_stream.adds != 0;
#pragma unroll
    for (int i = 0; i < TokenRows::COUNT; ++i) {
        const int token = item.token + TokenRows::row(i), first = TokenRows::column();
        if (token >= item.end_token) continue;
        T* const to = const_cast<T*>(stream.data) + token * stream.stride + column + first;
#pragma unroll
        for (int j = 0; j < LANES; j += V) {
            union {
                uint4 whole;
                T each[V];
            } y;
            const int valid = least(V, columns - first - j);
            if (valid <= 0) continue;
            const bool is_whole = stream.is_aligned && valid == V;
            if (is_whole && adds) y.whole = load_16(to + j);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                if (k >= valid) continue;
                float before = bias == nullptr ? 0.0f : to_float(bias[column + first + j + k]);
                if (adds) before = to_float(is_whole ? y.each[k] : to[j + k]);
                const T after = from_float<T>(before + sum.v[i][j + k]);
                (is_whole ? y.each[k] : to[j + k]) = after;
            }
            if (is_whole) store_16(to + j, y.whole);
        }
    }
}

DEVICE void stage(float* staged, const Accumulator<>& c) {
#pragma unroll
    for (int i = 0; i < PAIRS * 8; i += 2) {
        const int row = thread_index() / WARP * 16 + fragment_row(i % 4);
        const float(&v)[4] = c.v[i / 8][i / 4 % 2];
        store_two(staged + row * row_stride<float>(TILE) + fragment_column(i / 8, i / 4 % 2, i % 4), v[i % 4],
                  v[i % 4 + 1]);
    }
}

// Sums along the ranks of all the item's tiles: steps pass through them for 64 columns, then for the next 64.
template <typename T>
DEVICE void expand_item(const LoraLaunch& launch, const LoraItem& item) {
    T* const shrunk_tiles = reinterpret_cast<T*>(shared_memory());
    T* const factor_tiles = shrunk_tiles + 2 * tile_size<T>();
    float* const staged = reinterpret_cast<float*>(factor_tiles + 2 * tile_size<T>());
    const int rows = item.end_token - item.token, num_tiles = item.num_tiles;
    const int num_steps = num_tiles * ceil_div(item.end_column - item.column, TILE);
    const auto copy = [&](int step) {  // a single tile's rows are copied once
        if (num_tiles > 1 || step == 0)
            copy_shrunk(shrunk_tiles + (num_tiles > 1 ? step % 2 : 0) * tile_size<T>(), row_stride<T>(TILE),
                        launch.shrunk, launch, launch.tiles[item.tile + step % num_tiles], TILE, item.token, rows);
        cp_async_commit();
    };
    const auto factor_at = [&](int step) {
        return factor_of(launch, launch.tiles[item.tile + step % num_tiles], item.stream, Gain::RANK);
    };
    copy(0);
    FactorTile<T> next;
    next.fetch(factor_at(0), item.column);
    next.store(factor_tiles, factor_at(0));
    Accumulator<> c;
    c.clear();
    TokenRows sum;
    sum.clear();
    for (int step = 0; step < num_steps; ++step) {
        const int column = item.column + step / num_tiles * TILE, columns = least(TILE, item.end_column - column);
        const FactorView factor = factor_at(step);
        cp_async_wait<0>();
        block_barrier();
        if (step + 1 < num_steps) {
            copy(step + 1);
            next.fetch(factor_at(step + 1), item.column + (step + 1) / num_tiles * TILE);
        }
        multiply_tiles(c, shrunk_tiles + (num_tiles > 1 ? step % 2 : 0) * tile_size<T>(), row_stride<T>(TILE), true,
                       factor_tiles + step % 2 * tile_size<T>(), row_stride<T>(TILE), !factor.is_rank_major,
                       thread_index() / WARP * 16, num_pairs_of(factor.tile) * PAIR, ceil_div(columns, PAIR));
        if (step + 1 < num_steps) next.store(factor_tiles + (step + 1) % 2 * tile_size<T>(), factor_at(step + 1));
        if (!factor.tile.ends_sum) continue;
        stage(staged, c);
        block_barrier();
        c.clear();
        add_staged(sum, staged, launch, factor.tile, item, column, columns);
        if (step % num_tiles < num_tiles - 1) continue;
        store_rows<T>(sum, launch, item, column, columns);
        sum.clear();
    }
}

// Expands an item with tiles; rows of an item without tiles, which no use covers, get the bias or zero.
template <typename T>
DEVICE void expand_or_fill_item(const LoraLaunch& launch, const LoraItem& item) {
    if (item.num_tiles > 0) return expand_item<T>(launch, item);
    TokenRows nothing;
    nothing.clear();
    for (int column = item.column; column < item.end_column; column += TILE)
        store_rows<T>(nothing, launch, item, column, least(TILE, item.end_column - column));
}
