// Tensor-ring attention and the gate of AFW on packed rows: device code. The algebra, the names and the shapes are those of
// ada2i_fast/ops/tensor_ring.py; j counts modalities, n rows, b dialogues, (k, o) the rank.
//
// Forward, three launches: the mean over a dialogue lies between two passes over the rows, and its fixed order of summation
// (no atomics) is a pass of its own.
//     project_kernel    q1, q2, k1, k2 of 32 rows; sum of u v^T over each dialogue's rows in the tile ("segment")
//     average_kernel    A_j[b] = s / N_b  sum of the dialogue's segments, in order
//     map_kernel        w = s C^T v per row, att = W (u x w) + c as a product over R^2, gate, dropout
// Backward, five (four for one modality):
//     map_backward_kernel    g_att; S = g_att W, contracted at once to g_u, g_w; segments of g_C
//     ring_backward_kernel   g_C from its segments; g_A by the product rule around the ring
//     input_kernel           g_u, g_v through C and A; [g_q1 ..]; g_x = g_gated (att + beta) + P^T [g_q1 ..]
//     weight_kernel          pieces over rows of g_W, g_c, g_P, g_p
//     weight_sum_kernel      their sums, in order
//
// A segment is the part of a dialogue inside one tile of 32 rows. Tile t and dialogue b meet in segment t + b: walking along
// the rows, each border between tiles or dialogues raises one of the two, so the numbers never repeat.
#pragma once

#include "tile.cuh"

namespace ada2i {

constexpr int kSegmentRows = 32;

__host__ __device__ inline int64_t weight_elements(int rank, int64_t width) {
    return width * (rank * rank + 1) + 4 * rank * (width + 1);
}

// kk -> (k, o) with kk = k R + o. Exact for kk < 2048, R <= 32: the rounded-up reciprocal is off by less than 1 / R there.
struct RankPair {
    int rank;
    uint32_t reciprocal;
    __device__ explicit RankPair(int r) : rank(r), reciprocal((65536u + r - 1) / r) {}
    __device__ __forceinline__ void split(int kk, int& k, int& o) const {
        k = static_cast<int>(kk * reciprocal >> 16);
        o = kk - k * rank;
    }
};

// The dialogue of row n: the last b with offsets[b] <= n, so empty dialogues own nothing.
__device__ inline int dialogue_of(const int64_t* offsets, int64_t dialogues, int64_t n) {
    int64_t low = 0, high = dialogues - 1;
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (offsets[middle] <= n) low = middle;
        else high = middle - 1;
    }
    return static_cast<int>(low);
}

// dialogue[r] of rows row0 .. row0 + ROWS, -1 beyond the last. Needs a barrier before it is read.
template <int ROWS> __device__ void find_dialogues(const TensorRing& a, int64_t row0, int* dialogue) {
    for (int r = threadIdx.x; r < ROWS; r += kThreads)
        dialogue[r] = row0 + r < a.rows ? dialogue_of(a.offsets, a.dialogues, row0 + r) : -1;
}

// u = q1 * k1 and v = q2 * k2 of ROWS rows, [ROWS, R] each, 0 beyond the last row. Needs a barrier before they are read.
template <class T, int ROWS> __device__ void load_cores(const TensorRing& a, int j, int64_t row0, float* u, float* v) {
    const int R = a.rank;
    const T* proj = static_cast<const T*>(a.proj[j]);
    for (int i = threadIdx.x; i < ROWS * R; i += kThreads) {
        const int64_t n = row0 + i / R;
        float core_u = 0.0f, core_v = 0.0f;
        if (n < a.rows) {
            const T* p = proj + n * 4 * R + i % R;
            core_u = to_float(p[0]) * to_float(p[2 * R]);
            core_v = to_float(p[R]) * to_float(p[3 * R]);
        }
        u[i] = core_u;
        v[i] = core_v;
    }
}

// out[r] = matrix[dialogue[r]]^T in[r] (or matrix in[r]) for [ROWS, R] vectors; rows without a dialogue give 0. Barriers are
// the caller's.
template <int ROWS, bool Transpose, bool Accumulate = false>
__device__ void apply(const float* matrix, const int* dialogue, int R, const float* in, float* out) {
    for (int i = threadIdx.x; i < ROWS * R; i += kThreads) {
        const int r = i / R, c = i - r * R;
        float sum = Accumulate ? out[i] : 0.0f;
        if (dialogue[r] >= 0) {
            const float* m = matrix + static_cast<int64_t>(dialogue[r]) * R * R + (Transpose ? c : c * R);
            for (int k = 0; k < R; ++k) sum = fmaf(m[Transpose ? k * R : k], in[r * R + k], sum);
        }
        out[i] = sum;
    }
}

// w = s (A_l A_o ..)^T v around the ring, in w0 or w1; the result says which. `v` may be w1. Ends with a barrier.
template <int ROWS>
__device__ float* contract(const TensorRing& a, int j, const int* dialogue, const float* v, float* w0, float* w1) {
    for (int i = threadIdx.x; i < ROWS * a.rank; i += kThreads) w0[i] = a.scale * v[i];
    __syncthreads();
    for (int l = 0; l < a.count - 1; ++l) {
        apply<ROWS, true>(a.average[a.ring[j][l]], dialogue, a.rank, w0, w1);
        __syncthreads();
        float* const swap = w0;
        w0 = w1;
        w1 = swap;
    }
    return w0;
}

// Writes the sum of left right^T over each dialogue's rows inside the tile to its segment. left, right: [32, R].
__device__ inline void sum_segments(const TensorRing& a, int j, int64_t tile, int count, const int* dialogue,
                                    const float* left, const float* right) {
    const int R = a.rank;
    for (int i = threadIdx.x; i < R * R; i += kThreads) {
        const int k = i / R, o = i - k * R;
        for (int r = 0; r < count;) {
            const int b = dialogue[r];
            float sum = 0.0f;
            for (; r < count && dialogue[r] == b; ++r) sum = fmaf(left[r * R + k], right[r * R + o], sum);
            a.segment[j][(tile + b) * R * R + i] = sum;
        }
    }
}

// Element i of the sum of dialogue b's segments, first row to last.
__device__ inline float dialogue_sum(const TensorRing& a, int j, int64_t b, int i) {
    const int RR = a.rank * a.rank;
    const int64_t begin = a.offsets[b], end = a.offsets[b + 1];
    float sum = 0.0f;
    if (begin < end) {
        const int64_t last = (end - 1) / kSegmentRows;
#pragma unroll 8
        for (int64_t t = begin / kSegmentRows; t <= last; ++t) sum += a.segment[j][(t + b) * RR + i];
    }
    return sum;
}

// Multiplies two neighbouring elements (n, d), (n, d + 1), d even, by their dropout mask.
__device__ __forceinline__ void drop_pair(const TensorRing& a, int j, int64_t n, int64_t d, float (&v)[2]) {
    if (a.seed == nullptr) return;
    uint32_t words[4];
    ada2i_philox(static_cast<uint64_t>(*a.seed), static_cast<uint32_t>(d / 4), static_cast<uint64_t>(n), j, words);
    const bool upper = d % 4 != 0;
    v[0] = (upper ? words[2] : words[0]) >= a.threshold ? v[0] * a.keep_scale : 0.0f;
    v[1] = (upper ? words[3] : words[1]) >= a.threshold ? v[1] * a.keep_scale : 0.0f;
}

__device__ __forceinline__ void drop_quad(const TensorRing& a, int j, int64_t n, int64_t d, float (&v)[4]) {
    if (a.seed == nullptr) return;
    uint32_t words[4];
    ada2i_philox(static_cast<uint64_t>(*a.seed), static_cast<uint32_t>(d / 4), static_cast<uint64_t>(n), j, words);
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = words[e] >= a.threshold ? v[e] * a.keep_scale : 0.0f;
}

// ---------------------------------------------------------------------------------------------------------------- forward

// Block: 32 rows, modality y. Shared: tile, proj [32, 4R], u, v [32, R], dialogue [32].
template <class P> using ProjectTile = typename P::template Tile<kSegmentRows, 64>;

template <class P> __host__ __device__ inline int64_t project_bytes(int rank) {
    return ProjectTile<P>::kBytes + kSegmentRows * (6 * rank + 1) * 4;
}

template <class P> __global__ void __launch_bounds__(kThreads) project_kernel(const __grid_constant__ TensorRing a) {
    using T = typename P::Storage;
    ADA2I_DYNAMIC_SHARED(shared);
    const int j = blockIdx.y, R = a.rank;
    const int64_t tile_index = blockIdx.x, row0 = tile_index * kSegmentRows, D = a.width[j];
    float* const proj = reinterpret_cast<float*>(shared + ProjectTile<P>::kBytes);
    float* const u = proj + kSegmentRows * 4 * R;
    float* const v = u + kSegmentRows * R;
    int* const dialogue = reinterpret_cast<int*>(v + kSegmentRows * R);

    find_dialogues<kSegmentRows>(a, row0, dialogue);
    const bool vector = a.vector[j];
    const Matrix<T, true> x{static_cast<const T*>(a.x[j]), a.rows, D, vector};
    const Matrix<T, true> weight{static_cast<const T*>(a.proj_weight[j]), 4 * R, D, vector};
    const T* const bias = static_cast<const T*>(a.proj_bias[j]);
    T* const saved = static_cast<T*>(a.proj[j]);
    ProjectTile<P> tile(shared);
    for (int c0 = 0; c0 < 4 * R; c0 += ProjectTile<P>::kN) {
        tile.clear();
        product(tile, x, weight, row0, c0, 0, D);
        tile.each([&](int row, int column, float v0, float v1) {
            const int64_t n = row0 + row;
            const int c = c0 + column;
            if (c >= 4 * R) return;   // 4R is even: both or none
            // Rounded before use, so that forward and backward see the same numbers.
            const T first = from_float<T>(v0 + to_float(bias[c])), second = from_float<T>(v1 + to_float(bias[c + 1]));
            proj[row * 4 * R + c] = to_float(first);
            proj[row * 4 * R + c + 1] = to_float(second);
            if (n < a.rows) {
                saved[n * 4 * R + c] = first;
                saved[n * 4 * R + c + 1] = second;
            }
        });
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kSegmentRows * R; i += kThreads) {
        const float* p = proj + i / R * 4 * R + i % R;
        u[i] = p[0] * p[2 * R];
        v[i] = p[R] * p[3 * R];
    }
    __syncthreads();
    const int64_t left = a.rows - row0;
    sum_segments(a, j, tile_index, static_cast<int>(left < kSegmentRows ? left : kSegmentRows), dialogue, u, v);
}

// Block: dialogue x, modality y.
__global__ void __launch_bounds__(kThreads) average_kernel(const __grid_constant__ TensorRing a) {
    const int j = blockIdx.y, RR = a.rank * a.rank;
    const int64_t b = blockIdx.x, length = a.offsets[b + 1] - a.offsets[b];
    const float factor = a.scale / static_cast<float>(length > 0 ? length : 1);
    for (int i = threadIdx.x; i < RR; i += kThreads) a.average[j][b * RR + i] = factor * dialogue_sum(a, j, b, i);
}

// Operand: row n of u w^T, flattened over kk = k R + o; u and w are in shared memory.
struct Outer {
    static constexpr bool kFast = true;
    const float *u, *w;
    RankPair pair;

    __device__ __forceinline__ void quad(int64_t row, int64_t kk, float (&v)[4]) const {
        const int R = pair.rank, r = static_cast<int>(row);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            int k, o;
            pair.split(static_cast<int>(kk) + e, k, o);
            v[e] = k < R ? u[r * R + k] * w[r * R + o] : 0.0f;
        }
    }
};

// Block: 64 rows x, 64 features y, modality z. Shared: tile, u, w0, w1 [64, R], dialogue [64].
template <class P> using MapTile = typename P::template Tile<64, 64>;

template <class P> __host__ __device__ inline int64_t map_bytes(int rank) { return MapTile<P>::kBytes + 64 * (3 * rank + 1) * 4; }

template <class P> __global__ void __launch_bounds__(kThreads) map_kernel(const __grid_constant__ TensorRing a) {
    using T = typename P::Storage;
    ADA2I_DYNAMIC_SHARED(shared);
    const int j = blockIdx.z, R = a.rank;
    const int64_t row0 = static_cast<int64_t>(blockIdx.x) * 64, column0 = static_cast<int64_t>(blockIdx.y) * 64;
    const int64_t D = a.width[j];
    if (column0 >= D) return;
    float* const u = reinterpret_cast<float*>(shared + MapTile<P>::kBytes);
    float* const w0 = u + 64 * R;
    float* const w1 = w0 + 64 * R;
    int* const dialogue = reinterpret_cast<int*>(w1 + 64 * R);

    find_dialogues<64>(a, row0, dialogue);
    load_cores<T, 64>(a, j, row0, u, w1);
    __syncthreads();
    const float* const w = contract<64>(a, j, dialogue, w1, w0, w1);

    MapTile<P> tile(shared);
    product(tile, Outer{u, w, RankPair(R)},
            Matrix<T, true>{static_cast<const T*>(a.map_weight[j]), D, R * R, a.map_vector[j] != 0}, 0, column0, 0, R * R);

    const bool vector = a.vector[j];
    const T* const x = static_cast<const T*>(a.x[j]);
    const T* const bias = static_cast<const T*>(a.map_bias[j]);
    tile.each([&](int row, int column, float v0, float v1) {
        const int64_t n = row0 + row, d = column0 + column, at = n * D + d, valid = D - d;
        if (n >= a.rows || valid <= 0) return;
        float b[2], xs[2], gated[2];
        load<2>(bias + d, valid, false, b);
        load<2>(x + at, valid, vector, xs);
        const float attention[2] = {v0 + b[0], v1 + b[1]};
#pragma unroll
        for (int e = 0; e < 2; ++e) gated[e] = attention[e] * xs[e] + a.beta * xs[e];
        store<2>(static_cast<T*>(a.attention[j]) + at, valid, vector, attention);
        if (a.target[j] != nullptr) store<2>(static_cast<T*>(a.target[j]) + at, valid, vector, gated);
        drop_pair(a, j, n, d, gated);
        store<2>(static_cast<T*>(a.out[j]) + at, valid, vector, gated);
    });
}

// --------------------------------------------------------------------------------------------------------------- backward

// Operand: g_att. The first pass over it computes it and keeps it in scratch, later passes read that.
template <class T> struct GradAttention {
    static constexpr bool kFast = true;
    const TensorRing& a;
    int j;
    bool first;

    __device__ __forceinline__ void quad(int64_t n, int64_t d, float (&v)[4]) const {
        const int64_t D = a.width[j], at = n * D + d, valid = n < a.rows ? D - d : 0;
        const bool vector = a.vector[j];
        T* const kept = static_cast<T*>(a.grad_attention[j]) + at;
        if (!first) {
            load<4>(kept, valid, vector, v);
            return;
        }
        float x[4], t[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        load<4>(static_cast<const T*>(a.grad_out[j]) + at, valid, vector, v);
        load<4>(static_cast<const T*>(a.x[j]) + at, valid, vector, x);
        if (a.grad_target[j] != nullptr) load<4>(static_cast<const T*>(a.grad_target[j]) + at, valid, vector, t);
        if (valid > 0) drop_quad(a, j, n, d, v);
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = a.gated_target ? (v[e] + t[e]) * x[e] : v[e] * x[e] + t[e];
        store<4>(kept, valid, vector, v);
    }
};

// Block: 32 rows x, modality y. Shared: tile, or S [32, 128] where the tile was; u, v, w0, w1, g_u, g_w [32, R]; dialogue.
template <class P> using MapBackwardTile = typename P::template Tile<kSegmentRows, 128>;
constexpr int kSliceStride = 128 + 1;

template <class P> __host__ __device__ constexpr int64_t slice_bytes() {
    constexpr int slice = kSegmentRows * kSliceStride * 4;
    return MapBackwardTile<P>::kBytes > slice ? MapBackwardTile<P>::kBytes : slice;
}
template <class P> __host__ __device__ inline int64_t map_backward_bytes(int rank) {
    return slice_bytes<P>() + kSegmentRows * (6 * rank + 1) * 4;
}

template <class P> __global__ void __launch_bounds__(kThreads) map_backward_kernel(const __grid_constant__ TensorRing a) {
    using T = typename P::Storage;
    using Tile = MapBackwardTile<P>;
    ADA2I_DYNAMIC_SHARED(shared);
    const int j = blockIdx.y, R = a.rank, size = kSegmentRows * R;
    const int64_t tile_index = blockIdx.x, row0 = tile_index * kSegmentRows, D = a.width[j];
    float* const slice = reinterpret_cast<float*>(shared);
    float* const u = reinterpret_cast<float*>(shared + slice_bytes<P>());
    float *const v = u + size, *const w0 = v + size, *const w1 = w0 + size, *const grad_u = w1 + size, *const grad_w = grad_u + size;
    int* const dialogue = reinterpret_cast<int*>(grad_w + size);

    find_dialogues<kSegmentRows>(a, row0, dialogue);
    load_cores<T, kSegmentRows>(a, j, row0, u, v);
    for (int i = threadIdx.x; i < size; i += kThreads) grad_u[i] = grad_w[i] = 0.0f;
    __syncthreads();
    const float* const w = contract<kSegmentRows>(a, j, dialogue, v, w0, w1);

    Tile tile(shared);
    for (int c0 = 0; c0 < R * R; c0 += Tile::kN) {
        tile.clear();
        product(tile, GradAttention<T>{a, j, c0 == 0},
                Matrix<T, false>{static_cast<const T*>(a.map_weight[j]), D, R * R, a.map_vector[j] != 0}, row0, c0, 0, D);
        tile.each([&](int row, int column, float v0, float v1) {
            slice[row * kSliceStride + column] = v0;
            slice[row * kSliceStride + column + 1] = v1;
        });
        __syncthreads();
        // This slice of S holds kk = c0 .. end. Each (row, k) and (row, o) belongs to one thread throughout.
        const int end = c0 + Tile::kN < R * R ? c0 + Tile::kN : R * R;
        for (int i = threadIdx.x; i < size; i += kThreads) {
            const int r = i / R, c = i - r * R;
            const float* s = slice + r * kSliceStride - c0;
            float sum_u = grad_u[i], sum_w = grad_w[i];
            for (int o = 0; o < R; ++o) {
                const int kk = c * R + o;
                if (kk >= c0 && kk < end) sum_u = fmaf(s[kk], w[r * R + o], sum_u);
            }
            for (int k = c0 / R; k < R && k * R + c < end; ++k)
                if (k * R + c >= c0) sum_w = fmaf(s[k * R + c], u[r * R + k], sum_w);
            grad_u[i] = sum_u;
            grad_w[i] = sum_w;
        }
        __syncthreads();
    }

    const int64_t left = a.rows - row0;
    const int count = static_cast<int>(left < kSegmentRows ? left : kSegmentRows);
    for (int i = threadIdx.x; i < count * R; i += kThreads) {
        const int64_t at = (row0 + i / R) * 2 * R + i % R;
        a.cores[j][at] = u[i];
        a.cores[j][at + R] = w[i];
        a.grad_cores[j][at] = grad_u[i];
        a.grad_cores[j][at + R] = grad_w[i];
    }
    if (a.count > 1) sum_segments(a, j, tile_index, count, dialogue, v, grad_w);
}

// Block: dialogue x, modality y = l. For every ring A_1 .. A_m that holds A_l at place i,
//     g_A_l += (A_1 .. A_{i-1})^T g_C (A_{i+1} .. A_m)^T.       Shared: three [R, R].
__host__ __device__ inline int64_t ring_backward_bytes(int rank) { return 3 * rank * rank * 4; }

__global__ void __launch_bounds__(kThreads) ring_backward_kernel(const __grid_constant__ TensorRing a) {
    ADA2I_DYNAMIC_SHARED(shared);
    const int target = blockIdx.y, R = a.rank, RR = R * R, m = a.count - 1;
    const int64_t b = blockIdx.x, length = a.offsets[b + 1] - a.offsets[b];
    const float factor = a.scale / static_cast<float>(length > 0 ? length : 1);
    float* grad = reinterpret_cast<float*>(shared);
    float* next = grad + RR;
    float* const total = next + RR;

    for (int i = threadIdx.x; i < RR; i += kThreads) total[i] = 0.0f;
    for (int j = 0; j < a.count; ++j) {
        int place = -1;
        for (int p = 0; p < m; ++p)
            if (a.ring[j][p] == target) place = p;
        if (place < 0) continue;
        for (int i = threadIdx.x; i < RR; i += kThreads) grad[i] = a.scale * dialogue_sum(a, j, b, i);
        __syncthreads();
        for (int p = 0; p < place; ++p) {              // grad <- A_p^T grad
            const float* const left = a.average[a.ring[j][p]] + b * RR;
            for (int i = threadIdx.x; i < RR; i += kThreads) {
                const int k = i / R, o = i - k * R;
                float sum = 0.0f;
                for (int q = 0; q < R; ++q) sum = fmaf(left[q * R + k], grad[q * R + o], sum);
                next[i] = sum;
            }
            __syncthreads();
            float* const swap = grad;
            grad = next;
            next = swap;
        }
        for (int p = m - 1; p > place; --p) {          // grad <- grad A_p^T
            const float* const right = a.average[a.ring[j][p]] + b * RR;
            for (int i = threadIdx.x; i < RR; i += kThreads) {
                const int k = i / R, o = i - k * R;
                float sum = 0.0f;
                for (int q = 0; q < R; ++q) sum = fmaf(grad[k * R + q], right[o * R + q], sum);
                next[i] = sum;
            }
            __syncthreads();
            float* const swap = grad;
            grad = next;
            next = swap;
        }
        for (int i = threadIdx.x; i < RR; i += kThreads) total[i] += grad[i];
        // No barrier: a thread rewrites the elements of `grad` that it alone has just read, and those of `next` only after
        // the barrier that follows.
    }
    for (int i = threadIdx.x; i < RR; i += kThreads) a.grad_average[target][b * RR + i] = factor * total[i];
}

// Operand: [g_q1, g_q2, g_k1, g_k2] of the block's rows, from g_u and g_v in shared memory. 4R is a multiple of four.
template <class T> struct GradProjection {
    static constexpr bool kFast = true;
    const TensorRing& a;
    int j;
    const float *grad_u, *grad_v;
    int64_t row0;
    bool keep;   // write them to scratch for weight_kernel

    __device__ __forceinline__ void quad(int64_t row, int64_t column, float (&v)[4]) const {
        const int R = a.rank;
        const int64_t n = row0 + row, valid = n < a.rows ? 4 * R - column : 0;
        const T* const proj = static_cast<const T*>(a.proj[j]) + n * 4 * R;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int c = static_cast<int>(column) + e;
            v[e] = 0.0f;
            if (e >= valid) continue;
            // The partner of q1, q2, k1, k2 is k1, k2, q1, q2: half a row away. Its cores are u, v, u, v.
            const int core = c < R ? c : c < 2 * R ? c - R : c < 3 * R ? c - 2 * R : c - 3 * R;
            const bool is_u = c < R || (c >= 2 * R && c < 3 * R);
            const float g = (is_u ? grad_u : grad_v)[row * R + core];
            v[e] = g * to_float(proj[c < 2 * R ? c + 2 * R : c - 2 * R]);
        }
        if (keep) store<4>(static_cast<T*>(a.grad_proj[j]) + n * 4 * R + column, valid, true, v);
    }
};

// Block: 32 rows x, 64 features y, modality z. Shared: tile; u, v, g_u, y0, y1 [32, R]; dialogue [32].
template <class P> using InputTile = typename P::template Tile<32, 64>;

template <class P> __host__ __device__ inline int64_t input_bytes(int rank) { return InputTile<P>::kBytes + 32 * (5 * rank + 1) * 4; }

template <class P> __global__ void __launch_bounds__(kThreads) input_kernel(const __grid_constant__ TensorRing a) {
    using T = typename P::Storage;
    ADA2I_DYNAMIC_SHARED(shared);
    const int j = blockIdx.z, R = a.rank, size = 32 * R;
    const int64_t row0 = static_cast<int64_t>(blockIdx.x) * 32, column0 = static_cast<int64_t>(blockIdx.y) * 64;
    const int64_t D = a.width[j];
    if (column0 >= D) return;
    float* const u = reinterpret_cast<float*>(shared + InputTile<P>::kBytes);
    float *const v = u + size, *const grad_u = v + size;
    float *grad_v = grad_u + size, *other = grad_v + size;
    int* const dialogue = reinterpret_cast<int*>(other + size);

    find_dialogues<32>(a, row0, dialogue);
    load_cores<T, 32>(a, j, row0, u, v);
    for (int i = threadIdx.x; i < size; i += kThreads) {
        const int64_t n = row0 + i / R;
        const float* const kept = a.grad_cores[j] + n * 2 * R + i % R;
        grad_u[i] = n < a.rows ? kept[0] : 0.0f;
        grad_v[i] = n < a.rows ? a.scale * kept[R] : 0.0f;
    }
    __syncthreads();
    for (int l = a.count - 2; l >= 0; --l) {           // g_v = s A_1 (A_2 (.. g_w))
        apply<32, false>(a.average[a.ring[j][l]], dialogue, R, grad_v, other);
        __syncthreads();
        float* const swap = grad_v;
        grad_v = other;
        other = swap;
    }
    if (a.count > 1) {                                 // through the mean: g_u += g_A v, g_v += g_A^T u
        apply<32, false, true>(a.grad_average[j], dialogue, R, v, grad_u);
        apply<32, true, true>(a.grad_average[j], dialogue, R, u, grad_v);
        __syncthreads();
    }

    InputTile<P> tile(shared);
    const bool vector = a.vector[j];
    product(tile, GradProjection<T>{a, j, grad_u, grad_v, row0, column0 == 0},
            Matrix<T, false>{static_cast<const T*>(a.proj_weight[j]), 4 * R, D, vector}, 0, column0, 0, 4 * R);
    tile.each([&](int row, int column, float v0, float v1) {
        const int64_t n = row0 + row, d = column0 + column, at = n * D + d, valid = D - d;
        if (n >= a.rows || valid <= 0) return;
        float g[2], attention[2], t[2] = {0.0f, 0.0f};
        load<2>(static_cast<const T*>(a.grad_out[j]) + at, valid, vector, g);
        load<2>(static_cast<const T*>(a.attention[j]) + at, valid, vector, attention);
        if (a.gated_target && a.grad_target[j] != nullptr)
            load<2>(static_cast<const T*>(a.grad_target[j]) + at, valid, vector, t);
        drop_pair(a, j, n, d, g);
        const float grad[2] = {(g[0] + t[0]) * (attention[0] + a.beta) + v0, (g[1] + t[1]) * (attention[1] + a.beta) + v1};
        store<2>(static_cast<T*>(a.grad_x[j]) + at, valid, vector, grad);
    });
}

// Operand: row n of u w^T and a one: [N, R^2 + 1], from scratch.
struct OuterAndOne {
    static constexpr bool kFast = false;
    const float* cores;
    int64_t rows;
    RankPair pair;

    __device__ __forceinline__ void quad(int64_t n, int64_t kk, float (&v)[4]) const {
        const int R = pair.rank;
        const float* const u = cores + n * 2 * R;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int64_t place = kk + e;
            int k, o;
            pair.split(static_cast<int>(place), k, o);
            v[e] = n >= rows || place > R * R ? 0.0f : place == R * R ? 1.0f : u[k] * u[R + o];
        }
    }
};

// Block: output tile x, piece of the rows y, modality z. Tiles 0 .. cover [g_W, g_c] = g_att^T [u w^T, 1], [D, R^2 + 1];
// the others [g_P, g_p] = [g_q1 ..]^T [x, 1], [4R, D + 1].
template <class P> using WeightTile = typename P::template Tile<64, 64>;

__host__ __device__ inline int64_t weight_tiles(int rank, int64_t width) {
    return (width + 63) / 64 * ((rank * rank + 64) / 64) + (4 * rank + 63) / 64 * ((width + 64) / 64);
}

template <class Tile> __device__ void store_piece(const Tile& tile, float* piece, int64_t m0, int64_t n0, int64_t m, int64_t n) {
    tile.each([&](int row, int column, float v0, float v1) {
        const int64_t r = m0 + row, c = n0 + column;
        if (r < m && c < n) piece[r * n + c] = v0;
        if (r < m && c + 1 < n) piece[r * n + c + 1] = v1;
    });
}

// At most 168 registers, so that three blocks share a multiprocessor; on sm_80 the 16-bit kernel would spill then.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
constexpr int kWeightBlocks = 2;
#else
constexpr int kWeightBlocks = 3;
#endif

template <class P> __global__ void __launch_bounds__(kThreads, kWeightBlocks) weight_kernel(const __grid_constant__ TensorRing a) {
    using T = typename P::Storage;
    ADA2I_DYNAMIC_SHARED(shared);
    const int j = blockIdx.z, R = a.rank, split = blockIdx.y;
    const int64_t D = a.width[j], index = blockIdx.x;
    if (index >= weight_tiles(R, D)) return;
    const int64_t per_split = ((a.rows + a.splits - 1) / a.splits + 31) / 32 * 32;
    const int64_t begin = split * per_split, end = begin + per_split < a.rows ? begin + per_split : a.rows;
    float* const piece = a.piece[j] + split * weight_elements(R, D);

    WeightTile<P> tile(shared);
    const int64_t across = (R * R + 64) / 64, map_tiles = (D + 63) / 64 * across;
    if (index < map_tiles) {
        const int64_t m0 = index / across * 64, n0 = index % across * 64;
        product(tile, Matrix<T, false>{static_cast<const T*>(a.grad_attention[j]), end, D, a.vector[j] != 0},
                OuterAndOne{a.cores[j], end, RankPair(R)}, m0, n0, begin, end);
        store_piece(tile, piece, m0, n0, D, R * R + 1);
    } else {
        const int64_t wide = (D + 64) / 64, m0 = (index - map_tiles) / wide * 64, n0 = (index - map_tiles) % wide * 64;
        product(tile, Matrix<T, false>{static_cast<const T*>(a.grad_proj[j]), end, 4 * R, true},
                MatrixAndOnes<T>{static_cast<const T*>(a.x[j]), end, D, a.vector[j] != 0}, m0, n0, begin, end);
        store_piece(tile, piece + D * (R * R + 1), m0, n0, 4 * R, D + 1);
    }
}

// Thread: one element of [g_W, g_c] or [g_P, g_p] of modality y.
template <class T> __global__ void __launch_bounds__(kThreads) weight_sum_kernel(const __grid_constant__ TensorRing a) {
    const int j = blockIdx.y, R = a.rank, RR = R * R;
    const int64_t D = a.width[j], elements = weight_elements(R, D);
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= elements) return;
    float sum = 0.0f;
#pragma unroll 4
    for (int s = 0; s < a.splits; ++s) sum += a.piece[j][s * elements + i];
    const T value = from_float<T>(sum);
    const int64_t map = D * (RR + 1);
    if (i < map) {
        const int64_t d = i / (RR + 1), kk = i % (RR + 1);
        if (kk < RR) static_cast<T*>(a.grad_map_weight[j])[d * RR + kk] = value;
        else static_cast<T*>(a.grad_map_bias[j])[d] = value;
    } else {
        const int64_t c = (i - map) / (D + 1), d = (i - map) % (D + 1);
        if (d < D) static_cast<T*>(a.grad_proj_weight[j])[c * D + d] = value;
        else static_cast<T*>(a.grad_proj_bias[j])[c] = value;
    }
}

}  // namespace ada2i
