// Dropout bits, as engine/kernels/dropout.py defines them: Philox4x64-10 (Salmon et al., SC'11), 16 lanes of 16 bits.
//
//     key = (task seed, step * 2^32 + site);   counter = (position * ceil(K / 16) + block, 0, 0, 0)
// Column c of the token at stream position p is lane c % 16 of block c / 16, little end first.
#pragma once
#include "common.cuh"

constexpr int LANES = MUXTUNE_DROPOUT_LANES;

struct DropoutKey {
    u64 seed, step_site;
    int threshold;  // a lane of at least this is kept; 0 keeps all: no dropout
};

DEVICE void philox_round(u64 (&x)[4], u64 key0, u64 key1) {
    constexpr u64 M0 = 0xD2E7470EE14C6C93ull, M1 = 0xCA5A826395121157ull;
    const u64 high0 = multiply_high(M0, x[0]), low0 = M0 * x[0], high1 = multiply_high(M1, x[2]), low1 = M1 * x[2];
    x[0] = high1 ^ x[1] ^ key0;
    x[1] = low1;
    x[2] = high0 ^ x[3] ^ key1;
    x[3] = low0;
}

// Returns whether each lane i of the block is kept, in bit i.
DEVICE u32 keep_bits(const DropoutKey& key, u64 counter) {
    u64 x[4] = {counter, 0, 0, 0};
    u64 key0 = key.seed, key1 = key.step_site;
#pragma unroll
    for (int i = 0; i < 10; ++i) {
        philox_round(x, key0, key1);
        key0 += 0x9E3779B97F4A7C15ull;
        key1 += 0xBB67AE8584CAA73Bull;
    }
    u32 bits = 0;
#pragma unroll
    for (int i = 0; i < LANES; ++i) {
        const int lane = static_cast<int>((x[i / 4] >> (16 * (i % 4))) & 0xFFFFu);
        bits |= (lane >= key.threshold ? 1u : 0u) << i;
    }
    return bits;
}
