// What the library says about itself.

#include "common.cuh"

// The text of a result of any other function here.
ADA2I_EXPORT const char* ada2i_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Raised whenever an argument struct or a signature changes.
ADA2I_EXPORT int ada2i_cuda_abi_version() { return 2; }
