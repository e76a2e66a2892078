// Launches of balanced_adam; the C ABI is that of tensor_ring.cu. Tables of tensors travel as kernel arguments: two launches to
// measure and one to update, per kMaxTensors tensors, and one for the settings of all.

#include "balanced_adam.cuh"

namespace ada2i {

// Mirrored field by field in ada2i_fast/cuda/balanced_adam.py.
struct BalancedAdam {
    int64_t count;
    double beta1, beta2, eps;
    const int64_t* sizes;       // [T], host
    const int64_t* numbers;     // [T], host; update alone
    void* const* tensors;       // host, of device pointers. measure: [T] gradients; update: [4, T] parameters, gradients, exp_avg, exp_avg_sq
    const int64_t* seed;        // device
    const double* settings;     // device
    double* measures;           // device
    void* scratch;
};

namespace {

bool valid(const BalancedAdam& a, int64_t struct_bytes) {
    bool good = struct_bytes == static_cast<int64_t>(sizeof(BalancedAdam)) && a.count >= 0;
    for (int64_t t = 0; good && t < a.count; ++t) good = a.sizes[t] >= 0 && a.sizes[t] <= (int64_t{1} << 34);
    return good;
}

int64_t chunks(const BalancedAdam& a) {
    int64_t count = 0;
    for (int64_t t = 0; t < a.count; ++t) count += ceil_div(a.sizes[t], kAdamChunk);
    return count;
}

// Calls work(tensors, chunks) for kMaxTensors tensors at a time.
template <class F> cudaError_t each_launch(const BalancedAdam& a, bool update, double* partial, F work) {
    AdamTensors tensors;
    tensors.forget1 = static_cast<float>(1 - a.beta1);
    tensors.beta2 = static_cast<float>(a.beta2);
    tensors.forget2 = static_cast<float>(1 - a.beta2);
    tensors.eps = static_cast<float>(a.eps);
    tensors.seed = a.seed;
    const int64_t T = a.count;
    cudaError_t error = cudaSuccess;
    for (int64_t begin = 0; begin < T && error == cudaSuccess; begin += kMaxTensors) {
        tensors.count = static_cast<int32_t>(T - begin < kMaxTensors ? T - begin : kMaxTensors);
        tensors.settings = a.settings + 6 * begin;
        tensors.measures = a.measures + 2 * begin;
        tensors.partial = partial;
        tensors.first_chunk[0] = 0;
        for (int t = 0; t < tensors.count; ++t) {
            void* const* const from = a.tensors + begin + t;
            tensors.size[t] = a.sizes[begin + t];
            tensors.number[t] = update ? a.numbers[begin + t] : 0;
            tensors.param[t] = update ? static_cast<float*>(from[0]) : nullptr;
            tensors.grad[t] = static_cast<const float*>(from[update ? T : 0]);
            tensors.exp_avg[t] = update ? static_cast<float*>(from[2 * T]) : nullptr;
            tensors.exp_avg_sq[t] = update ? static_cast<float*>(from[3 * T]) : nullptr;
            tensors.first_chunk[t + 1] = tensors.first_chunk[t] + static_cast<int32_t>(ceil_div(tensors.size[t], kAdamChunk));
        }
        const int32_t here = tensors.first_chunk[tensors.count];
        error = work(tensors, static_cast<unsigned>(here));
        if (partial != nullptr) partial += 2 * here;
    }
    return error;
}

}  // namespace
}  // namespace ada2i

// Bytes of scratch that the call of the same name needs, or -1 for arguments out of range.
ADA2I_EXPORT int64_t ada2i_cuda_balanced_adam_measure_scratch(const ada2i::BalancedAdam* args, int64_t struct_bytes) {
    if (!ada2i::valid(*args, struct_bytes)) return -1;
    ada2i::Carver carver(nullptr);
    carver.take<double>(2 * ada2i::chunks(*args));
    return carver.bytes();
}

ADA2I_EXPORT int64_t ada2i_cuda_balanced_adam_update_scratch(const ada2i::BalancedAdam* args, int64_t struct_bytes) {
    return ada2i::valid(*args, struct_bytes) ? 0 : -1;
}

ADA2I_EXPORT int ada2i_cuda_balanced_adam_measure(const ada2i::BalancedAdam* args, int64_t struct_bytes, void* stream) {
    if (!ada2i::valid(*args, struct_bytes)) return cudaErrorInvalidValue;
    ada2i::Carver carver(args->scratch);
    double* const partial = carver.take<double>(2 * ada2i::chunks(*args));
    return ada2i::each_launch(*args, false, partial, [&](const ada2i::AdamTensors& tensors, unsigned blocks) {
        const cudaError_t error = ada2i::launch(ada2i::measure_kernel, dim3(blocks), 8 * sizeof(double), stream, tensors);
        if (error != cudaSuccess) return error;
        return ada2i::launch(ada2i::measure_tensor_kernel, dim3(tensors.count), 8 * sizeof(double), stream, tensors);
    });
}

ADA2I_EXPORT int ada2i_cuda_balanced_adam_update(const ada2i::BalancedAdam* args, int64_t struct_bytes, void* stream) {
    if (!ada2i::valid(*args, struct_bytes)) return cudaErrorInvalidValue;
    return ada2i::each_launch(*args, true, nullptr, [&](const ada2i::AdamTensors& tensors, unsigned blocks) {
        return ada2i::launch(ada2i::update_kernel, dim3(blocks), 0, stream, tensors);
    });
}

ADA2I_EXPORT int64_t ada2i_cuda_balanced_adam_settings_scratch(const ada2i::AdamSettings* args, int64_t struct_bytes) {
    return struct_bytes == static_cast<int64_t>(sizeof(*args)) && args->count >= 0 && args->noise >= 0 && args->noise <= 2 ? 0 : -1;
}

ADA2I_EXPORT int ada2i_cuda_balanced_adam_settings(const ada2i::AdamSettings* args, int64_t struct_bytes, void* stream) {
    if (ada2i_cuda_balanced_adam_settings_scratch(args, struct_bytes) < 0) return cudaErrorInvalidValue;
    return ada2i::launch(ada2i::settings_kernel, dim3(1), 8 * sizeof(double), stream, *args);
}
