// The structs of a launch of multi_lora, as engine/kernels/multi_lora/structs.py packs them, and its tiles.
//
// Legend: T tokens, W columns of a stream (K inputs or N outputs), R rank, L tokens of one use.
#pragma once
#include "philox.cuh"
#include "tile.cuh"

constexpr int OCTET = MUXTUNE_OCTET, OCTETS = TILE / OCTET;  // ranks of one use side by side; octets of a tile
constexpr int MAX_OPERATORS = MUXTUNE_MAX_OPERATORS;         // of a group

// One task's adapter of one operator, used on the task's tokens [start, start + num_tokens) of the stream.
struct LoraUse {
    int start, num_tokens, rank, op;
    int threshold, unused;  // of its dropout; 0: none
    i64 shrunk;             // elements before this use's [L, padded rank] in the shrunk rows
    i64 da, db, dd, dg;     // floats before each gradient; -1: none
};

// The factors of a use. The dropout's step is read from device memory, so that a captured graph sees it change.
struct LoraFactors {
    const float *a, *b, *shrink_gain, *expand_gain;  // gains may be null
    const i64* step;
    u64 seed;
    i64 site, a_stride, b_stride;
    float scale, keep_scale;
    int is_a_rank_major, is_b_rank_major;  // whether a row of memory is one rank
};

// Tiles on their way into shared memory.
template <typename T>
constexpr DEVICE int stages() {
    return sizeof(T) == 4 ? MUXTUNE_FLOAT_STAGES : MUXTUNE_STAGES;
}

// Up to 64 ranks of uses on the same tokens: octet i holds eight of `use[i]` from `rank[i]` on. All have one layout in
// memory, and either none has dropout or all belong to one use. `ends_sum`: the next tile of an item has another mask.
struct LoraTile {
    int use[OCTETS], rank[OCTETS];
    int num_octets, ends_sum;
};

// An item's part of a sum that several items share: the last of them to finish adds the parts up.
struct LoraSplit {
    int index, count, counter, unused;
    i64 partial;  // floats before the partial sums
};

// One block's work: tiles [tile, tile + num_tiles) on tokens and columns of one stream.
struct LoraItem {
    int tile, num_tiles, stream, unused;
    int token, end_token, column, end_column;
    LoraSplit sum, outer;  // `outer`: of dB, where E and dB are summed by one item
};

struct LoraStream {
    void* data;        // [T, W]
    const void* bias;  // [W], or null
    i64 stride;
    int width, adds;  // whether expand adds to the stream, or overwrites it
};

struct LoraLaunch {
    const LoraUse* uses;
    const LoraFactors* factors;
    const i64* positions;  // [T], of each token in its task's own stream; null where nothing is dropped
    const LoraTile* tiles;
    const LoraItem* items;
    void* shrunk;       // S or E: [L, padded rank] of each use
    const void* other;  // S, beside E
    float* gradients;
    float* partials;
    int* counters;
    int num_items, unused;
    LoraStream streams[MAX_OPERATORS + 1];  // X or dX, and of each operator Y or dY
};

DEVICE int padded(int rank) { return ceil_div(rank, OCTET) * OCTET; }
// The input side has A with X or dX and dropout; the output side B with Y or dY and scale.
DEVICE bool is_input_side(const LoraItem& item) { return item.stream == 0; }
DEVICE int num_pairs_of(const LoraTile& tile) { return ceil_div(tile.num_octets * OCTET, PAIR); }
DEVICE const LoraUse& use_of(const LoraLaunch& launch, const LoraTile& tile) { return launch.uses[tile.use[0]]; }
template <typename T>
DEVICE Matrix<T> stream_of(const LoraLaunch& launch, int stream) {
    const LoraStream& s = launch.streams[stream];
    return matrix(static_cast<const T*>(s.data), s.stride);
}
// Returns the row of S or E of a token of the stream, from the octet's first rank on.
template <typename T>
DEVICE T* shrunk_row(const void* shrunk, const LoraUse& use, i64 token, int rank) {
    return static_cast<T*>(const_cast<void*>(shrunk)) + use.shrunk + (token - use.start) * padded(use.rank) + rank;
}
DEVICE float keep_scale_of(const LoraUse& use, const LoraFactors& factors) {
    return use.threshold ? factors.keep_scale : 1.0f;
}

// The ranks of A or B in one tile, [64 ranks x W], in either layout. Gains are multiplied in as it is loaded.
struct FactorView {
    const LoraLaunch& launch;
    const LoraTile& tile;
    bool is_input, has_rank_gain, has_column_gain, is_rank_major;
    int width;
};
enum class Gain { NONE, RANK, COLUMN };
DEVICE FactorView factor_of(const LoraLaunch& launch, const LoraTile& tile, int stream, Gain gain) {
    const LoraFactors& first = launch.factors[tile.use[0]];
    const bool is_input = stream == 0;
    return {launch, tile, is_input, gain == Gain::RANK, gain == Gain::COLUMN,
            (is_input ? first.is_a_rank_major : first.is_b_rank_major) != 0, launch.streams[stream].width};
}

// A tile of a factor on its way through registers, where floats become T. It lies as in memory: a row of the tile is
// one rank (is_rank_major) or one column. It has at most 16 P ranks.
template <typename T, int P = PAIRS>
struct FactorTile {
    static constexpr int CHUNKS = PAIR * P * TILE / 4 / THREADS;
    float v[CHUNKS][4];

    // Reads columns from `column`; elements beyond the factor are zero.
    DEVICE void fetch(const FactorView& f, int column) {
        const int num_pairs = num_pairs_of(f.tile), per_line = f.is_rank_major ? TILE / 4 : num_pairs * PAIR / 4;
        const int num_chunks = (f.is_rank_major ? num_pairs * PAIR : TILE) * per_line;
#pragma unroll
        for (int q = 0; q < CHUNKS; ++q) {
            const int i = thread_index() + q * THREADS, line = i / per_line, along = i % per_line * 4;
            if (i >= num_chunks) continue;
            const int place = f.is_rank_major ? line : along;
            if (place / OCTET < f.tile.num_octets)
                fetch_chunk(v[q], f, place, column + (f.is_rank_major ? along : line));
            else
                for (int j = 0; j < 4; ++j) v[q][j] = 0.0f;
        }
    }
    static DEVICE void fetch_chunk(float (&to)[4], const FactorView& f, int place, int column) {
        const int index = f.tile.use[place / OCTET], rank = f.tile.rank[place / OCTET] + place % OCTET;
        const LoraFactors& factors = f.launch.factors[index];
        const Matrix<float> m = f.is_input ? matrix(factors.a, factors.a_stride) : matrix(factors.b, factors.b_stride);
        const int ranks = f.launch.uses[index].rank - rank, columns = f.width - column;
        const int valid = f.is_rank_major ? (ranks > 0 ? columns : 0) : (columns > 0 ? ranks : 0);
        const float* from = m.data + (f.is_rank_major ? rank * m.stride + column : column * m.stride + rank);
        if (m.is_aligned && valid >= 4) {
            const float4 four = *reinterpret_cast<const float4*>(from);
            to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) to[j] = j < valid ? from[j] : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (f.has_rank_gain && factors.shrink_gain != nullptr && j < valid)
                to[j] *= factors.shrink_gain[f.is_rank_major ? rank : rank + j];
            if (f.has_column_gain && factors.expand_gain != nullptr && j < valid)
                to[j] *= factors.expand_gain[f.is_rank_major ? column + j : column];
        }
    }
    DEVICE void store(T* tile, const FactorView& f) const {
        const int num_pairs = num_pairs_of(f.tile), per_line = f.is_rank_major ? TILE / 4 : num_pairs * PAIR / 4;
        const int num_chunks = (f.is_rank_major ? num_pairs * PAIR : TILE) * per_line;
#pragma unroll
        for (int q = 0; q < CHUNKS; ++q) {
            const int i = thread_index() + q * THREADS;
            if (i >= num_chunks) continue;
            T* to = tile + i / per_line * row_stride<T>(TILE) + i % per_line * 4;
            store_two(to, v[q][0], v[q][1]);
            store_two(to + 2, v[q][2], v[q][3]);
        }
    }
};

// Starts copying a tile's ranks of S or E: `num_rows` tokens from `token` on, of which `rows` exist. The rest, up to a
// whole pair of octets, becomes zero.
template <typename T>
DEVICE void copy_shrunk(T* to, int stride, const void* shrunk, const LoraLaunch& launch, const LoraTile& tile,
                        int num_rows, int token, int rows) {
    constexpr int V = vector_length<T>();
    const int per_row = num_pairs_of(tile) * PAIR / V;
    for (int i = thread_index(); i < num_rows * per_row; i += THREADS) {
        const int r = i / per_row, c = i % per_row * V, octet = c / OCTET;
        const bool is_valid = r < rows && octet < tile.num_octets;
        const int o = is_valid ? octet : 0, row = is_valid ? r : 0;
        const T* from = shrunk_row<T>(shrunk, launch.uses[tile.use[o]], token + row, tile.rank[o] + c % OCTET);
        cp_async_16(to + r * stride + c, from, is_valid ? 16 : 0);
    }
}

// If this block is the last of the splits of an item's `tile`-th tile, sums them into `c` and returns true. Collective.
template <int P>
DEVICE bool combine_splits(Accumulator<P>& c, const LoraLaunch& launch, const LoraSplit& split, int tile, int num_pairs,
                           int* flag) {
    const i64 size = 2 * num_pairs * THREADS * 4;
    return sum_splits(c, launch.partials + split.partial + tile * split.count * size, split.index, split.count,
                      launch.counters + split.counter + tile, num_pairs, flag);
}

DEVICE DropoutKey key_of(const LoraUse& use, const LoraFactors& factors) {
    if (use.threshold == 0) return {0, 0, 0};
    return {factors.seed, (static_cast<u64>(*factors.step) << 32) + static_cast<u64>(factors.site), use.threshold};
}

// Zeroes the dropped elements of a tile of a use's tokens from `token` and columns from `column`; does not scale.
template <typename T>
DEVICE void drop_tile(T* tile, const DropoutKey& key, const i64* positions, int width, int token, int column,
                      int rows) {
    constexpr int BLOCKS = TILE / LANES;
    const int row = thread_index() / 2;  // two threads a token
    if (row >= rows) return;
    const u64 counter = static_cast<u64>(positions[token + row]) * ceil_div(width, LANES) + column / LANES;
    for (int block = thread_index() % 2 * (BLOCKS / 2), i = 0; i < BLOCKS / 2; ++i, ++block) {
        if (column + block * LANES >= width) return;
        const u32 bits = keep_bits(key, counter + block);
        T* lanes = tile + row * row_stride<T>(TILE) + block * LANES;
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane)
            if (!(bits >> lane & 1)) lanes[lane] = T{};
    }
}
