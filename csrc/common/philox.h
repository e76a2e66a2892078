// Philox4x32-10 (Salmon et al., SC 2011): the dropout mask that every backend draws; ada2i_fast/ops/dropout.py defines it.
//
// The element in row n and column d of stream j takes word d % 4 of the block with counter (d / 4, n low 32 bits, n high 32
// bits, j) under key (seed low 32 bits, seed high 32 bits), and is kept where that word is at least round(p 2^32).
//
// Host and device neutral, and of internal linkage: the CPU tiers are compiled for different instruction sets and may share
// no inline code.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ADA2I_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ADA2I_HOST_DEVICE inline
#endif

// Writes the four words of one block: the columns 4 * block .. 4 * block + 3 of row n.
static ADA2I_HOST_DEVICE void ada2i_philox(uint64_t seed, uint32_t block, uint64_t row, uint32_t stream, uint32_t words[4]) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    uint32_t c0 = block, c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(row >> 32), c3 = stream;
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u;
        const uint64_t b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0;
        c1 = static_cast<uint32_t>(b);
        c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1;
        c3 = static_cast<uint32_t>(a);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}
