// Launches of attention_mapping; the C ABI is that of tensor_ring.cu.

#include "attention_mapping.cuh"

namespace ada2i {
namespace {

bool valid(const AttentionMapping& a, int64_t struct_bytes) {
    bool good = struct_bytes == static_cast<int64_t>(sizeof(AttentionMapping)) && a.count >= 1 && a.count <= kMaxModalities
                && a.rows >= 0 && a.dtype >= 0 && a.dtype <= kTf32;
    for (int j = 0; good && j < a.count; ++j) good = a.width[j] >= 0;
    return good;
}

int64_t widest(const AttentionMapping& a) {
    int64_t width = 0;
    for (int j = 0; j < a.count; ++j) width = a.width[j] > width ? a.width[j] : width;
    return width;
}

void choose_vectors(AttentionMapping& a) {
    const int64_t quad = a.dtype == kFloat16 || a.dtype == kBfloat16 ? 8 : 16;
    for (int j = 0; j < a.count; ++j) {
        const void* const wide[] = {a.x[j], a.target[j], a.weight[j], a.grad_x[j], a.grad_target[j]};
        a.vector[j] = a.width[j] % 4 == 0 && aligned(a.sign[j], 4);
        for (const void* p : wide) a.vector[j] = a.vector[j] && aligned(p, quad);
    }
}

int64_t carve_forward(AttentionMapping& a, Carver& carver) {
    a.blocks = ceil_div(a.rows, 64) * ceil_div(widest(a), 64) * a.count;
    a.partial = carver.take<float>(a.blocks);
    return carver.bytes();
}

int64_t carve_backward(AttentionMapping& a, Carver& carver) {
    int64_t tiles = 0;
    for (int j = 0; j < a.count; ++j) tiles += mapping_tiles(a.width[j]);
    a.splits = row_splits(a.rows, tiles);
    a.input_blocks = ceil_div(a.rows, 64) * ceil_div(widest(a), 64);
    for (int j = 0; j < a.count; ++j) a.piece[j] = carver.take<float>(a.splits * a.width[j] * (a.width[j] + 1));
    return carver.bytes();
}

template <class P> cudaError_t forward(const AttentionMapping& a, void* stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(a.rows, 64)), static_cast<unsigned>(ceil_div(widest(a), 64)), a.count);
    cudaError_t error = launch(mapping_kernel<P>, grid, MappingTile<P>::kBytes, stream, a);
    if (error == cudaSuccess) error = launch(loss_kernel, dim3(1), 4 * sizeof(float), stream, a);
    return error;
}

template <class P> cudaError_t backward(const AttentionMapping& a, void* stream) {
    const int64_t width = widest(a), blocks = a.input_blocks + mapping_tiles(width) * a.splits;
    const unsigned M = a.count;
    cudaError_t error =
        launch(mapping_backward_kernel<P>, dim3(static_cast<unsigned>(blocks), M), MappingTile<P>::kBytes, stream, a);
    if (error == cudaSuccess)
        error = launch(mapping_sum_kernel<typename P::Storage>,
                       dim3(static_cast<unsigned>(ceil_div(width * (width + 1), kThreads)), M), 0, stream, a);
    return error;
}

}  // namespace
}  // namespace ada2i

// Bytes of scratch that the call of the same name needs, or -1 for arguments out of range.
ADA2I_EXPORT int64_t ada2i_cuda_attention_mapping_forward_scratch(const ada2i::AttentionMapping* args, int64_t struct_bytes) {
    if (!ada2i::valid(*args, struct_bytes)) return -1;
    ada2i::AttentionMapping a = *args;
    ada2i::Carver carver(nullptr);
    return ada2i::carve_forward(a, carver);
}

ADA2I_EXPORT int64_t ada2i_cuda_attention_mapping_backward_scratch(const ada2i::AttentionMapping* args, int64_t struct_bytes) {
    if (!ada2i::valid(*args, struct_bytes)) return -1;
    ada2i::AttentionMapping a = *args;
    ada2i::Carver carver(nullptr);
    return ada2i::carve_backward(a, carver);
}

ADA2I_EXPORT int ada2i_cuda_attention_mapping_forward(const ada2i::AttentionMapping* args, int64_t struct_bytes, void* stream) {
    if (!ada2i::valid(*args, struct_bytes)) return cudaErrorInvalidValue;
    ada2i::AttentionMapping a = *args;
    ada2i::Carver carver(a.scratch);
    ada2i::carve_forward(a, carver);
    ada2i::choose_vectors(a);
    return ada2i::with_dtype(a.dtype, [&](auto policy) { return ada2i::forward<decltype(policy)>(a, stream); });
}

ADA2I_EXPORT int ada2i_cuda_attention_mapping_backward(const ada2i::AttentionMapping* args, int64_t struct_bytes, void* stream) {
    if (!ada2i::valid(*args, struct_bytes)) return cudaErrorInvalidValue;
    ada2i::AttentionMapping a = *args;
    ada2i::Carver carver(a.scratch);
    ada2i::carve_backward(a, carver);
    ada2i::choose_vectors(a);
    return ada2i::with_dtype(a.dtype, [&](auto policy) { return ada2i::backward<decltype(policy)>(a, stream); });
}
