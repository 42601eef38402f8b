// Products of matrices in shared memory, by the matrix units: what the gradients and the inner products
// share.
#pragma once

#include "platform.cuh"

namespace fdcr::cuda {

// A thread block forms a tile [kTile, kTile] of A B^T from slices [kTile, kDepth] of both, of which each of
// its four warps has a quarter. Slices are stored by rows of kPitch, which spreads what a warp reads over all
// banks.
template <class M>
struct Product {
  static constexpr int kTile = 64, kDepth = 128 / sizeof(M), kPitch = kDepth + 4;
  static constexpr int kSlice = kTile * kPitch;
  // The matrix instruction's: [8 kHalves, 4 kHalves] times [4 kHalves, 8].
  static constexpr int kHalves = sizeof(M) == 4 ? 2 : 1;
  static constexpr int kRowTiles = 4 / kHalves, kColumnTiles = 4, kHeld = 2 * kHalves;
  using Held = M[kRowTiles][kColumnTiles][kHeld];

  // The row and column in the tile of what this thread holds in held[i][j][r].
  static __device__ __forceinline__ int row(int i, int r) {
    return threadIdx.x / 64 * 32 + i * 8 * kHalves + threadIdx.x % 32 / 4 + r / 2 * 8;
  }
  static __device__ __forceinline__ int column(int j, int r) {
    return threadIdx.x / 32 % 2 * 32 + j * 8 + threadIdx.x % 4 * 2 + r % 2;
  }

  // held += a b^T. Numbers of float32 become two of TF32 each, and three products, unless one is enough.
  static __device__ __forceinline__ void add(Held& held, const M* a, const M* b, bool one_product) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    a += (threadIdx.x / 64 * 32 + g) * kPitch + t;
    b += (threadIdx.x / 32 % 2 * 32 + g) * kPitch + t;
#pragma unroll 1
    for (int k = 0; k < kDepth; k += 4 * kHalves) {
      M b_first[kColumnTiles][kHalves], b_rest[kColumnTiles][kHalves];
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int r = 0; r < kHalves; ++r) split(b[j * 8 * kPitch + k + 4 * r], b_first[j][r], b_rest[j][r]);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        M a_first[kHalves * kHalves], a_rest[kHalves * kHalves];
#pragma unroll
        for (int r = 0; r < kHalves * kHalves; ++r)
          split(a[(i * kHalves + r % 2) * 8 * kPitch + k + r / 2 * 4], a_first[r], a_rest[r]);
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          if (sizeof(M) == 4 && !one_product) {
            multiply_add(held[i][j], a_rest, b_first[j]);
            multiply_add(held[i][j], a_first, b_rest[j]);
          }
          multiply_add(held[i][j], a_first, b_first[j]);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ void split(float x, float& first, float& rest) {
    first = round_to_tf32(x);
    rest = round_to_tf32(x - first);
  }
  static __device__ __forceinline__ void split(double x, double& first, double& rest) {
    first = x;
    rest = 0;
  }
};

}  // namespace fdcr::cuda
