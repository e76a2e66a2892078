// The library of csrc/cuda, launches included, on the shim: the same C ABI, host pointers instead of device pointers.
#include "shim.h"

#include "attention_mapping.cu"
#include "balanced_adam.cu"
#include "library.cu"
#include "tensor_ring.cu"

// order: 0 ascending, 1 descending, 2 shuffled.
extern "C" __attribute__((visibility("default"))) void shim_configure(int order, unsigned seed) {
    shim::machine.schedule = order;
    shim::machine.random.seed(seed);
}
