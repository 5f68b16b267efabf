// One AdamW step of many tasks in one launch: engine/kernels/multi_adamw.py has the equation.
//
//     g' = g * min(1, max_norm / (norm + 1e-6));  p -= lr * decay * p;  m += (1 - beta1) (g' - m)
//     v = beta2 v + (1 - beta2) g'^2;  p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps);  g = 0
// A task with a gradient that is not finite is left unchanged.
#include "common.cuh"

// Parameters of one task that share a learning rate.
struct AdamWGroup {
    float *parameters, *gradients, *first_moments, *second_moments;
    const float* norm;     // of the whole task's gradient
    const int* is_finite;  // of the whole task
    i64 num_elements;
    float max_norm;  // 0: no clipping
    float decay;     // 1 - lr * weight decay
    float beta1, beta2, one_minus_beta1, one_minus_beta2;
    float epsilon, step_size;    // lr / (1 - beta1^t)
    float root_correction;       // sqrt(1 - beta2^t)
    int unused;
};

struct AdamWItem {
    int group, chunk;
};

struct AdamWLaunch {
    const AdamWGroup* groups;
    const AdamWItem* items;
    int num_items, chunk_elements;
};

// Steps one element, in registers.
DEVICE void step_one(const AdamWGroup& group, float clip, float& p, float& g, float& m, float& v) {
    const float clipped = g * clip;
    m += group.one_minus_beta1 * (clipped - m);
    v = group.beta2 * v + group.one_minus_beta2 * (clipped * clipped);
    const float root = square_root(v) / group.root_correction + group.epsilon;
    p = group.decay * p - group.step_size * (m / root);
    g = 0.0f;
}

// Steps N adjacent elements at a time: 4 if all four arrays are aligned to 16 bytes, as those of whole tasks are.
template <int N>
DEVICE void step_range(const AdamWGroup& group, float clip, i64 first, i64 end) {
    for (i64 i = first + thread_index() * N; i + N <= end; i += THREADS * N) {
        Floats<N> p = load_floats<N>(group.parameters + i), g = load_floats<N>(group.gradients + i);
        Floats<N> m = load_floats<N>(group.first_moments + i), v = load_floats<N>(group.second_moments + i);
#pragma unroll
        for (int j = 0; j < N; ++j) step_one(group, clip, p.v[j], g.v[j], m.v[j], v.v[j]);
        store_floats(group.parameters + i, p), store_floats(group.gradients + i, g);
        store_floats(group.first_moments + i, m), store_floats(group.second_moments + i, v);
    }
}

DEVICE bool is_aligned(const AdamWGroup& group) {
    return (reinterpret_cast<u64>(group.parameters) | reinterpret_cast<u64>(group.gradients) |
            reinterpret_cast<u64>(group.first_moments) | reinterpret_cast<u64>(group.second_moments)) % 16 == 0;
}

KERNEL(multi_adamw, AdamWLaunch, MUXTUNE_MULTI_ADAMW_BLOCKS) {
    for (int i = block_index(); i < launch.num_items; i += num_blocks()) {
        const AdamWItem& item = launch.items[i];
        const AdamWGroup& group = launch.groups[item.group];
        if (*group.is_finite == 0) continue;
        const float ratio = group.max_norm / (*group.norm + 1e-6f);
        const float clip = group.max_norm > 0.0f && ratio < 1.0f ? ratio : 1.0f;
        const i64 first = static_cast<i64>(item.chunk) * launch.chunk_elements;
        const i64 whole_chunk = first + launch.chunk_elements;
        const i64 end = whole_chunk < group.num_elements ? whole_chunk : group.num_elements;
        const i64 whole = is_aligned(group) ? first + (end - first) / 4 * 4 : first;
        step_range<4>(group, clip, first, whole);
        step_range<1>(group, clip, whole, end);
    }
}
