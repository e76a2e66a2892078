// One warp's tensor-core step, mma.sync m16n8 with float32 accumulation (PTX ISA, "Warp Level Matrix Multiply-Accumulate").
//
// Fragments, in 32-bit words (two 16-bit elements or one TF32 element), with group = lane / 4 and member = lane % 4:
//     a: (row group, word member), (group + 8, member), (group, member + 4), (group + 8, member + 4)
//     b: (column group, word member), (group, member + 4)
//     c: (row group, column 2 member), (group, 2 member + 1), (group + 8, 2 member), (group + 8, 2 member + 1)
// so m16n8k16 of 16-bit types and m16n8k8 of TF32 read shared memory alike. The shim has a twin of warp_mma with the same
// layout, in which lanes read each other's fragments.
#pragma once

#include "common.cuh"

namespace ada2i {

struct MmaFloat16 {
    using Element = __half;
    __device__ static __half round(float v) { return __float2half_rn(v); }
#ifndef ADA2I_SHIM
    __device__ static void step(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
};

struct MmaBfloat16 {
    using Element = __nv_bfloat16;
    __device__ static __nv_bfloat16 round(float v) { return __float2bfloat16_rn(v); }
#ifndef ADA2I_SHIM
    __device__ static void step(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
};

struct MmaTf32 {
    using Element = float;
#ifdef ADA2I_SHIM
    static float round(float v) { return shim::round_tf32(v); }
#else
    __device__ static float round(float v) {
        uint32_t bits;
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
        return __uint_as_float(bits);
    }
    __device__ static void step(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
};

// c[m][n] += a[m] b[n] for 2 x NF fragments. Called by whole warps.
template <class Instruction, int NF>
__device__ __forceinline__ void warp_mma(float (&c)[2][NF][4], const uint32_t (&a)[2][4], const uint32_t (&b)[NF][2]) {
#ifdef ADA2I_SHIM
    shim::warp_mma<typename Instruction::Element, NF>(c, a, b);
#else
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < NF; ++n) Instruction::step(c[m][n], a[m], b[n]);
#endif
}

}  // namespace ada2i
