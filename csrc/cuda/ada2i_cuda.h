// The C interface of libada2i_cuda's AFW: no device code, so that csrc/torch fills these structures too. Mirrored field by field in
// ada2i_fast/cuda. Pointers are to device memory.
#pragma once

#include <cstdint>

namespace ada2i {

constexpr int kMaxModalities = 8;   // modalities share a launch through arrays of this length, passed by value
constexpr int kMaxRank = 32;

// Element types; kTf32 stores float32 and multiplies in TF32.
enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kTf32 = 3 };

struct TensorRing {
    int32_t dtype, count, rank, gated_target;
    int64_t rows, dialogues;
    float scale, beta, keep_scale;            // keep_scale: 1 / (1 - p)
    uint32_t threshold;                       // words below it are dropped
    const int64_t* offsets;                   // [B + 1]
    const int64_t* seed;                      // [1], or null: no dropout
    int32_t ring[kMaxModalities][kMaxModalities];   // ring[j]: count - 1 modalities
    int64_t width[kMaxModalities];            // D_j
    const void* x[kMaxModalities];            // [N, D_j]
    const void* proj_weight[kMaxModalities];  // [4R, D_j]
    const void* proj_bias[kMaxModalities];    // [4R]
    const void* map_weight[kMaxModalities];   // [D_j, R * R]
    const void* map_bias[kMaxModalities];     // [D_j]
    void* proj[kMaxModalities];               // [N, 4R], saved
    float* average[kMaxModalities];           // [B, R, R], saved
    void* attention[kMaxModalities];          // [N, D_j], saved
    void* out[kMaxModalities];                // [N, D_j]
    void* target[kMaxModalities];             // [N, D_j] the gated output, or null
    const void* grad_out[kMaxModalities];     // [N, D_j]
    const void* grad_target[kMaxModalities];  // [N, D_j], or null
    void* grad_x[kMaxModalities];
    void* grad_proj_weight[kMaxModalities];
    void* grad_proj_bias[kMaxModalities];
    void* grad_map_weight[kMaxModalities];
    void* grad_map_bias[kMaxModalities];
    void* scratch;                            // as many bytes as the _scratch function says

    // Set by the launcher.
    int32_t vector[kMaxModalities];           // D_j a multiple of 4 and every [.., D_j] pointer aligned to 4 elements
    int32_t map_vector[kMaxModalities];       // the same for map_weight and R * R
    int32_t splits;                           // of the rows in weight_kernel
    float* segment[kMaxModalities];           // [ceil(N / 32) + B, R, R]: of u v^T, later of g_C
    float* cores[kMaxModalities];             // [N, 2R]: u, w
    float* grad_cores[kMaxModalities];        // [N, 2R]: g_u without the mean's part, g_w
    float* grad_average[kMaxModalities];      // [B, R, R]: s / N_b g_A
    void* grad_attention[kMaxModalities];     // [N, D_j]
    void* grad_proj[kMaxModalities];          // [N, 4R]
    float* piece[kMaxModalities];             // [splits, D_j (R^2 + 1) + 4R (D_j + 1)]
};

struct AttentionMapping {
    int32_t dtype, count;
    int64_t rows;
    float coefficient[kMaxModalities];
    int64_t width[kMaxModalities];           // D_j
    const void* x[kMaxModalities];           // [N, D_j]
    const void* target[kMaxModalities];      // [N, D_j]
    const void* weight[kMaxModalities];      // [D_j, D_j]
    const void* bias[kMaxModalities];        // [D_j]
    int8_t* sign[kMaxModalities];            // [N, D_j], saved
    float* loss;                             // []
    const float* grad_loss;                  // []
    void* grad_x[kMaxModalities];
    void* grad_target[kMaxModalities];
    void* grad_weight[kMaxModalities];
    void* grad_bias[kMaxModalities];
    void* scratch;

    // Set by the launcher.
    int32_t vector[kMaxModalities];          // D_j a multiple of 4 and every [.., D_j] pointer aligned to 4 elements
    int32_t splits;
    int64_t input_blocks, blocks;            // of mapping_backward_kernel's g_x; of mapping_kernel
    float* partial;                          // [blocks]
    float* piece[kMaxModalities];            // [splits, D_j, D_j + 1]
};

}  // namespace ada2i
