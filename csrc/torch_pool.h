// PyTorch's threads for the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu/kernels.h"

namespace fdcr {

inline void torch_pool(int64_t n, RangeBody body, void* context) {
  torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

// Fewer numbers are read before another thread is awake.
constexpr int64_t kFewNumbers = 1 << 16;

inline void this_thread(int64_t n, RangeBody body, void* context) { body(context, 0, n); }

// For reading so many numbers.
inline ParallelFor pool_for(int64_t numbers) { return numbers < kFewNumbers ? this_thread : torch_pool; }

}  // namespace fdcr
