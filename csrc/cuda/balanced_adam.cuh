// Adam over many tensors at once, with the factor and the noise of each: device code. Mathematics in
// ada2i_fast/ops/balanced_adam.py; the twin for the CPU is csrc/cpu/balanced_adam.inl.
//
// Tensors are cut into chunks of fixed size, a block each. Which tensors, and where they are, comes as a kernel argument: nothing
// is uploaded, and a CUDA graph keeps the addresses that it was captured with.
//     measure_kernel          mean and sum of squared deviations of every chunk
//     measure_tensor_kernel   of every tensor, from its chunks, in order
//     settings_kernel         norm, clipping, modulation, spread of the noise and bias corrections: one block
//     update_kernel           gradient with factor, noise and decay; both moments; the parameter
#pragma once

#include "common.cuh"

namespace ada2i {

constexpr int kAdamChunk = 4096;
constexpr int kVectors = kAdamChunk / (4 * kThreads);   // of 4 elements, per thread
constexpr int kPairs = 16;                              // of 32 normals, number i shares its radius with number i + 16

// A launch's tensors. Kernel arguments beyond 4 KiB need CUDA 12.1.
#if defined(__CUDACC_VER_MAJOR__) && (__CUDACC_VER_MAJOR__ < 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ < 1))
constexpr int kMaxTensors = 64;
#else
constexpr int kMaxTensors = 256;
#endif

// What a launch works on. Pointers are to device memory; set by the launcher.
struct AdamTensors {
    int32_t count;
    float forget1, beta2, forget2, eps;      // 1 - beta1, beta2, 1 - beta2
    const int64_t* seed;                     // [2] seed and step, or null without noise
    const double* settings;                  // [T, 6] f, lambda, r, c, s_g, s_p
    double* measures;                        // [T, 2] mean, sum of squared deviations
    double* partial;                         // [chunks, 2] the same of each chunk
    int64_t size[kMaxTensors];               // elements
    int64_t number[kMaxTensors];             // the tensors' numbers in the counter of the noise
    float* param[kMaxTensors];
    const float* grad[kMaxTensors];
    float* exp_avg[kMaxTensors];
    float* exp_avg_sq[kMaxTensors];
    int32_t first_chunk[kMaxTensors + 1];    // of the launch
};

// Pointers are to device memory. Mirrored field by field in ada2i_fast/cuda/balanced_adam.py.
struct AdamSettings {
    int64_t count;
    int32_t noise, clip_first;               // 0 none, 1 on gradients, 2 on parameters; whether clipping precedes modulation
    double clip_norm, alpha, beta1, beta2;   // clip_norm 0: no clipping
    const double* measures;                  // [T, 2]
    const double* sizes;                     // [T]
    const float* step;                       // [T]
    const double* lr;                        // [T]
    const double* decay;                     // [T]
    const int64_t* owner;                    // [T] 1 + place in ratio, 0 without modulation
    const double* ratio;                     // [M], or null: neither modulation nor noise
    const int64_t* key;                      // [1], or null
    double* settings;                        // [T, 6]
    float* norm;                             // []
    int64_t* seed;                           // [2] key and the largest step, if there is a key
    void* scratch;                           // none
};

// The tensor that block `chunk` works on: the last one that does not start behind it, so empty tensors own nothing.
__device__ inline int tensor_of(const AdamTensors& a, int chunk) {
    int low = 0, high = a.count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (a.first_chunk[middle] <= chunk) low = middle;
        else high = middle - 1;
    }
    return low;
}

__device__ __forceinline__ bool quad_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Sum over the block, the same for every thread and in a fixed order. shared: 4 values, free again after the next barrier.
__device__ inline double sum_over_block(double v, double* shared) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, lane);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    return shared[0] + shared[1] + (shared[2] + shared[3]);
}

// Block: a chunk. Two passes over elements that stay in registers, so a mean far above the spread costs no digits. Shared: 8 doubles.
__global__ void __launch_bounds__(kThreads) measure_kernel(const __grid_constant__ AdamTensors a) {
    ADA2I_DYNAMIC_SHARED(shared);
    double* const sums = reinterpret_cast<double*>(shared);
    const int chunk = blockIdx.x, tensor = tensor_of(a, chunk);
    const int64_t first = static_cast<int64_t>(chunk - a.first_chunk[tensor]) * kAdamChunk, left = a.size[tensor] - first;
    const float* const g = a.grad[tensor] + first;
    const bool vector = quad_aligned(g);
    float v[kVectors][4];
    int own = 0;
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
        const int at = (k * kThreads + threadIdx.x) * 4;
        const int64_t valid = left - at;
        load<4>(g + at, valid, vector, v[k]);
        own += valid >= 4 ? 4 : valid > 0 ? static_cast<int>(valid) : 0;
        total += v[k][0] + v[k][1] + (v[k][2] + v[k][3]);
    }
    const float shift = own > 0 ? total / own : 0.0f;      // nearly the mean of the thread's own elements
    float rest = 0.0f, square = 0.0f;
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if ((k * kThreads + threadIdx.x) * 4 + e < left) {
                const float x = v[k][e] - shift;
                rest += x;
                square = fmaf(x, x, square);
            }
    const double n = static_cast<double>(left < kAdamChunk ? left : kAdamChunk);
    const double own_sum = static_cast<double>(shift) * own + rest;
    const double mean = sum_over_block(own_sum, sums) / n;
    const double away = shift - mean;                      // sum (x - mean)^2, from sums of x - shift
    const double deviations = sum_over_block(square + away * (2.0 * rest + away * own), sums + 4);
    if (threadIdx.x == 0) {
        a.partial[2 * chunk] = mean;
        a.partial[2 * chunk + 1] = deviations;
    }
}

// Block: a tensor. Shared: 8 doubles.
__global__ void __launch_bounds__(kThreads) measure_tensor_kernel(const __grid_constant__ AdamTensors a) {
    ADA2I_DYNAMIC_SHARED(shared);
    double* const sums = reinterpret_cast<double*>(shared);
    const int tensor = blockIdx.x, begin = a.first_chunk[tensor], end = a.first_chunk[tensor + 1];
    const int64_t size = a.size[tensor];
    auto elements = [&](int chunk) {
        const int64_t left = size - static_cast<int64_t>(chunk - begin) * kAdamChunk;
        return static_cast<double>(left < kAdamChunk ? left : kAdamChunk);
    };
    double total = 0.0, deviations = 0.0;
    for (int chunk = begin + threadIdx.x; chunk < end; chunk += kThreads) total += elements(chunk) * a.partial[2 * chunk];
    const double mean = size > 0 ? sum_over_block(total, sums) / static_cast<double>(size) : 0.0;
    for (int chunk = begin + threadIdx.x; chunk < end; chunk += kThreads) {
        const double away = a.partial[2 * chunk] - mean;
        deviations += a.partial[2 * chunk + 1] + away * away * elements(chunk);
    }
    deviations = sum_over_block(deviations, sums + 4);
    if (threadIdx.x == 0) {
        a.measures[2 * tensor] = mean;
        a.measures[2 * tensor + 1] = deviations;
    }
}

// One block. Shared: 8 doubles.
__global__ void __launch_bounds__(kThreads) settings_kernel(const __grid_constant__ AdamSettings a) {
    ADA2I_DYNAMIC_SHARED(shared);
    double* const sums = reinterpret_cast<double*>(shared);
    auto coefficient = [&](int64_t t) {                    // k = 1 - tanh(alpha rho) where rho > 1
        const int64_t owner = a.ratio != nullptr ? a.owner[t] : 0;
        const double rho = owner > 0 ? a.ratio[owner - 1] : 0.0;
        return rho > 1.0 ? 1.0 - tanh(a.alpha * rho) : 1.0;
    };
    double square = 0.0, last = 0.0;
    for (int64_t t = threadIdx.x; t < a.count; t += kThreads) {
        const double mean = a.measures[2 * t], k = a.clip_first ? 1.0 : coefficient(t);
        square += (a.measures[2 * t + 1] + a.sizes[t] * mean * mean) * k * k;
        last = fmax(last, static_cast<double>(a.step[t]));
    }
    const double norm = sqrt(sum_over_block(square, sums));
    const double ratio = a.clip_norm > 0.0 ? a.clip_norm / (norm + 1e-6) : 1.0, clip = ratio > 1.0 ? 1.0 : ratio;   // NaN stays
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) last = fmax(last, __shfl_xor_sync(0xFFFFFFFFu, last, lane));
    if (threadIdx.x % 32 == 0) sums[4 + threadIdx.x / 32] = last;
    __syncthreads();
    if (threadIdx.x == 0) {
        *a.norm = static_cast<float>(norm);
        if (a.key != nullptr) {
            a.seed[0] = *a.key;
            a.seed[1] = static_cast<int64_t>(fmax(fmax(sums[4], sums[5]), fmax(sums[6], sums[7])));
        }
    }
    for (int64_t t = threadIdx.x; t < a.count; t += kThreads) {
        const double k = coefficient(t), steps = a.step[t], freedom = a.sizes[t] > 2.0 ? a.sizes[t] - 1.0 : 1.0;
        const double spread = sqrt(a.measures[2 * t + 1] / freedom) * (a.clip_first ? clip : 1.0);
        const bool noisy = a.ratio != nullptr && a.owner[t] > 0;
        double* const s = a.settings + 6 * t;
        s[0] = clip * k;
        s[1] = a.decay[t];
        s[2] = a.lr[t] / (1.0 - pow(a.beta1, steps));
        s[3] = 1.0 / sqrt(1.0 - pow(a.beta2, steps));
        s[4] = noisy && a.noise == 1 ? spread * k + 1e-8 : 0.0;
        s[5] = noisy && a.noise == 2 ? spread * a.lr[t] : 0.0;
    }
}

// Two standard normals from two random words, as `normals` of csrc/cpu/balanced_adam.inl: the same roundings on the way in, the same
// polynomials, and the library's logarithm.
__device__ __forceinline__ void normal_pair(uint32_t a, uint32_t b, float& first, float& second) {
    const float u = (static_cast<float>(a) + 1.0f) * 2.3283064365386963e-10f;
    const float radius = sqrtf(fmaxf(-2.0f * logf(u), 0.0f));
    const uint32_t quadrant = (b + 0x20000000u) >> 30;
    const float t = static_cast<float>(static_cast<int32_t>(b - (quadrant << 30))) * 1.4629180792671596e-9f;   // pi / 2^31
    const float s = t * t;
    const float sine = t + t * s * (-1.6666654611e-1f + s * (8.3321608736e-3f + s * -1.9515295891e-4f));
    const float cosine = 1.0f - 0.5f * s + s * s * (4.166664568298827e-2f + s * (-1.388731625493765e-3f + s * 2.443315711809948e-5f));
    const float x = quadrant & 1u ? sine : cosine, y = quadrant & 1u ? cosine : sine;
    first = radius * ((quadrant + 1u) & 2u ? -x : x);
    second = radius * (quadrant & 2u ? -y : y);
}

// The normals of elements at .. at + 3 and at + 16 .. at + 19 of a tensor; at % 32 is 0, 4, 8 or 12.
__device__ __forceinline__ void normal_octet(uint64_t seed, uint64_t number, uint32_t step, int64_t at, float (&noise)[2][4]) {
    uint32_t a[4], b[4];
    ada2i_philox(seed, static_cast<uint32_t>(at / 4), number, step, a);
    ada2i_philox(seed, static_cast<uint32_t>(at / 4 + kPairs / 4), number, step, b);
#pragma unroll
    for (int e = 0; e < 4; ++e) normal_pair(a[e], b[e], noise[0][e], noise[1][e]);
}

// Block: a chunk, from the last on: of the gradients the caches hold what measure_kernel has read last. A thread takes eight elements at a
// time, four and their partners in the noise, which it makes while they are on their way.
__global__ void __launch_bounds__(kThreads) update_kernel(const __grid_constant__ AdamTensors a) {
    const int chunk = gridDim.x - 1 - blockIdx.x, tensor = tensor_of(a, chunk);
    const int64_t first = static_cast<int64_t>(chunk - a.first_chunk[tensor]) * kAdamChunk, left = a.size[tensor] - first;
    float* const p = a.param[tensor] + first;
    const float* const g = a.grad[tensor] + first;
    float* const m = a.exp_avg[tensor] + first;
    float* const v = a.exp_avg_sq[tensor] + first;
    const bool vector = quad_aligned(p) && quad_aligned(g) && quad_aligned(m) && quad_aligned(v);
    const double* const s = a.settings + 6 * tensor;
    const float factor = s[0], decay = s[1], rate = s[2], root = s[3], to_gradient = s[4], to_parameter = s[5];
    const bool noisy = a.seed != nullptr && (to_gradient != 0.0f || to_parameter != 0.0f);
    const uint64_t seed = noisy ? static_cast<uint64_t>(a.seed[0]) : 0;
    const uint32_t step = noisy ? static_cast<uint32_t>(a.seed[1]) : 0;
    for (int unit = threadIdx.x; unit < kAdamChunk / 8; unit += kThreads) {
        const int at = unit / 4 * 32 + unit % 4 * 4;
        if (at >= left) break;
        float theta[2][4], gradient[2][4], average[2][4], second[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int d = at + half * kPairs;
            const int64_t valid = left - d;
            load<4>(p + d, valid, vector, theta[half]);
            load<4>(g + d, valid, vector, gradient[half]);
            load<4>(m + d, valid, vector, average[half]);
            load<4>(v + d, valid, vector, second[half]);
        }
        float noise[2][4] = {};
        if (noisy) normal_octet(seed, a.number[tensor], step, first + at, noise);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int d = at + half * kPairs;
            const int64_t valid = left - d;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float x = gradient[half][e] * factor + noise[half][e] * to_gradient + theta[half][e] * decay;
                average[half][e] += (x - average[half][e]) * a.forget1;
                second[half][e] = second[half][e] * a.beta2 + x * x * a.forget2;
                theta[half][e] -= rate * average[half][e] / (sqrtf(second[half][e]) * root + a.eps);
                theta[half][e] += noise[half][e] * to_parameter;
            }
            store<4>(p + d, valid, vector, theta[half]);
            store<4>(m + d, valid, vector, average[half]);
            store<4>(v + d, valid, vector, second[half]);
        }
    }
}

}  // namespace ada2i
