// The exported functions, and the choice of the tier: the best that the processor has, or the one named by ADA2I_FAST_CPU_TIER.
#include "ada2i_cpu.h"

#include <stdlib.h>
#include <string.h>

#define ADA2I_EXPORT extern "C" __attribute__((visibility("default")))

namespace baseline { extern const Ada2iTier tier; }
#if defined(ADA2I_X86_TIERS)
namespace avx2 { extern const Ada2iTier tier; }
namespace avx512 { extern const Ada2iTier tier; }
namespace avx512_bf16 { extern const Ada2iTier tier; }
#endif

namespace {

// Tiers that this processor can run, best first, ended by null.
const Ada2iTier* const* available() {
  static const Ada2iTier* list[5];
  if (list[0]) return list;
  const Ada2iTier* found[5] = {};
  int count = 0;
#if defined(ADA2I_X86_TIERS)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
  if (v4 && __builtin_cpu_supports("avx512bf16")) found[count++] = &avx512_bf16::tier;
  if (v4) found[count++] = &avx512::tier;
  if (v3) found[count++] = &avx2::tier;
#endif
  found[count++] = &baseline::tier;
  for (int i = count; i-- > 0;) list[i] = found[i];
  return list;
}

const Ada2iTier* current;

const Ada2iTier* chosen() {
  if (!current) {
    const char* name = getenv("ADA2I_FAST_CPU_TIER");
    const Ada2iTier* tier = available()[0];
    if (name && *name)
      for (auto t = available(); *t; ++t)
        if (!strcmp((*t)->name, name)) tier = *t;
    current = tier;
  }
  return current;
}

}  // namespace

// Names of the tiers that can run here, best first; null past the end.
ADA2I_EXPORT const char* ada2i_cpu_tier_name(int index) { return available()[index] ? available()[index]->name : nullptr; }
ADA2I_EXPORT const char* ada2i_cpu_tier() { return chosen()->name; }

// Takes another tier from here on; 1 if there is none of that name.
ADA2I_EXPORT int ada2i_cpu_set_tier(const char* name) {
  for (auto t = available(); *t; ++t)
    if (!strcmp((*t)->name, name)) {
      current = *t;
      return 0;
    }
  return 1;
}

ADA2I_EXPORT int ada2i_tensor_ring_forward(const TensorRing* args) { return chosen()->tensor_ring_forward[args->dtype](args); }
ADA2I_EXPORT int ada2i_tensor_ring_backward(const TensorRing* args) { return chosen()->tensor_ring_backward[args->dtype](args); }
ADA2I_EXPORT int ada2i_attention_mapping_forward(const AttentionMapping* args) {
  return chosen()->attention_mapping_forward[args->dtype](args);
}
ADA2I_EXPORT int ada2i_attention_mapping_backward(const AttentionMapping* args) {
  return chosen()->attention_mapping_backward[args->dtype](args);
}
ADA2I_EXPORT int ada2i_cosine_fusion_forward(const CosineFusion* args) { return chosen()->cosine_fusion_forward[args->dtype](args); }
ADA2I_EXPORT int ada2i_cosine_fusion_backward(const CosineFusion* args) { return chosen()->cosine_fusion_backward[args->dtype](args); }
ADA2I_EXPORT int ada2i_relu_dropout_forward(const DropoutFused* args) { return chosen()->relu_dropout_forward[args->dtype](args); }
ADA2I_EXPORT int ada2i_relu_dropout_backward(const DropoutFused* args) { return chosen()->relu_dropout_backward[args->dtype](args); }
ADA2I_EXPORT int ada2i_dropout_norm_forward(const DropoutFused* args) { return chosen()->dropout_norm_forward[args->dtype](args); }
ADA2I_EXPORT int ada2i_dropout_norm_backward(const DropoutFused* args) { return chosen()->dropout_norm_backward[args->dtype](args); }
ADA2I_EXPORT int ada2i_dialogue_attention_forward(const DialogueAttention* args) {
  return chosen()->dialogue_attention_forward[args->dtype](args);
}
ADA2I_EXPORT int ada2i_dialogue_attention_backward(const DialogueAttention* args) {
  return chosen()->dialogue_attention_backward[args->dtype](args);
}
ADA2I_EXPORT int ada2i_balanced_adam_measure(const BalancedAdam* args) { return chosen()->balanced_adam_measure(args); }
ADA2I_EXPORT int ada2i_balanced_adam_update(const BalancedAdam* args) { return chosen()->balanced_adam_update(args); }
ADA2I_EXPORT int ada2i_balanced_adam_modulate(const BalancedAdam* args) { return chosen()->balanced_adam_modulate(args); }
ADA2I_EXPORT int ada2i_balanced_adam_noise(const BalancedAdam* args) { return chosen()->balanced_adam_noise(args); }
