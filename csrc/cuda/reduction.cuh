// Sums and extremes over the threads of a block, in an order that depends on nothing but its size.
#pragma once

#include "platform.cuh"

namespace fdcr::cuda {

template <class T>
__device__ __forceinline__ T combine(Reduction kind, T a, T b) {
  if (kind == Reduction::kSum) return a + b;
  if (kind == Reduction::kMin) return b < a || b != b ? b : a;
  return b > a || b != b ? b : a;
}

// Over `width` neighbouring lanes of a warp, a power of two; every lane gets the result.
template <class T>
__device__ __forceinline__ T over_lanes(Reduction kind, T x, int width) {
  for (int mask = 1; mask < width; mask *= 2) x = combine(kind, x, shuffle_xor(x, mask));
  return x;
}

// Over all threads; the first warp gets the result. `shared` holds a number for each warp; all threads are
// past their use of it.
template <class T>
__device__ __forceinline__ T over_threads(Reduction kind, T x, T* shared) {
  x = over_lanes(kind, x, 32);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) x = combine(kind, x, shared[w]);
  return x;
}

}  // namespace fdcr::cuda
