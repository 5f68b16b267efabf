// Loss and gradient of rows of logits, in place: engine/kernels/segment_cross_entropy.py has the equation.
//
//     c = cap tanh(z / cap), or z without one;   loss = logsumexp(c) - c[target]
//     z = weight * (softmax(c) - onehot(target)) * (1 - (c / cap)^2)
// A block handles whole rows: one read for the normaliser, one for the gradient. A row's values depend on it alone.
#include "common.cuh"

struct CrossEntropyLaunch {
    void* logits;  // [rows, vocabulary] of T; with weights, overwritten by the gradient
    const i64* targets;
    const float* weights;  // null: losses only
    float* losses;
    i64 stride;
    int num_rows, vocabulary;
    float softcap;  // 0: none
    int unused;
};

// Running maximum and sum of exp(x - maximum) of logits.
struct Normaliser {
    float maximum, sum;
};
DEVICE Normaliser include(Normaliser own, float x) {
    const float above = x - own.maximum, e = exponential(above > 0.0f ? -above : above);  // one of the two is exp(0)
    return {greater(own.maximum, x), above > 0.0f ? own.sum * e + 1.0f : own.sum + e};
}
DEVICE Normaliser merge(Normaliser a, Normaliser b) {
    const float most = greater(a.maximum, b.maximum);
    if (most - most != 0.0f) return {most, a.sum + b.sum};  // no logit yet, or Inf: the sum says which
    return {most, a.sum * exponential(a.maximum - most) + b.sum * exponential(b.maximum - most)};
}

DEVICE float capped(float z, float cap) { return cap > 0.0f ? cap * hyperbolic_tangent(z / cap) : z; }

DEVICE Normaliser block_merge(Normaliser own, Normaliser* shared) {
    for (int mask = WARP / 2; mask > 0; mask /= 2)
        own = merge(own, {shuffle_xor(own.maximum, mask), shuffle_xor(own.sum, mask)});
    if (thread_index() % WARP == 0) shared[thread_index() / WARP] = own;
    block_barrier();
    Normaliser whole = shared[0];
    for (int warp = 1; warp < WARPS; ++warp) whole = merge(whole, shared[warp]);
    block_barrier();
    return whole;
}

// Calls visit(column, value) for this thread's columns, and stores the result if `writes`. If the row is aligned, it
// reads 16 bytes at a time.
template <bool writes, typename T, typename Visit>
DEVICE void for_each(T* row, int vocabulary, const Visit& visit) {
    constexpr int V = VECTOR_BYTES / static_cast<int>(sizeof(T));
    const bool is_aligned = reinterpret_cast<u64>(row) % 16 == 0;
    const int whole = is_aligned ? vocabulary / V * V : 0;
    for (int column = thread_index() * V; column < whole; column += THREADS * V) {
        union {
            uint4 all;
            T each[V];
        } x;
        x.all = load_16(row + column);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float result = visit(column + j, to_float(x.each[j]));
            if (writes) x.each[j] = from_float<T>(result);
        }
        if (writes) store_16(row + column, x.all);
    }
    for (int column = whole + thread_index(); column < vocabulary; column += THREADS) {
        const float result = visit(column, to_float(row[column]));
        if (writes) row[column] = from_float<T>(result);
    }
}

template <typename T>
DEVICE void cross_entropy_row(const CrossEntropyLaunch& launch, int row, Normaliser* shared) {
    T* const logits = static_cast<T*>(launch.logits) + row * launch.stride;
    const i64 target = launch.targets[row];
    constexpr float NOTHING = -3.402823466e38f;
    const float cap = launch.softcap;
    const bool is_valid = target >= 0 && target < launch.vocabulary;  // else the loss is NaN
    const float chosen = is_valid ? capped(to_float(logits[target]), cap) : NOTHING * 2.0f - NOTHING * 2.0f;
    Normaliser own{NOTHING, 0.0f};
    for_each<false>(logits, launch.vocabulary, [&](int, float z) {
        own = include(own, capped(z, cap));
        return z;
    });
    const Normaliser all = block_merge(own, shared);  // after this the target's logit is not needed
    const float log_sum = all.maximum + logarithm(all.sum);
    if (thread_index() == 0) launch.losses[row] = log_sum - chosen;
    if (launch.weights == nullptr) return;
    const float weight = launch.weights[row];
    for_each<true>(logits, launch.vocabulary, [&](int column, float z) {
        const float c = capped(z, cap);
        const float slope = cap > 0.0f ? 1.0f - (c / cap) * (c / cap) : 1.0f;
        return weight * (exponential(c - log_sum) - (column == target ? 1.0f : 0.0f)) * slope;
    });
}

#define SEGMENT_CROSS_ENTROPY_KERNEL(suffix, T)                                                        \
    KERNEL(segment_cross_entropy_##suffix, CrossEntropyLaunch, MUXTUNE_SEGMENT_CROSS_ENTROPY_BLOCKS) { \
        Normaliser* const shared = reinterpret_cast<Normaliser*>(shared_memory());                     \
        for (int row = block_index(); row < launch.num_rows; row += num_blocks())                      \
            cross_entropy_row<T>(launch, row, shared);                                                 \
    }
SEGMENT_CROSS_ENTROPY_KERNEL(bf16, bf16)
SEGMENT_CROSS_ENTROPY_KERNEL(fp16, fp16)
SEGMENT_CROSS_ENTROPY_KERNEL(fp32, float)
