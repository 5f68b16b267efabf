// Kernels with one fault each, which the host shim must find, and one without a fault, which must pass.
#include "tile.cuh"

struct PlantedLaunch {
    const float* in;
    float* out;
    int size, unused;
};

// out[i] = in[neighbour of i] by way of shared memory.
DEVICE void rotate(const PlantedLaunch& launch, bool waits) {
    float* const shared = reinterpret_cast<float*>(shared_memory());
    const int i = thread_index();
    shared[i] = launch.in[i];
    if (waits) block_barrier();
    launch.out[i] = shared[(i + 1) % THREADS];
}
KERNEL(planted_sound, PlantedLaunch, 1) { rotate(launch, true); }
KERNEL(planted_missing_barrier, PlantedLaunch, 1) { rotate(launch, false); }
KERNEL(planted_barrier_not_for_all, PlantedLaunch, 1) {
    if (thread_index() % WARP == 0) launch.out[0] = shuffle_xor(1.0f, 1);
    block_barrier();
}
KERNEL(planted_disagreement, PlantedLaunch, 1) {
    launch.out[0] = thread_index() % 2 ? shuffle_xor(1.0f, 1) : shuffle_xor(1.0f, 2);
}
KERNEL(planted_read_beyond, PlantedLaunch, 1) { launch.out[0] = launch.in[launch.size]; }
KERNEL(planted_write_beyond, PlantedLaunch, 1) { launch.out[launch.size] = 1.0f; }
KERNEL(planted_shared_beyond, PlantedLaunch, 1) { shared_memory()[THREADS * 4] = 1; }
KERNEL(planted_unaligned, PlantedLaunch, 1) { store_16(launch.out + 1, uint4{}); }
DEVICE void copy_through(const PlantedLaunch& launch, bool waits) {
    float* const own = reinterpret_cast<float*>(shared_memory()) + 4 * (thread_index() % 32);
    if (thread_index() >= 32) return;
    cp_async_16(own, launch.in + 4 * thread_index(), 16);
    cp_async_commit();
    if (waits) cp_async_wait<0>();
    for (int j = 0; j < 4; ++j) launch.out[4 * thread_index() + j] = own[j];
    cp_async_wait<0>();
}
KERNEL(planted_copy, PlantedLaunch, 1) { copy_through(launch, true); }
KERNEL(planted_missing_wait, PlantedLaunch, 1) { copy_through(launch, false); }
KERNEL(planted_copy_unaligned, PlantedLaunch, 1) { cp_async_16(shared_memory(), launch.in + 1, 16); }
