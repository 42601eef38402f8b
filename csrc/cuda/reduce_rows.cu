// Adds partial results up.
#include "reduction.cuh"

namespace fdcr::cuda {
namespace {

constexpr int kColumns = 32, kLanes = kThreads / kColumns;

// A thread goes over every kLanes-th row of a column; then those of a column are put together.
template <class T>
__global__ void __launch_bounds__(kThreads) row_reduction(const __grid_constant__ RowReduction<T> p) {
  __shared__ T parts[kLanes][kColumns];
  const int column = threadIdx.x % kColumns, lane = threadIdx.x / kColumns;
  const int64_t c = int64_t(blockIdx.x) * kColumns + column;
  const bool mine = c < p.columns && lane < p.count;
  if (mine) {
    T x = read(p.rows + lane * p.row_stride + c);
#pragma unroll 4
    for (int64_t row = lane + kLanes; row < p.count; row += kLanes)
      x = combine(p.kind, x, read(p.rows + row * p.row_stride + c));
    parts[lane][column] = x;
  }
  __syncthreads();
  if (lane > 0 || c >= p.columns) return;
  T result = p.count > 0 ? parts[0][column] : T(0);
  for (int i = 1; i < kLanes && i < p.count; ++i) result = combine(p.kind, result, parts[i][column]);
  if (p.before != nullptr) result = combine(p.kind, read(p.before + c * p.before_stride), result);
  write(p.result + c, result);
}

}  // namespace

void reduce_rows(const RowReduction<float>& p, const Stream& stream) {
  launch(row_reduction<float>, {ceil_div(p.columns, kColumns)}, stream, p);
}

void reduce_rows(const RowReduction<double>& p, const Stream& stream) {
  launch(row_reduction<double>, {ceil_div(p.columns, kColumns)}, stream, p);
}

}  // namespace fdcr::cuda
