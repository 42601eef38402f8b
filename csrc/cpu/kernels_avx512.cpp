// The kernels for avx512; setup.py gives this file its instruction set flags.
#define FDCR_SIMD_NAME avx512
#define FDCR_VECTOR_BYTES 64
#include "kernels.inc"
