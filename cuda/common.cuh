// Wraps the device for every kernel: 16-bit floats, tensor-core and copy instructions, barriers, as thin functions.
//
// A kernel's source uses only these functions of the device, so that the same source also runs on a CPU: with
// MUXTUNE_ON_HOST they come from the tests' host shim, which executes them in software and checks their use.
// No header of the CUDA toolkit is needed: NVRTC alone compiles every kernel. Needs sm_80.
// Constants shared with Python are macros (MUXTUNE_...): engine/kernels/constants.py has their values and meanings.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

struct bf16 {
    u16 bits;
};
struct fp16 {
    u16 bits;
};

#ifndef MUXTUNE_THREADS
#error "compile with the macros of engine/kernels/constants.py"
#endif
constexpr int WARP = MUXTUNE_WARP, THREADS = MUXTUNE_THREADS, WARPS = THREADS / WARP;  // of every block
constexpr int VECTOR_BYTES = MUXTUNE_VECTOR_BYTES;                                     // of one access

#ifdef MUXTUNE_ON_HOST
#include "host_device.h"
#else

#define DEVICE __device__ __forceinline__
// A kernel takes one struct, `launch`. Its registers are bounded so that this many blocks fit a multiprocessor.
#define KERNEL(name, Launch, blocks_per_multiprocessor)                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, blocks_per_multiprocessor)           \
        name(const __grid_constant__ Launch launch)

// --- floats -----------------------------------------------------------------------------------------------------
DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }
DEVICE float to_float(fp16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

template <typename T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) {
    return x;
}
template <>
DEVICE bf16 from_float<bf16>(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <>
DEVICE fp16 from_float<fp16>(float x) {
    fp16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Rounds x to the 10 bits of mantissa that the tensor cores read of a float.
DEVICE u32 to_tf32(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}
DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }

DEVICE u64 multiply_high(u64 a, u64 b) { return __umul64hi(a, b); }
DEVICE float exponential(float x) { return expf(x); }
DEVICE float logarithm(float x) { return logf(x); }
DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
DEVICE float square_root(float x) { return sqrtf(x); }
DEVICE double square_root(double x) { return sqrt(x); }
DEVICE float greater(float a, float b) { return fmaxf(a, b); }  // if one is NaN, the other

// --- tensor cores -----------------------------------------------------------------------------------------------
// C [16 x 8] += A [16 x 16] B [16 x 8]; fragments as the PTX ISA lays out mma.m16n8k16. Collective over the warp.
DEVICE void mma_16816(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, bf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_16816(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, fp16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// C [16 x 8] += A [16 x 8] B [8 x 8] of tf32.
DEVICE void mma_1688(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8, in shared memory.
DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }
DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void ldmatrix_x4_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// --- memory -----------------------------------------------------------------------------------------------------
// Copies the first `num_bytes` (0 to 16) at `source`, then zeros, to 16 bytes of shared memory; done once waited for.
DEVICE void cp_async_16(void* destination, const void* source, int num_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)), "l"(source),
                 "r"(num_bytes)
                 : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but this thread's newest `pending` groups are copied.
template <int pending>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
DEVICE uint4 load_16(const void* pointer) { return *static_cast<const uint4*>(pointer); }
DEVICE void store_16(void* pointer, uint4 value) { *static_cast<uint4*>(pointer) = value; }

extern __shared__ uint4 dynamic_shared_memory[];
DEVICE char* shared_memory() { return reinterpret_cast<char*>(dynamic_shared_memory); }

// --- threads ----------------------------------------------------------------------------------------------------
DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
DEVICE int num_blocks() { return static_cast<int>(gridDim.x); }
DEVICE void block_barrier() { __syncthreads(); }
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE int increment(int* counter) { return atomicAdd(counter, 1); }
DEVICE void device_fence() { __threadfence(); }
#endif

// N adjacent floats of device memory in one access; four of them are aligned to 16 bytes.
template <int N>
struct alignas(4 * N) Floats {
    float v[N];
};
template <int N>
DEVICE Floats<N> load_floats(const float* from) {
    return *reinterpret_cast<const Floats<N>*>(from);
}
template <int N>
DEVICE void store_floats(float* to, const Floats<N>& floats) {
    *reinterpret_cast<Floats<N>*>(to) = floats;
}

constexpr DEVICE int least(int a, int b) { return a < b ? a : b; }
constexpr DEVICE int greatest(int a, int b) { return a > b ? a : b; }
constexpr DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Returns whether this block is the last of `expected` to arrive; it then sees what the others wrote before. The
// counter must be zero at launch, and is zero again afterwards. Collective over the block; `flag` is one shared int.
DEVICE bool is_last_to_arrive(int* counter, int expected, int* flag) {
    device_fence();
    block_barrier();
    if (thread_index() == 0) {
        *flag = increment(counter) == expected - 1;
        if (*flag) *counter = 0;
        device_fence();
    }
    block_barrier();
    return *flag != 0;
}

// Returns the sum over the block's threads to all of them, in a fixed order; `shared` holds WARPS of T. Collective over
// the block.
template <typename T>
DEVICE T block_sum(T value, T* shared) {
    for (int mask = WARP / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    if (thread_index() % WARP == 0) shared[thread_index() / WARP] = value;
    block_barrier();
    T sum = shared[0];
    for (int warp = 1; warp < WARPS; ++warp) sum += shared[warp];
    block_barrier();
    return sum;
}
