// L1 distance between Phi(x) and its target on packed rows: device code. See ada2i_fast/ops/attention_mapping.py.
//
// Forward, two launches: mapping_kernel multiplies 64 x 64 tiles of Phi x, and its epilogue turns them into signs and one sum
// per block; loss_kernel adds the blocks in order. The difference is never stored: its sign, one byte, is all that backward
// needs. Backward, two launches: mapping_backward_kernel holds g_x and g_target in its first blocks and pieces over rows of
// [g_Phi, g_phi] in the others, independent of each other; mapping_sum_kernel adds the pieces in order.
#pragma once

#include "tile.cuh"

namespace ada2i {

template <class P> using MappingTile = typename P::template Tile<64, 64>;

// Sum over the block, in every thread's order of warps: xor-shuffles, then four values. Result in thread 0.
__device__ inline float block_sum(float v, float* shared) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, lane);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    return shared[0] + shared[1] + shared[2] + shared[3];
}

// Block: 64 rows x, 64 features y, modality z. Shared: tile, whose place the sums take afterwards.
template <class P> __global__ void __launch_bounds__(kThreads) mapping_kernel(const __grid_constant__ AttentionMapping a) {
    using T = typename P::Storage;
    ADA2I_DYNAMIC_SHARED(shared);
    const int j = blockIdx.z;
    const int64_t row0 = static_cast<int64_t>(blockIdx.x) * 64, column0 = static_cast<int64_t>(blockIdx.y) * 64, D = a.width[j];
    float* const partial = a.partial + (static_cast<int64_t>(j) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    if (column0 >= D) {
        if (threadIdx.x == 0) *partial = 0.0f;
        return;
    }
    const bool vector = a.vector[j];
    MappingTile<P> tile(shared);
    product(tile, Matrix<T, true>{static_cast<const T*>(a.x[j]), a.rows, D, vector},
            Matrix<T, true>{static_cast<const T*>(a.weight[j]), D, D, vector}, row0, column0, 0, D);
    float sum = 0.0f;
    tile.each([&](int row, int column, float v0, float v1) {
        const int64_t n = row0 + row, d = column0 + column, at = n * D + d, valid = D - d;
        if (n >= a.rows || valid <= 0) return;
        float bias[2], target[2], sign[2] = {0.0f, 0.0f};
        load<2>(static_cast<const T*>(a.bias[j]) + d, valid, false, bias);
        load<2>(static_cast<const T*>(a.target[j]) + at, valid, vector, target);
        const float difference[2] = {v0 + bias[0] - target[0], v1 + bias[1] - target[1]};
#pragma unroll
        for (int e = 0; e < 2; ++e)
            if (e < valid) {
                sum += fabsf(difference[e]);
                sign[e] = difference[e] > 0.0f ? 1.0f : difference[e] < 0.0f ? -1.0f : 0.0f;
            }
        store<2>(a.sign[j] + at, valid, vector, sign);
    });
    sum = block_sum(sum, reinterpret_cast<float*>(shared));
    if (threadIdx.x == 0) *partial = a.coefficient[j] * sum;
}

// One block.
__global__ void __launch_bounds__(kThreads) loss_kernel(const __grid_constant__ AttentionMapping a) {
    ADA2I_DYNAMIC_SHARED(shared);
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < a.blocks; i += kThreads) sum += a.partial[i];
    sum = block_sum(sum, reinterpret_cast<float*>(shared));
    if (threadIdx.x == 0) *a.loss = sum;
}

__host__ __device__ inline int64_t mapping_tiles(int64_t width) { return (width + 63) / 64 * ((width + 64) / 64); }

// Block x, modality y.
template <class P> __global__ void __launch_bounds__(kThreads) mapping_backward_kernel(const __grid_constant__ AttentionMapping a) {
    using T = typename P::Storage;
    ADA2I_DYNAMIC_SHARED(shared);
    const int j = blockIdx.y;
    const int64_t D = a.width[j];
    const bool vector = a.vector[j];
    const int8_t* const sign = a.sign[j];
    MappingTile<P> tile(shared);

    if (blockIdx.x < a.input_blocks) {                 // g_x = c S Phi, g_target = -c S
        const int64_t row_tiles = (a.rows + 63) / 64;
        const int64_t row0 = blockIdx.x % row_tiles * 64, column0 = blockIdx.x / row_tiles * 64;
        if (column0 >= D) return;
        product(tile, Matrix<int8_t, true>{sign, a.rows, D, vector},
                Matrix<T, false>{static_cast<const T*>(a.weight[j]), D, D, vector}, row0, column0, 0, D);
        const float c = a.coefficient[j] * *a.grad_loss;
        tile.each([&](int row, int column, float v0, float v1) {
            const int64_t n = row0 + row, d = column0 + column, at = n * D + d, valid = D - d;
            if (n >= a.rows || valid <= 0) return;
            float s[2];
            load<2>(sign + at, valid, vector, s);
            const float grad_x[2] = {c * v0, c * v1}, grad_target[2] = {-c * s[0], -c * s[1]};
            store<2>(static_cast<T*>(a.grad_x[j]) + at, valid, vector, grad_x);
            store<2>(static_cast<T*>(a.grad_target[j]) + at, valid, vector, grad_target);
        });
        return;
    }
    const int64_t index = blockIdx.x - a.input_blocks, tiles = mapping_tiles(D), split = index / tiles;
    if (split >= a.splits) return;                     // [g_Phi, g_phi] / c = S^T [x, 1]
    const int64_t across = (D + 64) / 64, m0 = index % tiles / across * 64, n0 = index % tiles % across * 64;
    const int64_t per_split = ((a.rows + a.splits - 1) / a.splits + 31) / 32 * 32;
    const int64_t begin = split * per_split, end = begin + per_split < a.rows ? begin + per_split : a.rows;
    product(tile, Matrix<int8_t, false>{sign, end, D, vector},
            MatrixAndOnes<T>{static_cast<const T*>(a.x[j]), end, D, vector}, m0, n0, begin, end);
    float* const piece = a.piece[j] + split * D * (D + 1);
    tile.each([&](int row, int column, float v0, float v1) {
        const int64_t r = m0 + row, c = n0 + column;
        if (r < D && c <= D) piece[r * (D + 1) + c] = v0;
        if (r < D && c + 1 <= D) piece[r * (D + 1) + c + 1] = v1;
    });
}

// Thread: one element of [g_Phi, g_phi] of modality y.
template <class T> __global__ void __launch_bounds__(kThreads) mapping_sum_kernel(const __grid_constant__ AttentionMapping a) {
    const int j = blockIdx.y;
    const int64_t D = a.width[j], elements = D * (D + 1), i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= elements) return;
    float sum = 0.0f;
#pragma unroll 4
    for (int s = 0; s < a.splits; ++s) sum += a.piece[j][s * elements + i];
    const T value = from_float<T>(a.coefficient[j] * *a.grad_loss * sum);
    const int64_t row = i / (D + 1), column = i % (D + 1);
    if (column < D) static_cast<T*>(a.grad_weight[j])[row * D + column] = value;
    else static_cast<T*>(a.grad_bias[j])[row] = value;
}

}  // namespace ada2i
