// The CUDA kernels' launchers: plain structs in, whose pointers are to memory of the device; nothing waits
// for it.
//
// Sums that several thread blocks share are partial results in a workspace, which are added in a fixed order:
// no atomics, the same bits every time. A launcher says how large its workspace must be.
#pragma once

#include <cstdint>

#include "problems.h"

namespace fdcr::cuda {

constexpr int kThreads = 128;  // of every thread block
constexpr int kWarps = kThreads / 32;

struct Stream {
  void* handle = nullptr;
  int64_t multiprocessors = 1;  // of its device: how many thread blocks run side by side, at least
};

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

enum class Reduction : int { kSum, kMin, kMax };  // of which the last two are NaN if any number is

// result[c] = before[c * before_stride] (+) rows[0][c] (+) rows[1][c] (+) ... in a fixed order; `before` may
// be null.
template <class T>
struct RowReduction {
  const T* rows = nullptr;
  int64_t count = 0, columns = 0, row_stride = 0;
  const T* before = nullptr;
  int64_t before_stride = 0;
  Reduction kind = Reduction::kSum;
  T* result = nullptr;
};
void reduce_rows(const RowReduction<float>&, const Stream&);
void reduce_rows(const RowReduction<double>&, const Stream&);

// Squared norms, and smallest and largest numbers, of the clients: in rows [chunks, clients] of partial
// results; null for those that are not wanted.
struct StatisticsProblem {
  int64_t clients = 0, params = 0;
  ClientMatrix values;
  double *norm = nullptr, *low = nullptr, *high = nullptr;
};
int64_t statistics_chunks(const StatisticsProblem&, const Stream&);
void statistics(const StatisticsProblem&, const Stream&);

// The results go to partial [aggregation_blocks, 2 clients + 1], not to the problem's distance, norm and
// mean_square: these, in rows; NaN for clients that are not read. `to.result` has the type of `to.global`.
int64_t aggregation_blocks(const AggregationProblem&, const Stream&);
void aggregate(const AggregationProblem&, double* partial, const Stream&);

// With more than one split, the problem's weight and bias are [splits, ...], to be added up. Float32 products
// are three of TF32, or one.
int64_t squared_grads_splits(const SquaredGradsProblem&, const Stream&);
void squared_grads(const SquaredGradsProblem&, bool one_product, const Stream&);

// One view: result[i, j] = before[i, j] + the inner product, symmetric; NaN where i or j is not read.
struct GramCall {
  GramTransform transform = GramTransform::kUpdate;
  const ParamRange* ranges = nullptr;  // on the host, as is is_read; both are read before the launch returns
  int64_t range_count = 0;
  const bool* is_read = nullptr;  // [clients]
  const double* before = nullptr;
  int64_t before_stride[2] = {};
  double* partial = nullptr;  // [gram_splits, clients, clients]
  double* result = nullptr;   // contiguous
};
int64_t gram_splits(const GramProblem&, int64_t clients, const Stream&);
void gram(const GramProblem&, int64_t clients, const GramCall&, const Stream&);

}  // namespace fdcr::cuda
