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
#include "dialogue_attention.inl"
#include "cosine_fusion.inl"
#if !defined(__AVX512BF16__)
#include "balanced_adam.inl"
#endif
}  // namespace

// Tiers of bf16 hold what their instructions change: operations on bf16, and with tiles products of floats. dispatch.cpp takes the rest, null
// here, from the tier below: the same code again would be a fourth of the library.
#if defined(__AVX512BF16__)
#define ADA2I_REST(...) nullptr
#else
#define ADA2I_REST(...) __VA_ARGS__
#endif
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define ADA2I_FLOATS(...) nullptr
#else
#define ADA2I_FLOATS(...) __VA_ARGS__
#endif
#define ADA2I_RING(op) \
  {{ADA2I_FLOATS(op<float, float>), ADA2I_REST(op<double, double>), op<bf16, bf16>, ADA2I_REST(op<half, half>)}, \
   {nullptr, nullptr, op<bf16, float>, ADA2I_REST(op<half, float>)}}
#define ADA2I_MAPPING(op) {ADA2I_FLOATS(op<float>), ADA2I_REST(op<double>), op<bf16>, ADA2I_REST(op<half>)}
#define ADA2I_LINEAR(op) {ADA2I_FLOATS(op<float>), nullptr, op<bf16>, ADA2I_REST(op<half>)}
#define ADA2I_ALL_DTYPES(op) {ADA2I_REST(op<float>), ADA2I_REST(op<double>), op<bf16>, ADA2I_REST(op<half>)}
#define ADA2I_UP_TO_FLOAT(op) {ADA2I_REST(op<float>), nullptr, op<bf16>, ADA2I_REST(op<half>)}
#define ADA2I_STRING(name) ADA2I_STRING_(name)
#define ADA2I_STRING_(name) #name
extern const Ada2iTier tier;
const Ada2iTier tier = {ADA2I_STRING(ADA2I_TIER), ADA2I_RING(tensor_ring_forward), ADA2I_RING(tensor_ring_backward),
                        ADA2I_MAPPING(attention_mapping_forward), ADA2I_MAPPING(attention_mapping_backward),
                        ADA2I_ALL_DTYPES(cosine_fusion_forward), ADA2I_ALL_DTYPES(cosine_fusion_backward),
                        ADA2I_UP_TO_FLOAT(relu_dropout_forward), ADA2I_UP_TO_FLOAT(relu_dropout_backward),
                        ADA2I_UP_TO_FLOAT(dropout_norm_forward), ADA2I_UP_TO_FLOAT(dropout_norm_backward),
                        ADA2I_UP_TO_FLOAT(dialogue_attention_forward), ADA2I_UP_TO_FLOAT(dialogue_attention_backward),
                        ADA2I_LINEAR(linear_forward), ADA2I_LINEAR(linear_input), ADA2I_LINEAR(linear_backward),
                        ADA2I_REST(balanced_adam_measure), ADA2I_REST(balanced_adam_update), ADA2I_REST(balanced_adam_modulate),
                        ADA2I_REST(balanced_adam_noise)};
}  // namespace ADA2I_TIER
