// Matrix products of one block: C [BM, BN] += A [BM, K] B [BN, K]^T with operands that are computed as they are read.
//
// An operand is a functor. `quad(outer, inner, v)` gives four consecutive elements along its fast axis and zero outside its
// bounds; kFast says whether that axis is the product's K or its own row index. So u w^T, masked gradients and columns of
// ones never exist in global memory.
//
// A tile (FmaTile, MmaTile) keeps C in registers behind one interface: put_a, put_b, multiply, each.
#pragma once

#include "common.cuh"
#include "mma.cuh"

namespace ada2i {

// float32 arithmetic on registers: each thread owns TM x 4 elements. Shared memory holds K-major operands, [kDepth][BM + 4],
// whose reads are broadcasts (A) and consecutive (B).
template <int BM, int BN> class FmaTile {
  public:
    static constexpr int kM = BM, kN = BN, kDepth = 16;
    static constexpr int kBytes = kDepth * (BM + 4 + BN + 4) * 4;

    __device__ explicit FmaTile(void* shared) : a_(static_cast<float*>(shared)), b_(a_ + kDepth * (BM + 4)) { clear(); }

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < TM; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) c_[i][j] = 0.0f;
    }
    template <bool KFast> __device__ void put_a(int i, int k, const float (&v)[4]) { put<KFast, BM + 4>(a_, i, k, v); }
    template <bool KFast> __device__ void put_b(int i, int k, const float (&v)[4]) { put<KFast, BN + 4>(b_, i, k, v); }

    __device__ void multiply() {
        const float* a = a_ + threadIdx.x / TX * TM;
        const float* b = b_ + threadIdx.x % TX * 4;
#pragma unroll
        for (int k = 0; k < kDepth; ++k, a += BM + 4, b += BN + 4) {
            float av[TM], bv[4];
#pragma unroll
            for (int i = 0; i < TM; ++i) av[i] = a[i];
#pragma unroll
            for (int j = 0; j < 4; ++j) bv[j] = b[j];
#pragma unroll
            for (int i = 0; i < TM; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) c_[i][j] = fmaf(av[i], bv[j], c_[i][j]);
        }
    }
    // f(row, column, value, value of column + 1) for the thread's elements; columns are even.
    template <class F> __device__ void each(F f) const {
#pragma unroll
        for (int i = 0; i < TM; ++i)
#pragma unroll
            for (int j = 0; j < 4; j += 2)
                f(static_cast<int>(threadIdx.x / TX * TM + i), static_cast<int>(threadIdx.x % TX * 4 + j), c_[i][j], c_[i][j + 1]);
    }

  private:
    static constexpr int TX = BN / 4, TM = BM * BN / kThreads / 4;

    template <bool KFast, int Stride> __device__ static void put(float* s, int i, int k, const float (&v)[4]) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[(KFast ? k + e : k) * Stride + (KFast ? i : i + e)] = v[e];
    }
    float *a_, *b_;
    float c_[TM][4];
};

// Tensor cores: warps side by side, each 32 rows high, in steps of mma.sync m16n8. Shared memory holds row-major operands in
// 32-bit words, 16 of them plus 4 of padding per row: a warp's fragment reads (row stride 20 words) touch each bank once.
template <class Instruction, int BM, int BN> class MmaTile {
    using Element = typename Instruction::Element;
    static constexpr int kWords = 16, kStride = kWords + 4, kPerWord = 4 / sizeof(Element);
    static constexpr int kWarpsM = BM / 32, kWarpsN = kThreads / 32 / kWarpsM;
    static constexpr int NF = BN / kWarpsN / 8;

  public:
    static constexpr int kM = BM, kN = BN, kDepth = kWords * kPerWord;
    static constexpr int kBytes = (BM + BN) * kStride * 4;

    __device__ explicit MmaTile(void* shared) : a_(static_cast<uint32_t*>(shared)), b_(a_ + BM * kStride) { clear(); }

    __device__ void clear() {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < NF; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) c_[m][n][i] = 0.0f;
    }
    template <bool KFast> __device__ void put_a(int i, int k, const float (&v)[4]) { put<KFast>(a_, i, k, v); }
    template <bool KFast> __device__ void put_b(int i, int k, const float (&v)[4]) { put<KFast>(b_, i, k, v); }

    __device__ void multiply() {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, member = lane % 4;
        const uint32_t* a = a_ + (warp / kWarpsN * 32 + group) * kStride + member;
        const uint32_t* b = b_ + (warp % kWarpsN * (BN / kWarpsN) + group) * kStride + member;
#pragma unroll
        for (int k = 0; k < kWords; k += 8) {
            uint32_t af[2][4], bf[NF][2];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) af[m][i] = a[(m * 16 + i % 2 * 8) * kStride + k + i / 2 * 4];
#pragma unroll
            for (int n = 0; n < NF; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) bf[n][i] = b[n * 8 * kStride + k + i * 4];
            warp_mma<Instruction, NF>(c_, af, bf);
        }
    }
    template <class F> __device__ void each(F f) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int row = warp / kWarpsN * 32 + lane / 4, column = warp % kWarpsN * (BN / kWarpsN) + lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < NF; ++n)
#pragma unroll
                for (int i = 0; i < 4; i += 2)
                    f(row + m * 16 + i * 4, column + n * 8, c_[m][n][i], c_[m][n][i + 1]);
    }

  private:
    template <bool KFast> __device__ static void put(uint32_t* s, int i, int k, const float (&v)[4]) {
        if (KFast) {
            Pack<Element, 4> pack;
#pragma unroll
            for (int e = 0; e < 4; ++e) pack.e[e] = Instruction::round(v[e]);
            *reinterpret_cast<Pack<Element, 4>*>(reinterpret_cast<Element*>(s + i * kStride) + k) = pack;
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) reinterpret_cast<Element*>(s + (i + e) * kStride)[k] = Instruction::round(v[e]);
        }
    }
    uint32_t *a_, *b_;
    float c_[2][NF][4];
};

// tile += A[m0 .. m0 + kM, begin .. end] B[n0 .. n0 + kN, begin .. end]^T. Called by the whole block. The next slice is read
// from global memory while this one is multiplied. Ends with a barrier: shared memory is free afterwards.
template <class Tile, class A, class B>
__device__ __forceinline__ void product(Tile& tile, const A& a, const B& b, int64_t m0, int64_t n0, int64_t begin, int64_t end) {
    constexpr int D = Tile::kDepth;
    constexpr int QA = Tile::kM * D / 4 / kThreads, QB = Tile::kN * D / 4 / kThreads;
    float va[QA][4], vb[QB][4];

    // B first: A may store what it computes, and no load can be moved up across a store.
    const auto fetch = [&](int64_t k0) {
#pragma unroll
        for (int q = 0; q < QB; ++q) {
            const int t = q * kThreads + threadIdx.x;
            if (B::kFast) b.quad(n0 + t / (D / 4), k0 + t % (D / 4) * 4, vb[q]);
            else b.quad(k0 + t / (Tile::kN / 4), n0 + t % (Tile::kN / 4) * 4, vb[q]);
        }
#pragma unroll
        for (int q = 0; q < QA; ++q) {
            const int t = q * kThreads + threadIdx.x;
            if (A::kFast) a.quad(m0 + t / (D / 4), k0 + t % (D / 4) * 4, va[q]);
            else a.quad(k0 + t / (Tile::kM / 4), m0 + t % (Tile::kM / 4) * 4, va[q]);
        }
    };
    if (begin < end) fetch(begin);
    for (int64_t k0 = begin; k0 < end; k0 += D) {
#pragma unroll
        for (int q = 0; q < QA; ++q) {
            const int t = q * kThreads + threadIdx.x;
            if (A::kFast) tile.template put_a<true>(t / (D / 4), t % (D / 4) * 4, va[q]);
            else tile.template put_a<false>(t % (Tile::kM / 4) * 4, t / (Tile::kM / 4), va[q]);
        }
#pragma unroll
        for (int q = 0; q < QB; ++q) {
            const int t = q * kThreads + threadIdx.x;
            if (B::kFast) tile.template put_b<true>(t / (D / 4), t % (D / 4) * 4, vb[q]);
            else tile.template put_b<false>(t % (Tile::kN / 4) * 4, t / (Tile::kN / 4), vb[q]);
        }
        __syncthreads();
        if (k0 + D < end) fetch(k0 + D);
        tile.multiply();
        __syncthreads();
    }
}

// Operand: a row-major matrix [outer, inner] in global memory. KFast: its inner axis is the product's K.
template <class T, bool KFast> struct Matrix {
    static constexpr bool kFast = KFast;
    const T* p;
    int64_t outer, inner;
    bool vector;   // p aligned to four elements and inner a multiple of four

    __device__ __forceinline__ void quad(int64_t o, int64_t i, float (&v)[4]) const {
        load<4>(p + o * inner + i, o < outer ? inner - i : 0, vector, v);
    }
};

// Operand: the same with a column of ones appended, which turns the column sums of the other operand (bias gradients) into
// one more column of the product.
template <class T> struct MatrixAndOnes {
    static constexpr bool kFast = false;
    const T* p;
    int64_t outer, inner;
    bool vector;

    __device__ __forceinline__ void quad(int64_t o, int64_t i, float (&v)[4]) const {
        load<4>(p + o * inner + i, o < outer ? inner - i : 0, vector, v);
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (i + e == inner && o < outer) v[e] = 1.0f;
    }
};

// The tile that multiplies in a storage type, and that type.
struct Float32 {
    using Storage = float;
    template <int BM, int BN> using Tile = FmaTile<BM, BN>;
};
struct Tf32 {
    using Storage = float;
    template <int BM, int BN> using Tile = MmaTile<MmaTf32, BM, BN>;
};
struct Float16 {
    using Storage = __half;
    template <int BM, int BN> using Tile = MmaTile<MmaFloat16, BM, BN>;
};
struct Bfloat16 {
    using Storage = __nv_bfloat16;
    template <int BM, int BN> using Tile = MmaTile<MmaBfloat16, BM, BN>;
};

// Calls f(policy) for the element type of the arguments.
template <class F> cudaError_t with_dtype(int32_t dtype, F f) {
    switch (dtype) {
        case kFloat32: return f(Float32{});
        case kFloat16: return f(Float16{});
        case kBfloat16: return f(Bfloat16{});
        case kTf32: return f(Tf32{});
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace ada2i
