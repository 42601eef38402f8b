// The kernels for avx2; setup.py gives this file its instruction set flags.
#define FDCR_SIMD_NAME avx2
#define FDCR_VECTOR_BYTES 32
#include "kernels.inc"
