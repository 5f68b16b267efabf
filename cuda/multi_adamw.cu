// One AdamW step of many tasks in one launch: engine/kernels/multi_adamw.py has the equation.
//
//     g' = g * min(1, max_norm / (norm + 1e-6));  p -= lr * decay * p;  m += (1 - beta1) (g' - m)
//     v = beta2 v + (1 - beta2) g'^2;  p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps);  g = 0
// Where the task's flag says that its gradient is not finite, nothing of it is touched.
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

DEVICE void step_one(const AdamWGroup& group, i64 i, float clip) {
    const float g = group.gradients[i] * clip;
    const float m = group.first_moments[i] + group.one_minus_beta1 * (g - group.first_moments[i]);
    const float v = group.beta2 * group.second_moments[i] + group.one_minus_beta2 * (g * g);
    const float root = square_root(v) / group.root_correction + group.epsilon;
    group.parameters[i] = group.decay * group.parameters[i] - group.step_size * (m / root);
    group.first_moments[i] = m, group.second_moments[i] = v, group.gradients[i] = 0.0f;
}

KERNEL(multi_adamw, AdamWLaunch, 8) {
    for (int i = block_index(); i < launch.num_items; i += num_blocks()) {
        const AdamWItem& item = launch.items[i];
        const AdamWGroup& group = launch.groups[item.group];
        if (*group.is_finite == 0) continue;
        const float ratio = group.max_norm / (*group.norm + 1e-6f);
        const float clip = group.max_norm > 0.0f && ratio < 1.0f ? ratio : 1.0f;
        const i64 first = static_cast<i64>(item.chunk) * launch.chunk_elements;
        const i64 whole_chunk = first + launch.chunk_elements;
        const i64 end = whole_chunk < group.num_elements ? whole_chunk : group.num_elements;
        for (i64 j = first + thread_index(); j < end; j += THREADS) step_one(group, j, clip);
    }
}
