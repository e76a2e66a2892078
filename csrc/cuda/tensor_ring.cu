// Launches of tensor_ring. C ABI: device pointers and sizes in one struct, the stream as a void*, a cudaError_t as the result.
// Nothing here allocates or waits: the caller brings the scratch memory, so a CUDA graph can hold every call.

#include "tensor_ring.cuh"

namespace ada2i {
namespace {

bool valid(const TensorRing& a, int64_t struct_bytes) {
    bool good = struct_bytes == static_cast<int64_t>(sizeof(TensorRing)) && a.count >= 1 && a.count <= kMaxModalities
                && a.rank >= 1 && a.rank <= kMaxRank && a.rows >= 0 && a.dialogues >= 0 && a.dtype >= 0 && a.dtype <= kTf32;
    for (int j = 0; good && j < a.count; ++j) {
        good = a.width[j] >= 0;
        for (int l = 0; l < a.count - 1; ++l) good = good && a.ring[j][l] >= 0 && a.ring[j][l] < a.count;
    }
    return good;
}

int64_t element_bytes(int32_t dtype) { return dtype == kFloat16 || dtype == kBfloat16 ? 2 : 4; }

int64_t widest(const TensorRing& a) {
    int64_t width = 0;
    for (int j = 0; j < a.count; ++j) width = a.width[j] > width ? a.width[j] : width;
    return width;
}

unsigned blocks(int64_t items, int64_t per_block) { return static_cast<unsigned>(ceil_div(items, per_block)); }

void choose_vectors(TensorRing& a) {
    const int64_t quad = 4 * element_bytes(a.dtype);
    for (int j = 0; j < a.count; ++j) {
        const void* const wide[] = {a.x[j],   a.proj_weight[j], a.attention[j],   a.out[j],
                                    a.target[j], a.grad_out[j], a.grad_target[j], a.grad_x[j]};
        a.vector[j] = a.width[j] % 4 == 0;
        for (const void* p : wide) a.vector[j] = a.vector[j] && aligned(p, quad);
        a.map_vector[j] = a.rank * a.rank % 4 == 0 && aligned(a.map_weight[j], quad);
    }
}

int64_t carve_segments(TensorRing& a, Carver& carver) {
    const int64_t segments = ceil_div(a.rows, kSegmentRows) + a.dialogues;
    for (int j = 0; j < a.count; ++j) a.segment[j] = carver.take<float>(segments * a.rank * a.rank);
    return carver.bytes();
}

int64_t carve_backward(TensorRing& a, Carver& carver) {
    int64_t tiles = 0;
    for (int j = 0; j < a.count; ++j) tiles += weight_tiles(a.rank, a.width[j]);
    a.splits = row_splits(a.rows, tiles);
    carve_segments(a, carver);
    const int64_t bytes = element_bytes(a.dtype), R = a.rank;
    for (int j = 0; j < a.count; ++j) {
        a.cores[j] = carver.take<float>(a.rows * 2 * R);
        a.grad_cores[j] = carver.take<float>(a.rows * 2 * R);
        a.grad_average[j] = carver.take<float>(a.dialogues * R * R);
        a.grad_attention[j] = carver.take<unsigned char>(a.rows * a.width[j] * bytes);
        a.grad_proj[j] = carver.take<unsigned char>(a.rows * 4 * R * bytes);
        a.piece[j] = carver.take<float>(a.splits * weight_elements(a.rank, a.width[j]));
    }
    return carver.bytes();
}

template <class P> cudaError_t forward(const TensorRing& a, void* stream) {
    const unsigned M = a.count;
    cudaError_t error = launch(project_kernel<P>, dim3(blocks(a.rows, kSegmentRows), M), project_bytes<P>(a.rank), stream, a);
    if (error == cudaSuccess) error = launch(average_kernel, dim3(blocks(a.dialogues, 1), M), 0, stream, a);
    if (error == cudaSuccess)
        error = launch(map_kernel<P>, dim3(blocks(a.rows, 64), blocks(widest(a), 64), M), map_bytes<P>(a.rank), stream, a);
    return error;
}

template <class P> cudaError_t backward(const TensorRing& a, void* stream) {
    const unsigned M = a.count;
    int64_t tiles = 0, elements = 0;
    for (int j = 0; j < a.count; ++j) {
        const int64_t t = weight_tiles(a.rank, a.width[j]), e = weight_elements(a.rank, a.width[j]);
        tiles = t > tiles ? t : tiles;
        elements = e > elements ? e : elements;
    }
    cudaError_t error =
        launch(map_backward_kernel<P>, dim3(blocks(a.rows, kSegmentRows), M), map_backward_bytes<P>(a.rank), stream, a);
    if (error == cudaSuccess && a.count > 1)
        error = launch(ring_backward_kernel, dim3(blocks(a.dialogues, 1), M), ring_backward_bytes(a.rank), stream, a);
    if (error == cudaSuccess)
        error = launch(input_kernel<P>, dim3(blocks(a.rows, 32), blocks(widest(a), 64), M), input_bytes<P>(a.rank), stream, a);
    if (error == cudaSuccess)
        error = launch(weight_kernel<P>, dim3(blocks(tiles, 1), a.splits, M), WeightTile<P>::kBytes, stream, a);
    if (error == cudaSuccess)
        error = launch(weight_sum_kernel<typename P::Storage>, dim3(blocks(elements, kThreads), M), 0, stream, a);
    return error;
}

}  // namespace
}  // namespace ada2i

// Bytes of scratch that the call of the same name needs, or -1 for arguments out of range.
ADA2I_EXPORT int64_t ada2i_cuda_tensor_ring_forward_scratch(const ada2i::TensorRing* args, int64_t struct_bytes) {
    if (!ada2i::valid(*args, struct_bytes)) return -1;
    ada2i::TensorRing a = *args;
    ada2i::Carver carver(nullptr);
    return ada2i::carve_segments(a, carver);
}

ADA2I_EXPORT int64_t ada2i_cuda_tensor_ring_backward_scratch(const ada2i::TensorRing* args, int64_t struct_bytes) {
    if (!ada2i::valid(*args, struct_bytes)) return -1;
    ada2i::TensorRing a = *args;
    ada2i::Carver carver(nullptr);
    return ada2i::carve_backward(a, carver);
}

ADA2I_EXPORT int ada2i_cuda_tensor_ring_forward(const ada2i::TensorRing* args, int64_t struct_bytes, void* stream) {
    if (!ada2i::valid(*args, struct_bytes)) return cudaErrorInvalidValue;
    ada2i::TensorRing a = *args;
    ada2i::Carver carver(a.scratch);
    ada2i::carve_segments(a, carver);
    ada2i::choose_vectors(a);
    return ada2i::with_dtype(a.dtype, [&](auto policy) { return ada2i::forward<decltype(policy)>(a, stream); });
}

ADA2I_EXPORT int ada2i_cuda_tensor_ring_backward(const ada2i::TensorRing* args, int64_t struct_bytes, void* stream) {
    if (!ada2i::valid(*args, struct_bytes)) return cudaErrorInvalidValue;
    ada2i::TensorRing a = *args;
    ada2i::Carver carver(a.scratch);
    ada2i::carve_backward(a, carver);
    ada2i::choose_vectors(a);
    return ada2i::with_dtype(a.dtype, [&](auto policy) { return ada2i::backward<decltype(policy)>(a, stream); });
}
