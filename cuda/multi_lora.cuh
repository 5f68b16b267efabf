// What a launch of multi_lora reads, as engine/kernels/multi_lora_items.py packs it, and the tiles it works on.
//
// Legend: T tokens, W columns of the stream (K inputs or N outputs), R rank, L tokens of one use.
#pragma once
#include "philox.cuh"
#include "tile.cuh"

// One task's adapter on its own tokens [start, start + num_tokens) of the stream.
struct LoraUse {
    int start, num_tokens, rank, first_run, num_runs;
    int threshold;  // of its dropout; 0: none
    float scale, keep_scale;
    u64 seed, step_site;
    const float *a, *b, *shrink_gain, *expand_gain;  // gains may be null
    i64 a_stride, b_stride;
    int is_a_rank_major, is_b_rank_major;  // whether a row of memory is one rank
    i64 shrunk;                            // elements before this use's [L, padded rank] in the shrunk rows
    i64 da, db, dd, dg;                    // floats before each gradient; -1: not wanted
};

// One block's work, on tokens and columns of one use. Splits of one tile are summed by the last of them to finish.
struct LoraItem {
    int use, token, end_token, column, end_column, rank;
    int split, num_splits, counter, unused;
    i64 partial;  // floats before the tile's partial sums
};

struct LoraLaunch {
    const LoraUse* uses;
    const Run* runs;
    const LoraItem* items;
    void* stream;       // X, dX, Y or dY: [T, W]
    void* shrunk;       // S or E: [L, padded rank] of each use
    const void* other;  // S, beside E
    float* gradients;
    float* partials;
    int* counters;
    i64 stream_stride;
    int num_items, width;
    int is_input_side;  // A with X or dX and dropout; else B with Y or dY and scale
    int rank_capacity;  // the greatest rank of all uses, to a multiple of 64
};

DEVICE int padded(int rank) { return ceil_div(rank, 8) * 8; }

// A or B of one use: [R x W], whichever way it lies in memory. The gains are multiplied into it as it is loaded.
struct Factor {
    const float *data, *rank_gain, *column_gain;
    i64 stride;
    bool is_rank_major, is_aligned;
    int rank, width;
};
DEVICE Factor factor_of(const LoraLaunch& launch, const LoraUse& use) {
    const bool input = launch.is_input_side != 0;
    const Matrix<float> m = input ? matrix(use.a, use.a_stride) : matrix(use.b, use.b_stride);
    const bool is_rank_major = (input ? use.is_a_rank_major : use.is_b_rank_major) != 0;
    return {m.data, nullptr, nullptr, m.stride, is_rank_major, m.is_aligned, use.rank, launch.width};
}

// A 64 x 64 tile of a factor on its way through registers, where floats become T: as it lies in memory, so that a row
// of the tile is one rank (is_rank_major) or one column.
template <typename T>
struct FactorTile {
    static constexpr int CHUNKS = TILE * TILE / 4 / THREADS;
    float v[CHUNKS][4];

    // Ranks from `rank` and columns from `column`; what is beyond the factor is zero.
    DEVICE void fetch(const Factor& f, int rank, int column, int num_pairs) {
        const int per_line = f.is_rank_major ? TILE / 4 : num_pairs * PAIR / 4;
        const int num_chunks = (f.is_rank_major ? num_pairs * PAIR : TILE) * per_line;
#pragma unroll
        for (int q = 0; q < CHUNKS; ++q) {
            const int i = thread_index() + q * THREADS;
            if (i < num_chunks) fetch_chunk(v[q], f, rank, column, i / per_line, i % per_line * 4);
        }
    }
    static DEVICE void fetch_chunk(float (&to)[4], const Factor& f, int rank, int column, int line, int along) {
        const int r = rank + (f.is_rank_major ? line : along), c = column + (f.is_rank_major ? along : line);
        const int valid = f.is_rank_major ? (r < f.rank ? f.width - c : 0) : (c < f.width ? f.rank - r : 0);
        const float* from = f.data + (f.is_rank_major ? r * f.stride + c : c * f.stride + r);
        if (f.is_aligned && valid >= 4) {
            const float4 four = *reinterpret_cast<const float4*>(from);
            to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) to[j] = j < valid ? from[j] : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (f.rank_gain != nullptr && j < valid) to[j] *= f.rank_gain[f.is_rank_major ? r : r + j];
            if (f.column_gain != nullptr && j < valid) to[j] *= f.column_gain[f.is_rank_major ? c + j : c];
        }
    }
    DEVICE void store(T* tile, const Factor& f, int num_pairs) const {
        const int per_line = f.is_rank_major ? TILE / 4 : num_pairs * PAIR / 4;
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

// Sums the splits of a tile in their order, if this block is the last of them; then `c` is the whole. Collective.
DEVICE bool combine_splits(Accumulator& c, const LoraLaunch& launch, const LoraItem& item, int num_pairs, int* flag) {
    if (item.num_splits == 1) return true;
    const int num_chunks = 2 * num_pairs;
    float4* partial = reinterpret_cast<float4*>(launch.partials + item.partial) + thread_index();
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; ++i) {
        const float(&v)[4] = c.v[i / 2][i % 2];
        if (i < num_chunks) partial[(item.split * num_chunks + i) * THREADS] = float4{v[0], v[1], v[2], v[3]};
    }
    if (!is_last_to_arrive(launch.counters + item.counter, item.num_splits, flag)) return false;
    c.clear();
    for (int split = 0; split < item.num_splits; ++split) {
#pragma unroll
        for (int i = 0; i < 2 * PAIRS; ++i) {
            if (i >= num_chunks) continue;
            const float4 four = partial[(split * num_chunks + i) * THREADS];
            float(&v)[4] = c.v[i / 2][i % 2];
            v[0] += four.x, v[1] += four.y, v[2] += four.z, v[3] += four.w;
        }
    }
    return true;
}

// Zeroes what a use's dropout drops of a tile of its tokens from `token` and columns from `column`; does not scale.
template <typename T>
DEVICE void drop_tile(T* tile, const LoraUse& use, const Run* runs, int width, int token, int column, int rows) {
    const DropoutKey key{use.seed, use.step_site, use.threshold};
    constexpr int BLOCKS = TILE / LANES;
    const int row = thread_index() / 2;  // two threads a token
    if (row >= rows) return;
    const u64 position = static_cast<u64>(position_of(runs + use.first_run, use.num_runs, token + row));
    const u64 counter = position * ceil_div(width, LANES) + column / LANES;
    for (int block = thread_index() % 2 * (BLOCKS / 2), i = 0; i < BLOCKS / 2; ++i, ++block) {
        if (column + block * LANES >= width) return;
        const u32 bits = keep_bits(key, counter + block);
        T* lanes = tile + row * row_stride<T>(TILE) + block * LANES;
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane)
            if (!(bits >> lane & 1)) lanes[lane] = T{};
    }
}
