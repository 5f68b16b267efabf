// The functions of cuda/common.cuh in software: a kernel's source calls them if MUXTUNE_ON_HOST is set.
//
// Shared memory and device memory are the host's, so that sanitizers check every access. A copy by cp.async leaves
// poison until it is waited for; collective instructions check that all lanes run the same one.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "fibers.h"

#define DEVICE inline

struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

// --- kernels ----------------------------------------------------------------------------------------------------
struct Registered {
    void (*run)(const void*);
    std::size_t size;
};
inline std::map<std::string, Registered>& kernels() {
    static std::map<std::string, Registered> all;
    return all;
}
#define KERNEL(name, Launch, blocks_per_multiprocessor)                                                       \
    void name(const Launch& launch);                                                                          \
    [[maybe_unused]] static const bool name##_is_registered =                                                 \
        kernels()                                                                                             \
            .emplace(#name, Registered{[](const void* p) { name(*static_cast<const Launch*>(p)); }, sizeof(Launch)}) \
            .second;                                                                                          \
    void name(const Launch& launch)

// --- floats -----------------------------------------------------------------------------------------------------
inline u32 as_bits(float x) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float as_float(u32 bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return as_float(static_cast<u32>(x.bits) << 16); }
inline float to_float(fp16 x) {
    _Float16 y;
    std::memcpy(&y, &x, 2);
    return static_cast<float>(y);
}
template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
    if (std::isnan(x)) return bf16{0x7fff};
    const u32 bits = as_bits(x);
    return bf16{static_cast<u16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
}
template <>
inline fp16 from_float<fp16>(float x) {
    const _Float16 y = static_cast<_Float16>(x);
    fp16 z;
    std::memcpy(&z, &y, 2);
    return z;
}
inline u32 to_tf32(float x) {
    const u32 bits = as_bits(x);
    return std::isfinite(x) ? (bits + 0x1000) & ~0x1fffu : bits & ~0x1fffu;  // to nearest, ties away from zero
}
inline float exponential(float x) { return std::exp(x); }
inline float logarithm(float x) { return std::log(x); }
inline float hyperbolic_tangent(float x) { return std::tanh(x); }
inline float square_root(float x) { return std::sqrt(x); }
inline double square_root(double x) { return std::sqrt(x); }
inline float greater(float a, float b) { return std::fmax(a, b); }
inline u64 multiply_high(u64 a, u64 b) { return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64); }

// --- tensor cores -----------------------------------------------------------------------------------------------
enum Kind { MMA_BF16, MMA_FP16, MMA_TF32, LDMATRIX, LDMATRIX_TRANSPOSED, SHUFFLE };
using Slots = unsigned char[WARP_SIZE][64];

struct MmaOperands {
    u32 a[4], b[2];
    float c[4];
    u32 unused[6];
};
static_assert(sizeof(MmaOperands) == sizeof(Slots) / WARP_SIZE);
template <typename T>
float half_of(u32 two, int i) {
    return to_float(T{static_cast<u16>(two >> (16 * i))});
}

// Gathers all lanes' operands into matrices, multiplies them, and returns each lane's share (PTX ISA, mma).
template <int depth, typename At>
__attribute__((no_sanitize("address", "undefined"))) void multiply_fragments(Slots& inputs, Slots& outputs,
                                                                             const At& at) {
    float a[16][depth], b[8][depth];
    const auto* operands = reinterpret_cast<const MmaOperands*>(inputs);
    for (int lane = 0; lane < WARP_SIZE; ++lane) {
        const auto& own = operands[lane];
        at(own, lane / 4, lane % 4, a, b);
    }
    for (int lane = 0; lane < WARP_SIZE; ++lane) {
        float* d = reinterpret_cast<float*>(outputs[lane]);
        for (int i = 0; i < 4; ++i) {
            const float* row = a[lane / 4 + 8 * (i / 2)];
            const float* column = b[2 * (lane % 4) + i % 2];
            float sum = 0;
            for (int k = 0; k < depth; ++k) sum += row[k] * column[k];
            d[i] = operands[lane].c[i] + sum;
        }
    }
}

template <int depth, typename At>
void mma(Kind kind, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, const At& at) {
    MmaOperands own{};
    for (int i = 0; i < 4; ++i) own.a[i] = a[i], own.c[i] = c[i];
    own.b[0] = b0, own.b[1] = b1;
    const auto compute = [&](Slots& inputs, Slots& outputs) { multiply_fragments<depth>(inputs, outputs, at); };
    std::memcpy(c, block.exchange(kind, &own, sizeof own, compute), sizeof c);
}
template <typename T>
void gather_16(const MmaOperands& own, int group, int in_group, float (&a)[16][16], float (&b)[8][16]) {
    for (int i = 0; i < 8; ++i) {
        const int k = 2 * in_group + i % 2 + 8 * (i / 4), row = group + 8 * (i / 2 % 2);
        a[row][k] = half_of<T>(own.a[i / 2], i % 2);
    }
    for (int i = 0; i < 4; ++i) b[group][2 * in_group + i % 2 + 8 * (i / 2)] = half_of<T>(own.b[i / 2], i % 2);
}
inline void mma_16816(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, bf16) {
    mma<16>(MMA_BF16, c, a, b0, b1, gather_16<bf16>);
}
inline void mma_16816(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, fp16) {
    mma<16>(MMA_FP16, c, a, b0, b1, gather_16<fp16>);
}
inline void mma_1688(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const auto gather = [](const MmaOperands& own, int group, int in_group, float (&a)[16][8], float (&b)[8][8]) {
        for (int i = 0; i < 4; ++i) a[group + 8 * (i % 2)][in_group + 4 * (i / 2)] = as_float(own.a[i] & ~0x1fffu);
        for (int i = 0; i < 2; ++i) b[group][in_group + 4 * i] = as_float(own.b[i] & ~0x1fffu);
    };
    mma<8>(MMA_TF32, c, a, b0, b1, gather);
}

inline void ldmatrix(Kind kind, u32 (&r)[4], const void* row) {
    if (reinterpret_cast<std::uintptr_t>(row) % 16) fail("ldmatrix: a row is not aligned to 16 bytes");
    const auto compute = [kind](Slots& inputs, Slots& outputs) {
        for (int matrix = 0; matrix < 4; ++matrix)
            for (int i = 0; i < 64; ++i) {
                const int line = i / 8, at = i % 8;
                const u16* from;
                std::memcpy(&from, inputs[8 * matrix + line], sizeof from);
                const int row = kind == LDMATRIX ? line : at, column = kind == LDMATRIX ? at : line;
                std::memcpy(outputs[4 * row + column / 2] + 4 * matrix + 2 * (column % 2), from + at, 2);
            }
    };
    std::memcpy(r, block.exchange(kind, &row, sizeof row, compute), sizeof r);
}
inline void ldmatrix_x4(u32 (&r)[4], const void* row) { ldmatrix(LDMATRIX, r, row); }
inline void ldmatrix_x4_transposed(u32 (&r)[4], const void* row) { ldmatrix(LDMATRIX_TRANSPOSED, r, row); }

// --- threads ----------------------------------------------------------------------------------------------------
struct Copy {
    void* to;
    const void* from;
    int num_bytes;
};
struct Launched {
    int num_threads = 0, num_blocks = 0, block_index = 0;
    char* shared_memory = nullptr;
    std::vector<std::vector<std::vector<Copy>>> copies;  // by thread: groups, the newest not yet committed
};
inline Launched launched;

inline int thread_index() { return block.current; }
inline int num_threads() { return launched.num_threads; }
inline int block_index() { return launched.block_index; }
inline int num_blocks() { return launched.num_blocks; }
inline char* shared_memory() { return launched.shared_memory; }
inline void block_barrier() { block.barrier(); }
inline void device_fence() {}
inline int increment(int* counter) { return (*counter)++; }
template <typename T>
T shuffle_xor(T value, int mask) {
    const auto compute = [mask](Slots& inputs, Slots& outputs) {
        for (int lane = 0; lane < WARP_SIZE; ++lane) std::memcpy(outputs[lane], inputs[lane ^ mask], sizeof(T));
    };
    T result;
    std::memcpy(&result, block.exchange(SHUFFLE + 1 + mask, &value, sizeof value, compute), sizeof result);
    return result;
}

// --- memory -----------------------------------------------------------------------------------------------------
inline void perform(const Copy& copy) {
    std::memset(copy.to, 0, 16);
    if (copy.num_bytes) std::memcpy(copy.to, copy.from, copy.num_bytes);
}
inline void cp_async_16(void* to, const void* from, int num_bytes) {
    if (reinterpret_cast<std::uintptr_t>(to) % 16 || reinterpret_cast<std::uintptr_t>(from) % 16)
        fail("cp.async: an address is not aligned to 16 bytes");
    if (num_bytes < 0 || num_bytes > 16) fail("cp.async: more than 16 bytes");
    std::memset(to, 0xff, 16);
    const Copy copy{to, from, num_bytes};
    if (block.is_random && block.random() % 2) return perform(copy);  // it may complete at any time until waited for
    launched.copies[block.current].back().push_back(copy);
}
inline void cp_async_commit() { launched.copies[block.current].emplace_back(); }
template <int pending>
void cp_async_wait() {
    auto& groups = launched.copies[block.current];
    const int done = static_cast<int>(groups.size()) - 1 - pending;
    for (int i = 0; i < done; ++i)
        for (const Copy& copy : groups[i]) perform(copy);
    if (done > 0) groups.erase(groups.begin(), groups.begin() + done);
}
inline uint4 load_16(const void* pointer) { return *static_cast<const uint4*>(pointer); }
inline void store_16(void* pointer, uint4 value) { *static_cast<uint4*>(pointer) = value; }
