// PyTorch's threads for the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu/kernels.h"

namespace fdcr {

inline void torch_pool(int64_t n, RangeBody body, void* context) {
  torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace fdcr
