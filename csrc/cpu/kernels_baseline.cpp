// The kernels for baseline; setup.py gives this file its instruction set flags.
#define FDCR_SIMD_NAME baseline
#define FDCR_VECTOR_BYTES 16
#include "kernels.inc"
