// What tests ask the kernels on the host: how much they read, wrote and multiplied; and the one product of
// TF32.
#include "cuda/platform.cuh"

#include "cuda/operators.h"

namespace {
bool one_product = false;

struct Race {
  int64_t* to;
};

// Neighbours write to one place, without a barrier: what a race detector must find.
void racing(Race p) {
  static int64_t shared[fdcr::cuda::kThreads];
  shared[threadIdx.x / 2] = threadIdx.x;
  if (threadIdx.x == 0) fdcr::cuda::write(p.to, shared[0]);
}
}  // namespace

bool fdcr::cuda::one_product_allowed() { return one_product; }

#pragma GCC visibility push(default)
extern "C" {
void fdcr_allow_one_product(bool allowed) { one_product = allowed; }

void fdcr_start_counting() {
  fdcr::cuda::counts.on = true;
  fdcr::cuda::counts.bytes = fdcr::cuda::counts.products = 0;
}

void fdcr_stop_counting(int64_t* bytes, int64_t* products) {
  fdcr::cuda::counts.on = false;
  *bytes = fdcr::cuda::counts.bytes;
  *products = fdcr::cuda::counts.products;
}

void fdcr_planted_race(int64_t* to) { fdcr::cuda::launch(racing, {}, {}, Race{to}); }
}
#pragma GCC visibility pop
