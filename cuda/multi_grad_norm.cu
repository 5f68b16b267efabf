// Gradient norms and finite flags of many tasks in one launch: engine/kernels/multi_grad_norm.py has the equation.
//
//     norm_u = sqrt(sum(g_u^2));   is_finite_u = norm_u is neither NaN nor infinite
// Squares are summed in double, so no float overflows. Chunks, and the order of their sums, depend on the task alone.
#include "common.cuh"

struct NormTask {
    const float* gradient;
    i64 num_elements;
    int first_item, num_items;
};

struct NormItem {
    int task, chunk;
};

struct NormLaunch {
    const NormTask* tasks;
    const NormItem* items;
    double* sums;   // by item
    int* counters;  // by task: zero before and after
    float* norms;
    int* is_finite;
    int num_items, chunk_elements;
};

// Returns this thread's share of a chunk's sum of squares.
DEVICE double square_sum(const float* gradient, i64 first, i64 end) {
    const bool is_aligned = reinterpret_cast<u64>(gradient + first) % 16 == 0;
    double sum = 0.0;  // four elements at a time, in one order for any alignment
    for (i64 i = first + thread_index() * 4; i < end; i += THREADS * 4) {
        const bool whole = is_aligned && i + 4 <= end;
        Floats<4> g = whole ? load_floats<4>(gradient + i) : Floats<4>{};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (!whole && i + j < end) g.v[j] = gradient[i + j];
            sum += static_cast<double>(g.v[j]) * static_cast<double>(g.v[j]);
        }
    }
    return sum;
}

KERNEL(multi_grad_norm, NormLaunch, MUXTUNE_MULTI_GRAD_NORM_BLOCKS) {
    double* const shared = reinterpret_cast<double*>(shared_memory());
    int* const flag = reinterpret_cast<int*>(shared + WARPS);
    for (int i = block_index(); i < launch.num_items; i += num_blocks()) {
        const NormItem& item = launch.items[i];
        const NormTask& task = launch.tasks[item.task];
        const i64 first = static_cast<i64>(item.chunk) * launch.chunk_elements;
        const i64 whole_chunk = first + launch.chunk_elements;
        const i64 end = whole_chunk < task.num_elements ? whole_chunk : task.num_elements;
        const double sum = block_sum(square_sum(task.gradient, first, end), shared);
        if (thread_index() == 0) launch.sums[i] = sum;
        if (!is_last_to_arrive(launch.counters + item.task, task.num_items, flag)) continue;
        double whole = 0.0;  // a thread adds the same chunks in any block
        for (int j = thread_index(); j < task.num_items; j += THREADS) whole += launch.sums[task.first_item + j];
        const float norm = static_cast<float>(square_root(block_sum(whole, shared)));
        if (thread_index() == 0) {
            launch.norms[item.task] = norm;
            launch.is_finite[item.task] = norm - norm == 0.0f;  // false for NaN and Inf
        }
    }
}
