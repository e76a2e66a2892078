// Kernels with one defect each: does the shim see it? `which` picks the kernel, out is [128] floats.
#include "common.cuh"

namespace {

// out[t] = value of the next thread, through shared memory.
template <bool Barrier> void neighbour(float* out) {
    ADA2I_DYNAMIC_SHARED(shared);
    float* const s = reinterpret_cast<float*>(shared);
    s[threadIdx.x] = static_cast<float>(threadIdx.x);
    if (Barrier) __syncthreads();
    out[threadIdx.x] = s[(threadIdx.x + 1) % 128];
}

void early_exit(float* out) {
    if (threadIdx.x == 77) return;
    __syncthreads();
    out[threadIdx.x] = 1.0f;
}

void divergent(float* out) {
    if (threadIdx.x < 64) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1.0f;
}

void half_a_warp(float* out) {
    out[threadIdx.x] = threadIdx.x % 32 < 16 ? __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 1) : 0.0f;
}

void mixed(float* out) {
    if (threadIdx.x % 2) __syncthreads();
    else __syncwarp();
    out[threadIdx.x] = 1.0f;
}

void beyond_shared(float* out) {
    ADA2I_DYNAMIC_SHARED(shared);
    out[threadIdx.x] = reinterpret_cast<volatile float*>(shared)[threadIdx.x + 1];
}

void uninitialised(float* out) {
    ADA2I_DYNAMIC_SHARED(shared);
    out[threadIdx.x] = reinterpret_cast<float*>(shared)[threadIdx.x];
}

// Pairs swap within the warp; each warp turns around once more.
void shuffle(float* out) {
    const float v = __shfl_xor_sync(0xFFFFFFFFu, static_cast<float>(threadIdx.x), 1);
    out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, v, 16);
}

void beyond_scratch(float* out) { out[threadIdx.x + 64] = 1.0f; }

}  // namespace

ADA2I_EXPORT int self_test(int which, int order, float* out) {
    shim::machine.schedule = order;
    shim::machine.random.seed(1);
    void (*const kernels[])(float*) = {neighbour<true>, neighbour<false>, early_exit, divergent,  half_a_warp,
                                       mixed,           beyond_shared,    uninitialised, shuffle, beyond_scratch};
    if (which == 9) {
        // 64 floats, the guard, 192 floats: thread 0 writes into the guard.
        void* const memory = std::malloc(4096);
        ada2i::Carver carver(memory);
        out = carver.take<float>(64);
        carver.take<float>(192);
    }
    return ada2i::launch(kernels[which], dim3(1), 128 * sizeof(float), nullptr, out);
}

ADA2I_EXPORT const char* self_test_error() { return shim::machine.error.c_str(); }
