// All ops for one tier. Compiled once per tier with -DADA2I_TIER=<name> and the flags of that instruction set. Everything has internal
// linkage, and no header with inline functions of external linkage is included: the linker would keep one copy for all tiers, maybe the
// one in AVX-512.
#include "ada2i_cpu.h"

#include <omp.h>
#include <stdlib.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ADA2I_TIER {
namespace {
#include "vector.inl"
#include "scratch.inl"
#include "philox.inl"
#include "gemm.inl"
#include "attention_mapping.inl"
#include "tensor_ring.inl"
#include "dropout.inl"
#include "linear.inl"
#include "balanced_adam.inl"
#include "dialogue_attention.inl"
#include "cosine_fusion.inl"
}  // namespace

#define ADA2I_ALL_DTYPES(op) {op<float>, op<double>, op<bf16>, op<half>}
#define ADA2I_UP_TO_FLOAT(op) {op<float>, nullptr, op<bf16>, op<half>}
#define ADA2I_RING(op) {{op<float, float>, op<double, double>, op<bf16, bf16>, op<half, half>}, {nullptr, nullptr, op<bf16, float>, op<half, float>}}
#define ADA2I_STRING(name) ADA2I_STRING_(name)
#define ADA2I_STRING_(name) #name
extern const Ada2iTier tier;
const Ada2iTier tier = {ADA2I_STRING(ADA2I_TIER), ADA2I_RING(tensor_ring_forward), ADA2I_RING(tensor_ring_backward),
                        ADA2I_ALL_DTYPES(attention_mapping_forward), ADA2I_ALL_DTYPES(attention_mapping_backward),
                        ADA2I_ALL_DTYPES(cosine_fusion_forward), ADA2I_ALL_DTYPES(cosine_fusion_backward),
                        ADA2I_UP_TO_FLOAT(relu_dropout_forward), ADA2I_UP_TO_FLOAT(relu_dropout_backward),
                        ADA2I_UP_TO_FLOAT(dropout_norm_forward), ADA2I_UP_TO_FLOAT(dropout_norm_backward),
                        ADA2I_UP_TO_FLOAT(dialogue_attention_forward), ADA2I_UP_TO_FLOAT(dialogue_attention_backward),
                        ADA2I_UP_TO_FLOAT(linear_forward), ADA2I_UP_TO_FLOAT(linear_input),
                        ADA2I_UP_TO_FLOAT(linear_backward), balanced_adam_measure, balanced_adam_update, balanced_adam_modulate,
                        balanced_adam_noise};
}  // namespace ADA2I_TIER
