// Storage types, vector access and launches. Everything that differs between nvcc and the CPU shim of tests/cuda_shim is
// here and in mma.cuh.
#pragma once

#include <cstdint>

#ifdef ADA2I_SHIM
#include "shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define ADA2I_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#include "../common/philox.h"
#include "ada2i_cuda.h"

#define ADA2I_EXPORT extern "C" __attribute__((visibility("default")))

namespace ada2i {

constexpr int kThreads = 128;   // every kernel; four warps

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(int8_t v) { return static_cast<float>(v); }

template <class T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }
template <> __device__ __forceinline__ int8_t from_float<int8_t>(float v) { return static_cast<int8_t>(v); }

template <class T, int N> struct alignas(N * sizeof(T)) Pack { T e[N]; };

// N consecutive elements of which the first `valid` exist (any integer); the others read as 0. `vector`: p is aligned to N
// elements and valid is 0 or N, so one instruction does.
template <int N, class T> __device__ __forceinline__ void load(const T* p, int64_t valid, bool vector, float (&v)[N]) {
    if (vector && valid >= N) {
        const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = to_float(pack.e[i]);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = i < valid ? to_float(p[i]) : 0.0f;
    }
}

template <int N, class T> __device__ __forceinline__ void store(T* p, int64_t valid, bool vector, const float (&v)[N]) {
    if (vector && valid >= N) {
        Pack<T, N> pack;
#pragma unroll
        for (int i = 0; i < N; ++i) pack.e[i] = from_float<T>(v[i]);
        *reinterpret_cast<Pack<T, N>*>(p) = pack;
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (i < valid) p[i] = from_float<T>(v[i]);
    }
}

// What nvcc's <<<>>> does. Launches nothing for an empty grid; the error of the launch is the result.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int64_t shared_bytes, void* stream, const A&... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#ifdef ADA2I_SHIM
    (void)stream;
    return shim::run(grid, kThreads, shared_bytes, [&] { kernel(args...); });
#else
    kernel<<<grid, kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
    return cudaGetLastError();
#endif
}

#ifdef ADA2I_SHIM
constexpr int64_t kGuard = 256;   // the shim leaves room between pieces and watches it
#else
constexpr int64_t kGuard = 0;
#endif

// Cuts a scratch buffer into pieces. With base == nullptr it only adds up the bytes.
class Carver {
  public:
    explicit Carver(void* base) : base_(static_cast<unsigned char*>(base)) {}

    template <class T> T* take(int64_t count) {
        const int64_t at = bytes_, size = count * static_cast<int64_t>(sizeof(T));
        bytes_ += (size + 255) / 256 * 256 + kGuard;
        if (base_ == nullptr) return nullptr;
#ifdef ADA2I_SHIM
        shim::guard(base_ + at + size, base_ + bytes_);
#endif
        return reinterpret_cast<T*>(base_ + at);
    }
    int64_t bytes() const { return bytes_; }

  private:
    unsigned char* base_;
    int64_t bytes_ = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Products over rows are cut into this many pieces, so that few output tiles still fill a GPU: a function of sizes alone, so
// that the order of summation is too.
inline int row_splits(int64_t rows, int64_t tiles) {
    const int64_t by_rows = ceil_div(rows, 128), by_tiles = ceil_div(512, tiles > 0 ? tiles : 1);
    const int64_t splits = by_rows < by_tiles ? by_rows : by_tiles;
    return static_cast<int>(splits < 1 ? 1 : splits);
}

inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace ada2i
