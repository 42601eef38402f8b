// What the kernels take from CUDA, and the one way in which they are launched. The tests compile the same
// kernels for the host, where tests/cuda_on_host/on_host.h defines all of this: one thread of the operating
// system for each CUDA thread. So kernels touch global memory by read() and write() only, which are counted
// there.
#pragma once

#include <cstdint>

#include "kernels.h"

#ifdef FDCR_CUDA_ON_HOST
#include "on_host.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>

namespace fdcr::cuda {

template <class T>
__device__ __forceinline__ T read(const T* from) {
  return *from;
}

// 128 bits that no thread writes; by hand, or some compilers make several loads of them.
struct alignas(16) Bits128 {
  uint32_t word[4];
};

__device__ __forceinline__ Bits128 read(const Bits128* from) {
  Bits128 bits;
  asm("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(bits.word[0]), "=r"(bits.word[1]), "=r"(bits.word[2]), "=r"(bits.word[3])
      : "l"(__cvta_generic_to_global(from)));
  return bits;
}

template <class T>
__device__ __forceinline__ void write(T* to, T value) {
  *to = value;
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ float float16_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

__device__ __forceinline__ uint16_t float_to_float16(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// To the nearest number of TF32, of two equally near ones the one farther from zero.
__device__ __forceinline__ float round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// c += a b, of a warp: a [16, 8] and b [8, 8] of TF32, c [16, 8]. With g = lane / 4 and t = lane % 4 a lane
// holds a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4]; b[t, g], b[t + 4, g]; c[g, 2t], c[g, 2t + 1] and
// the same of row g + 8.
__device__ __forceinline__ void multiply_add(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// The same of float64: a [8, 4] and b [4, 8], c [8, 8]; a lane holds a[g, t], b[t, g], c[g, 2t] and c[g, 2t +
// 1].
__device__ __forceinline__ void multiply_add(double (&c)[2], const double (&a)[1], const double (&b)[1]) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(c[0]), "+d"(c[1])
      : "d"(a[0]), "d"(b[0]));
}

// Puts one thread block of the kernel in the stream for each point of the grid, if there is any.
template <class Problem>
void launch(void (*kernel)(Problem), const Grid& grid, const Stream& stream, const Problem& problem) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff)
    throw std::runtime_error("too large for one launch");
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                    static_cast<unsigned>(grid.z));
  void* arguments[] = {const_cast<Problem*>(&problem)};
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, dim3(kThreads),
                                             arguments, 0, static_cast<cudaStream_t>(stream.handle));
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace fdcr::cuda

#endif
