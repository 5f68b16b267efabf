// Tiles of 64 x 64 in shared memory and their products on tensor cores, for float, bf16 and fp16.
//
// A float goes through the tensor cores as a sum of two tf32 (three products; what is left out is below 2^-21 of a
// term). Sums are in float for every type; a tensor core cuts off instead of rounding, so that a sum of 1,024 terms is
// off by about 2^-18 of their magnitudes, where a rounded one is off by 2^-22.
// Hopper's wgmma would fit here, behind the same loads and products.
#pragma once
#include "common.cuh"

constexpr int TILE = MUXTUNE_TILE;                       // tokens, columns or ranks
constexpr int PAIR = MUXTUNE_PAIR, PAIRS = TILE / PAIR;  // columns of an accumulator that are computed together
static_assert(MUXTUNE_FACTOR_TILES == 2, "kernels alternate between two tiles of the operand from registers");

template <typename T>
constexpr DEVICE int vector_length() {
    return VECTOR_BYTES / static_cast<int>(sizeof(T));
}
// Rows are padded by one vector: eight rows of one column then lie in different banks.
template <typename T>
constexpr DEVICE int row_stride(int width) {
    return width + vector_length<T>();
}
template <typename T>
constexpr DEVICE int tile_size() {
    return TILE * row_stride<T>(TILE);
}

// Sums of 16 rows by 16 P columns of a product, spread over a warp as mma lays them out: pair p, half h, register i
// hold row lane / 4 + 8 * (i / 2), column 16 p + 8 h + 2 * (lane % 4) + i % 2.
template <int P = PAIRS>
struct Accumulator {
    float v[P][2][4];

    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < P * 8; ++i) v[i / 8][i / 4 % 2][i % 4] = 0.0f;
    }
};
DEVICE int fragment_row(int i) { return thread_index() % WARP / 4 + 8 * (i / 2); }
DEVICE int fragment_column(int pair, int half, int i) {
    return PAIR * pair + 8 * half + 2 * (thread_index() % 4) + i % 2;
}

// C += A B by one warp, with fragments of A [16 x STEP] and B [STEP x 16]. `is_row_major`: a row of the tile is a row
// of A, or a column of B (the sum runs along it); else tiles are read transposed.
template <typename T>
struct WarpProduct {
    static constexpr int STEP = 16;
    struct Fragment {
        u32 r[4];
    };
    static DEVICE void load(Fragment& f, const T* row, bool is_row_major) {
        if (is_row_major)
            ldmatrix_x4(f.r, row);
        else
            ldmatrix_x4_transposed(f.r, row);
    }
    static DEVICE Fragment load_a(const T* tile, int stride, int m, int k, bool is_row_major) {
        const int lane = thread_index() % WARP, low = lane % 8, mid = lane / 8 % 2 * 8, high = lane / 16 * 8;
        Fragment f;
        load(f, is_row_major ? tile + (m + low + mid) * stride + k + high : tile + (k + low + high) * stride + m + mid,
             is_row_major);
        return f;
    }
    static DEVICE Fragment load_b(const T* tile, int stride, int n, int k, bool is_row_major) {
        const int lane = thread_index() % WARP, low = lane % 8, mid = lane / 8 % 2 * 8, high = lane / 16 * 8;
        Fragment f;
        load(f, is_row_major ? tile + (n + low + high) * stride + k + mid : tile + (k + low + mid) * stride + n + high,
             is_row_major);
        return f;
    }
    static DEVICE void multiply(float (&c)[2][4], const Fragment& a, const Fragment& b) {
        mma_16816(c[0], a.r, b.r[0], b.r[1], T{});
        mma_16816(c[1], a.r, b.r[2], b.r[3], T{});
    }
};

template <>
struct WarpProduct<float> {
    static constexpr int STEP = 8;
    struct Fragment {
        u32 high[4], low[4];
    };
    static DEVICE void split(Fragment& f, int i, float x) {
        f.high[i] = to_tf32(x);
        f.low[i] = to_tf32(x - as_float(f.high[i]));
    }
    static DEVICE float at(const float* tile, int stride, int line, int k, bool is_row_major) {
        return is_row_major ? tile[line * stride + k] : tile[k * stride + line];
    }
    static DEVICE Fragment load_a(const float* tile, int stride, int m, int k, bool is_row_major) {
        const int row = thread_index() % WARP / 4, column = thread_index() % 4;
        Fragment f;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            split(f, i, at(tile, stride, m + row + 8 * (i % 2), k + column + 4 * (i / 2), is_row_major));
        return f;
    }
    static DEVICE Fragment load_b(const float* tile, int stride, int n, int k, bool is_row_major) {
        const int column = thread_index() % WARP / 4, row = thread_index() % 4;
        Fragment f;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            split(f, i, at(tile, stride, n + column + 8 * (i / 2), k + row + 4 * (i % 2), is_row_major));
        return f;
    }
    static DEVICE void multiply(float (&c)[2][4], const Fragment& a, const Fragment& b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            mma_1688(c[half], a.low, b.high[2 * half], b.high[2 * half + 1]);
            mma_1688(c[half], a.high, b.low[2 * half], b.low[2 * half + 1]);
            mma_1688(c[half], a.high, b.high[2 * half], b.high[2 * half + 1]);
        }
    }
};

// Adds the warp's 16 rows (from `m`) of the product of two tiles, summed over `depth` (a multiple of 16).
template <typename T, int P>
DEVICE void multiply_tiles(Accumulator<P>& c, const T* a, int a_stride, bool is_a_row_major, const T* b, int b_stride,
                           bool is_b_row_major, int m, int depth, int num_pairs) {
    for (int k = 0; k < depth; k += WarpProduct<T>::STEP) {
        const auto fa = WarpProduct<T>::load_a(a, a_stride, m, k, is_a_row_major);
#pragma unroll
        for (int pair = 0; pair < P; ++pair) {
            if (pair >= num_pairs) continue;
            const auto fb = WarpProduct<T>::load_b(b, b_stride, PAIR * pair, k, is_b_row_major);
            WarpProduct<T>::multiply(c.v[pair], fa, fb);
        }
    }
}

// A matrix in device memory. `is_aligned`: its rows are aligned to 16 bytes.
template <typename T>
struct Matrix {
    const T* data;
    i64 stride;
    bool is_aligned;
};
template <typename T>
DEVICE Matrix<T> matrix(const T* data, i64 stride) {
    const bool is_aligned = reinterpret_cast<u64>(data) % 16 == 0 && stride * static_cast<i64>(sizeof(T)) % 16 == 0;
    return {data, stride, is_aligned};
}

// Starts copying [rows x columns] at (row, column) into a tile of [num_rows x width]; the rest becomes zero.
template <typename T>
DEVICE void copy_tile(T* tile, int width, int num_rows, const Matrix<T>& from, i64 row, int column, int rows,
                      int columns) {
    constexpr int V = vector_length<T>();
    const int stride = row_stride<T>(width), per_row = width / V;
    for (int i = thread_index(); i < num_rows * per_row; i += THREADS) {
        const int r = i / per_row, c = i % per_row * V;
        const int valid = r < rows ? greatest(0, least(V, columns - c)) : 0;
        T* to = tile + r * stride + c;
        const T* source = valid > 0 ? from.data + (row + r) * from.stride + column + c : from.data;
        if (from.is_aligned) {
            cp_async_16(to, source, valid * static_cast<int>(sizeof(T)));
        } else {
            for (int j = 0; j < V; ++j) to[j] = j < valid ? source[j] : T{};
        }
    }
}

// Stores two adjacent elements, the first at an even index.
template <typename T>
DEVICE void store_two(T* to, float first, float second) {
    struct alignas(2 * sizeof(T)) Two {
        T first, second;
    };
    *reinterpret_cast<Two*>(to) = Two{from_float<T>(first), from_float<T>(second)};
}

// A tile on its way through registers, where S becomes T. Its lines lie as in memory.
template <typename T, typename S>
struct StagedTile {
    static constexpr int V = vector_length<S>(), PER_LINE = TILE / V, CHUNKS = TILE * PER_LINE / THREADS;
    union {
        uint4 whole;
        S each[V];
    } v[CHUNKS];

    // Reads [lines x columns] at (line, column); the rest becomes zero.
    DEVICE void fetch(const Matrix<S>& from, i64 line, int column, int lines, int columns) {
#pragma unroll
        for (int q = 0; q < CHUNKS; ++q) {
            const int i = thread_index() + q * THREADS, l = i / PER_LINE, c = i % PER_LINE * V;
            const int valid = l < lines ? greatest(0, least(V, columns - c)) : 0;
            const S* source = from.data + (line + l) * from.stride + column + c;
            if (from.is_aligned && valid == V) {
                v[q].whole = load_16(source);
            } else {
#pragma unroll
                for (int j = 0; j < V; ++j) v[q].each[j] = j < valid ? source[j] : S{};
            }
        }
    }
    DEVICE void store(T* tile) const {
#pragma unroll
        for (int q = 0; q < CHUNKS; ++q) {
            const int i = thread_index() + q * THREADS;
            T* to = tile + i / PER_LINE * row_stride<T>(TILE) + i % PER_LINE * V;
#pragma unroll
            for (int j = 0; j < V; j += 2) store_two(to + j, to_float(v[q].each[j]), to_float(v[q].each[j + 1]));
        }
    }
};

// Stores and adds a thread's share of partial sums: every THREADS-th float4.
template <int P>
DEVICE void store_partial(float4* partial, const Accumulator<P>& c, int num_pairs) {
#pragma unroll
    for (int i = 0; i < 2 * P; ++i) {
        const float(&v)[4] = c.v[i / 2][i % 2];
        if (i < 2 * num_pairs) partial[i * THREADS] = float4{v[0], v[1], v[2], v[3]};
    }
}
template <int P>
DEVICE void add_partial(Accumulator<P>& c, const float4* partial, int num_pairs) {
#pragma unroll
    for (int i = 0; i < 2 * P; ++i) {
        if (i >= 2 * num_pairs) continue;
        const float4 four = partial[i * THREADS];
        float(&v)[4] = c.v[i / 2][i % 2];
        v[0] += four.x, v[1] += four.y, v[2] += four.z, v[3] += four.w;
    }
}

// If this block is the last of `num_splits` to arrive, sums all partial tiles in order into `c` and returns true.
// `partials` has room for all, `counter` is zero before and after, `flag` one shared int. Collective.
template <int P>
DEVICE bool sum_splits(Accumulator<P>& c, float* partials, int split, int num_splits, int* counter, int num_pairs,
                       int* flag) {
    if (num_splits == 1) return true;
    const int size = 2 * num_pairs * THREADS;
    float4* const first = reinterpret_cast<float4*>(partials) + thread_index();
    store_partial(first + split * size, c, num_pairs);
    if (!is_last_to_arrive(counter, num_splits, flag)) return false;
    c.clear();
    for (int other = 0; other < num_splits; ++other) add_partial(c, first + other * size, num_pairs);
    return true;
}
