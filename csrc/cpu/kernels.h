// The CPU kernels: which there are, and which are in use.
#pragma once

#include <cstdint>

#include "problems.h"

// The library of the operators shows the Python module these functions, and nobody anything else.
#define FDCR_EXPORT __attribute__((visibility("default")))

namespace fdcr {

// Calls body(context, begin, end) on disjoint ranges that cover [0, n), possibly from several threads. The
// extension passes PyTorch's pool. No kernel's result may depend on how the range is cut.
using RangeBody = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t n, RangeBody body, void* context);

struct Kernels {
  const char* name;
  void (*squared_grads)(const SquaredGradsProblem&, ParallelFor);
  void (*squared_norm_grads)(const SquaredNormGradsProblem&, ParallelFor);
  void (*squared_embedding_grads)(const SquaredEmbeddingGradsProblem&, ParallelFor);
  // Adds the statistics of each row to those of the numbers before it; null where they are not wanted.
  void (*fill_rows)(const FillRowsProblem&, RowStatistics*, ParallelFor);
  void (*range)(const ClientMatrix&, int64_t clients, int64_t params, double* low, double* high, ParallelFor);
  void (*squared_norm)(const ClientMatrix&, int64_t clients, int64_t params, double* result, ParallelFor);
  // total[view][0][i] += the sum of x of rows[i], total[view][1][i] += that of its squares, contiguous.
  void (*moments)(const MomentsProblem&, double* total, ParallelFor);
  void (*aggregate)(const AggregationProblem&, ParallelFor);
  void (*central_mean)(const CentralMeanProblem&, ParallelFor);
  // total[view][i][j] += the inner product of rows[i] and rows[j] for i <= j, contiguous [row_count,
  // row_count].
  void (*gram)(const GramProblem&, double* total, ParallelFor);
  void (*network)(const NetworkProblem&, ParallelFor);
  void (*sgd_step)(const SgdProblem&, ParallelFor);
  void (*conv3x3)(const Conv3x3Problem&, ParallelFor);
  void (*conv3x3_weight_grad)(const Conv3x3WeightProblem&, ParallelFor);
};

// The kernels in use: the widest that the processor supports, unless FDCR_FAST_SIMD or select_kernels chose
// another.
FDCR_EXPORT const Kernels& kernels();
// Throws std::invalid_argument with the reason where the name is unknown or not supported here.
FDCR_EXPORT void select_kernels(const char* name);
// All that this build holds, widest first; whether the processor can run one.
FDCR_EXPORT int compiled_kernels(const Kernels** table, int capacity);
FDCR_EXPORT bool supported(const Kernels& candidate);

}  // namespace fdcr
