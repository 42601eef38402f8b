// What csrc/cuda/platform.cuh takes from CUDA, for a host: a kernel runs block by block, its threads as
// scheduling.h says. Shared memory is static, since one block runs at a time.
#pragma once

#include <pthread.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
};

#define threadIdx (fdcr::cuda::self->thread)
#define blockIdx (fdcr::cuda::self->block)

namespace fdcr::cuda {

struct Warp;

// A CUDA thread.
struct Thread {
  dim3 thread{}, block{};
  Warp* warp = nullptr;
  int turn = 0;
  int64_t products = 0;
  std::vector<std::pair<uintptr_t, int>> bytes;
};
inline thread_local Thread* self;

#include "scheduling.h"

// The lanes of a warp show each other numbers. Two sets of places in turn: whoever writes to one again has
// met all others after they have read it.
struct Warp {
  Barrier barrier{32};
  double shown[2][32][8];
};

struct Block {
  Barrier barrier{kThreads};
  Warp warps[kWarps];
};
inline Block* here;

struct alignas(16) Bits128 {
  uint32_t word[4];
};

// What kernels did: bytes of global memory, each counted once for every thread block that read or wrote it,
// and multiply-adds of matrix instructions.
struct Counts {
  bool on = false;
  int64_t bytes = 0, products = 0;
  std::mutex mutex;
  std::unordered_map<uintptr_t, int> touched;  // 1: read, 2: written
};
inline Counts counts;

inline void __syncthreads() { here->barrier.wait(); }

inline void touch(const void* at, size_t size, int kind) {
  for (size_t i = 0; counts.on && i < size; ++i)
    self->bytes.emplace_back(reinterpret_cast<uintptr_t>(at) + i, kind);
}

template <class T>
T read(const T* from) {
  touch(from, sizeof(T), 1);
  return *from;
}

template <class T>
void write(T* to, T value) {
  touch(to, sizeof(T), 2);
  *to = value;
}

// Shows numbers to the other lanes; what all lanes show stays there until the next but one call.
template <class... T>
auto& show(T... values) {
  self->turn = 1 - self->turn;
  double* const mine = self->warp->shown[self->turn][threadIdx.x % 32];
  int i = 0;
  ((mine[i++] = static_cast<double>(values)), ...);
  self->warp->barrier.wait();
  return self->warp->shown[self->turn];
}

template <class T>
T shuffle_xor(T value, int mask) {
  return static_cast<T>(show(value)[(threadIdx.x % 32) ^ static_cast<unsigned>(mask)][0]);
}

inline float float16_to_float(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof x);
  return static_cast<float>(x);
}

inline uint16_t float_to_float16(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

inline float masked(float x, uint32_t add) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isfinite(x)) bits = (bits + add) & ~0x1fffu;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float round_to_tf32(float x) { return masked(x, 0x1000); }

// As the matrix units do, which leave the last 13 bits of an operand out.
inline void multiply_add(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  const auto& all = show(a[0], a[1], a[2], a[3], b[0], b[1]);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 8; ++k) {
      const float x = static_cast<float>(all[g * 4 + k % 4][i / 2 + k / 4 * 2]);
      const float y = static_cast<float>(all[(2 * t + i % 2) * 4 + k % 4][4 + k / 4]);
      c[i] += masked(x, 0) * masked(y, 0);
    }
  self->products += 32;
}

inline void multiply_add(double (&c)[2], const double (&a)[1], const double (&b)[1]) {
  const auto& all = show(a[0], b[0]);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 4; ++k) c[i] += all[g * 4 + k][0] * all[(2 * t + i) * 4 + k][1];
  self->products += 8;
}

inline void count_block() {
  for (const auto& [at, kinds] : counts.touched) counts.bytes += kinds == 3 ? 2 : 1;
  counts.touched.clear();
}

inline void count_thread() {
  const std::lock_guard<std::mutex> lock(counts.mutex);
  for (const auto& [at, kind] : self->bytes) counts.touched[at] |= kind;
  self->bytes.clear();
  counts.products += self->products;
  self->products = 0;
}

template <class Problem>
void launch(void (*kernel)(Problem), const Grid& grid, const Stream&, const Problem& problem) {
  Block block;
  here = &block;
  run_threads([&] {
    self->warp = &block.warps[threadIdx.x / 32];
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = {x, y, z};
          kernel(problem);
          if (counts.on) count_thread();
          __syncthreads();
          if (counts.on && threadIdx.x == 0) count_block();
          if (counts.on) __syncthreads();
        }
  });
}

}  // namespace fdcr::cuda
