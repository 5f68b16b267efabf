// Gains and shifts of many tasks on one packed stream: engine/kernels/multi_affine.py has the equations.
//
//     Y[u] = g_u o X[u] + b_u;    dX[u] = g_u o dY[u];   dg_u = column sums of dY[u] o X[u];   db_u = those of dY[u]
// A thread handles the columns of one 16-byte load for all tokens of an item. How a use is cut into items, and
// the order of every sum, depend on that use alone.
#include "tile.cuh"

// Tokens [start, start + num_tokens) of the stream. Without g and b they are copied unchanged.
struct AffineUse {
    const float *gain, *shift;  // may be null
    i64 saved_row;              // of its saved tokens of X
    i64 dgain, dshift;          // floats before each gradient; -1: none
    i64 partial;                // floats before its partial sums: [splits, 2, width]
    int start, num_tokens;
};

struct AffineItem {
    int use, token, end_token, column;
    int split, num_splits, counter, unused;
};

struct AffineLaunch {
    const AffineUse* uses;
    const AffineItem* items;
    const void* in;     // X; backward: dY
    const void* saved;  // backward: X of the uses that need it
    void* out;          // Y; backward: dX, may be null
    float* gradients;
    float* partials;
    int* counters;
    i64 in_stride, saved_stride, out_stride;
    int num_items, width;
};

// Adjacent columns of a row: up to 16 bytes.
template <typename T>
struct ColumnVector {
    static constexpr int V = vector_length<T>();
    union {
        uint4 whole;
        T each[V];
    };
    DEVICE void load(const Matrix<T>& from, i64 row, int column, int valid) {
        const T* source = from.data + row * from.stride + column;
        if (from.is_aligned && valid == V) {
            whole = load_16(source);
        } else {
#pragma unroll
            for (int j = 0; j < V; ++j) each[j] = j < valid ? source[j] : T{};
        }
    }
    DEVICE void store(const Matrix<T>& to, i64 row, int column, int valid) const {
        T* target = const_cast<T*>(to.data) + row * to.stride + column;
        if (to.is_aligned && valid == V) {
            store_16(target, whole);
        } else {
#pragma unroll
            for (int j = 0; j < V; ++j)
                if (j < valid) target[j] = each[j];
        }
    }
};

// Reads this thread's part of a vector; `otherwise` if there is no vector.
template <int V>
DEVICE void read_vector(float (&to)[V], const float* vector, int column, int valid, float otherwise) {
#pragma unroll
    for (int j = 0; j < V; ++j) to[j] = vector != nullptr && j < valid ? vector[column + j] : otherwise;
}

template <typename T>
DEVICE void affine_item(const AffineLaunch& launch, const AffineItem& item) {
    constexpr int V = vector_length<T>();
    const AffineUse& use = launch.uses[item.use];
    const int column = item.column + thread_index() * V, valid = least(V, launch.width - column);
    if (valid <= 0) return;
    const Matrix<T> x = matrix(static_cast<const T*>(launch.in), launch.in_stride);
    const Matrix<T> y = matrix(static_cast<const T*>(launch.out), launch.out_stride);
    float gain[V], shift[V];
    read_vector(gain, use.gain, column, valid, 1.0f);
    read_vector(shift, use.shift, column, valid, -0.0f);  // x + -0 is x, also where x is -0
#pragma unroll 4
    for (int token = item.token; token < item.end_token; ++token) {
        ColumnVector<T> v;
        v.load(x, use.start + token, column, valid);
#pragma unroll
        for (int j = 0; j < V; ++j) v.each[j] = from_float<T>(gain[j] * to_float(v.each[j]) + shift[j]);
        v.store(y, use.start + token, column, valid);
    }
}

// Writes dX of an item, and sums dY o X and dY.
template <typename T, int V>
DEVICE void pass_back(const AffineLaunch& launch, const AffineUse& use, const AffineItem& item, int column, int valid,
                      float (&dgain)[V], float (&dshift)[V]) {
    const Matrix<T> dy = matrix(static_cast<const T*>(launch.in), launch.in_stride);
    const Matrix<T> x = matrix(static_cast<const T*>(launch.saved), launch.saved_stride);
    const Matrix<T> dx = matrix(static_cast<const T*>(launch.out), launch.out_stride);
    float gain[V];
    read_vector(gain, use.gain, column, valid, 1.0f);
#pragma unroll 2
    for (int token = item.token; token < item.end_token; ++token) {
        ColumnVector<T> v, saved{};
        v.load(dy, use.start + token, column, valid);
        if (use.dgain >= 0) saved.load(x, use.saved_row + token, column, valid);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float d = to_float(v.each[j]);
            dgain[j] += d * to_float(saved.each[j]), dshift[j] += d;
            v.each[j] = from_float<T>(gain[j] * d);
        }
        if (launch.out != nullptr) v.store(dx, use.start + token, column, valid);
    }
}

template <typename T>
DEVICE void affine_backward_item(const AffineLaunch& launch, const AffineItem& item) {
    constexpr int V = vector_length<T>();
    int* const flag = reinterpret_cast<int*>(shared_memory());
    const AffineUse& use = launch.uses[item.use];
    const int column = item.column + thread_index() * V, valid = least(V, launch.width - column);
    float sums[2][V];
#pragma unroll
    for (int j = 0; j < V; ++j) sums[0][j] = sums[1][j] = 0.0f;
    if (valid > 0) pass_back<T>(launch, use, item, column, valid, sums[0], sums[1]);
    if (use.dgain < 0 && use.dshift < 0) return;
    float* const partials = launch.partials + use.partial;
    if (item.num_splits > 1) {
        for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int j = 0; j < V; ++j)
                if (j < valid)
                    partials[(2 * item.split + k) * static_cast<i64>(launch.width) + column + j] = sums[k][j];
        if (!is_last_to_arrive(launch.counters + item.counter, item.num_splits, flag)) return;
    }
    for (int k = 0; k < 2; ++k) {
        const i64 to = k == 0 ? use.dgain : use.dshift;
        if (to < 0) continue;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (j >= valid) continue;
            float sum = item.num_splits > 1 ? 0.0f : sums[k][j];
            for (int split = 0; split < item.num_splits && item.num_splits > 1; ++split)
                sum += partials[(2 * split + k) * static_cast<i64>(launch.width) + column + j];
            launch.gradients[to + column + j] = sum;
        }
    }
}

#define MULTI_AFFINE_KERNEL(name, run_item)                                                   \
    KERNEL(name, AffineLaunch, MUXTUNE_MULTI_AFFINE_BLOCKS) {                                 \
        for (int i = block_index(); i < launch.num_items; i += num_blocks()) {                \
            run_item(launch, launch.items[i]);                                                \
            block_barrier(); /* the flag is free for the next item */                         \
        }                                                                                     \
    }
#define MULTI_AFFINE_KERNELS(suffix, T)                    \
    MULTI_AFFINE_KERNEL(multi_affine_##suffix, affine_item<T>) \
    MULTI_AFFINE_KERNEL(multi_affine_backward_##suffix, affine_backward_item<T>)

MULTI_AFFINE_KERNELS(bf16, bf16)
MULTI_AFFINE_KERNELS(fp16, fp16)
MULTI_AFFINE_KERNELS(fp32, float)
