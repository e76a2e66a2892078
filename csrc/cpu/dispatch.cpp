// The exported functions, and the choice of the tier: the best that the processor has, or the one named by ADA2I_FAST_CPU_TIER.
#include "ada2i_cpu.h"

#include <stdlib.h>
#include <string.h>
#if defined(ADA2I_HAS_AMX_BF16)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define ADA2I_EXPORT extern "C" __attribute__((visibility("default")))

namespace baseline { extern const Ada2iTier tier; }
#if defined(ADA2I_HAS_AVX2)
namespace avx2 { extern const Ada2iTier tier; }
#endif
#if defined(ADA2I_HAS_AVX512)
namespace avx512 { extern const Ada2iTier tier; }
#endif
#if defined(ADA2I_HAS_AVX512_BF16)
namespace avx512_bf16 { extern const Ada2iTier tier; }
#endif
#if defined(ADA2I_HAS_AMX_BF16)
namespace amx_bf16 { extern const Ada2iTier tier; }
#endif

namespace {

#if defined(ADA2I_HAS_AMX_BF16)
// Whether there are AMX tiles for bf16 and the system lets this process use them: their state is saved for those that ask alone.
bool amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

// Tiers that this processor can run, best last.
struct Tiers {
  Ada2iTier tier[5];
  int count = 0;

  // What it leaves to the tier below is taken from that.
  void add(const Ada2iTier& next) {
    constexpr size_t pointers = sizeof(Ada2iTier) / sizeof(void*);
    void *whole[pointers], *below[pointers] = {};
    memcpy(whole, &next, sizeof next);
    if (count) memcpy(below, &tier[count - 1], sizeof below);
    for (size_t i = 0; i < pointers; ++i)
      if (!whole[i]) whole[i] = below[i];
    memcpy((void*)&tier[count++], whole, sizeof whole);
  }

  Tiers() {
    add(baseline::tier);
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
    const bool dot = v4 && __builtin_cpu_supports("avx512bf16");
#if defined(ADA2I_HAS_AVX2)
    if (v3) add(avx2::tier);
#endif
#if defined(ADA2I_HAS_AVX512)
    if (v4) add(avx512::tier);
#endif
#if defined(ADA2I_HAS_AVX512_BF16)
    if (dot) add(avx512_bf16::tier);
#endif
#if defined(ADA2I_HAS_AMX_BF16)
    if (dot && amx()) add(amx_bf16::tier);
#endif
    (void)dot;
#endif
  }

  const Ada2iTier* named(const char* name) const {
    for (int i = 0; i < count; ++i)
      if (!strcmp(tier[i].name, name)) return &tier[i];
    return nullptr;
  }
};

const Tiers& available() {
  static const Tiers tiers;
  return tiers;
}

const Ada2iTier* current;

const Ada2iTier* chosen() {
  if (!current) {
    const Tiers& tiers = available();
    const char* name = getenv("ADA2I_FAST_CPU_TIER");
    const Ada2iTier* tier = name ? tiers.named(name) : nullptr;
    current = tier ? tier : &tiers.tier[tiers.count - 1];
  }
  return current;
}

}  // namespace

// Names of the tiers that can run here, best first; null past the end.
ADA2I_EXPORT const char* ada2i_cpu_tier_name(int index) {
  const Tiers& tiers = available();
  return index < tiers.count ? tiers.tier[tiers.count - 1 - index].name : nullptr;
}
// Grows when an entry changes its meaning; ada2i_fast/cpu/__init__.py has the same number.
ADA2I_EXPORT int ada2i_cpu_abi_version() { return 8; }

ADA2I_EXPORT const char* ada2i_cpu_tier() { return chosen()->name; }

// Takes another tier from here on; 1 if there is none of that name.
ADA2I_EXPORT int ada2i_cpu_set_tier(const char* name) {
  const Ada2iTier* tier = available().named(name);
  if (tier) current = tier;
  return !tier;
}

// 0; 1 without memory for scratch; 2 if the caller knows the arguments in another size: it was not built together with this library.
#define ADA2I_ENTRY(op, Args, run) \
  ADA2I_EXPORT int ada2i_##op(const Args* args, int64_t size) { return size != int64_t(sizeof(Args)) ? 2 : chosen()->run(args); }
#define ADA2I_TYPED(op, Args) ADA2I_ENTRY(op, Args, op[args->dtype])

// Calls of these functions, one after the other: 0, or 4 times the number of the first that fails, plus what it returned.
struct Ada2iCall {
  int (*function)(const void* args, int64_t size);
  const void* args;
  int64_t size;
};
ADA2I_EXPORT int ada2i_cpu_run(const Ada2iCall* calls, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (const int status = calls[i].function(calls[i].args, calls[i].size)) return int(4 * i + status);
  return 0;
}

ADA2I_ENTRY(tensor_ring_forward, TensorRing, tensor_ring_forward[args->parameters != args->dtype][args->dtype])
ADA2I_ENTRY(tensor_ring_backward, TensorRing, tensor_ring_backward[args->parameters != args->dtype][args->dtype])
ADA2I_TYPED(attention_mapping_forward, AttentionMapping)
ADA2I_TYPED(attention_mapping_backward, AttentionMapping)
ADA2I_TYPED(cosine_fusion_forward, CosineFusion)
ADA2I_TYPED(cosine_fusion_backward, CosineFusion)
ADA2I_TYPED(relu_dropout_forward, DropoutFused)
ADA2I_TYPED(relu_dropout_backward, DropoutFused)
ADA2I_TYPED(dropout_norm_forward, DropoutFused)
ADA2I_TYPED(dropout_norm_backward, DropoutFused)
ADA2I_TYPED(dialogue_attention_forward, DialogueAttention)
ADA2I_TYPED(dialogue_attention_backward, DialogueAttention)
ADA2I_TYPED(linear_forward, Linear)
ADA2I_TYPED(linear_input, Linear)
ADA2I_TYPED(linear_backward, Linear)
ADA2I_ENTRY(balanced_adam_measure, BalancedAdam, balanced_adam_measure)
ADA2I_ENTRY(balanced_adam_update, BalancedAdam, balanced_adam_update)
ADA2I_ENTRY(balanced_adam_modulate, BalancedAdam, balanced_adam_modulate)
ADA2I_ENTRY(balanced_adam_noise, BalancedAdam, balanced_adam_noise)
