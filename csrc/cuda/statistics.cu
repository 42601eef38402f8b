// Squared norm, and smallest and largest number, of every client: one reading.
#include <limits>

#include "elements.cuh"
#include "reduction.cuh"

namespace fdcr::cuda {
namespace {

struct Statistics {
  StatisticsProblem problem;
  int64_t chunk;  // parameters of a thread block
};

template <class V, class M>
__global__ void __launch_bounds__(kThreads) client_statistics(const __grid_constant__ Statistics s) {
  constexpr int kVector = V::kVector;
  __shared__ double sums[kWarps];
  __shared__ M lows[kWarps], highs[kWarps];
  const StatisticsProblem& p = s.problem;
  const int64_t chunk = blockIdx.x / p.clients, k = blockIdx.x % p.clients, begin = chunk * s.chunk;
  const int64_t stop = begin + s.chunk < p.params ? begin + s.chunk : p.params;
  double norm = 0;
  M low = std::numeric_limits<M>::infinity(), high = -low;
#pragma unroll 4
  for (int64_t v = begin + threadIdx.x * kVector; v < stop; v += kThreads * kVector) {
    M x[kVector];
    V::load(p.values, k, place(p.values, v), x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const bool there = v + i < p.params;
      norm += there ? double(x[i]) * x[i] : 0;
      low = there ? combine(Reduction::kMin, low, x[i]) : low;
      high = there ? combine(Reduction::kMax, high, x[i]) : high;
    }
  }
  const double norm_of_chunk = over_threads(Reduction::kSum, norm, sums);
  const M low_of_chunk = over_threads(Reduction::kMin, low, lows);
  const M high_of_chunk = over_threads(Reduction::kMax, high, highs);
  if (threadIdx.x > 0) return;
  if (p.norm != nullptr) write(p.norm + blockIdx.x, norm_of_chunk);
  if (p.low != nullptr) write(p.low + blockIdx.x, double(low_of_chunk));
  if (p.high != nullptr) write(p.high + blockIdx.x, double(high_of_chunk));
}

int64_t chunk_of(const StatisticsProblem& p, const Stream& stream) {
  constexpr int64_t kStep = kThreads * 8;
  return ceil_div(larger(8192, ceil_div(p.params * p.clients, 16 * stream.multiprocessors)), kStep) * kStep;
}

template <class V, class M>
void launch_statistics(const StatisticsProblem& p, const Stream& stream) {
  launch(client_statistics<V, M>, {statistics_chunks(p, stream) * p.clients}, stream,
         Statistics{p, chunk_of(p, stream)});
}

}  // namespace

int64_t statistics_chunks(const StatisticsProblem& p, const Stream& stream) {
  return ceil_div(p.params, chunk_of(p, stream));
}

void statistics(const StatisticsProblem& p, const Stream& stream) {
  if (!in_vectors(p.values)) return launch_statistics<Singles, double>(p, stream);
  switch (p.values.source.element) {
    case Element::kFloat64:
      return launch_statistics<Vectors<double>, double>(p, stream);
    case Element::kBFloat16:
      return launch_statistics<Vectors<BFloat16>, float>(p, stream);
    case Element::kFloat16:
      return launch_statistics<Vectors<Float16>, float>(p, stream);
    default:
      return launch_statistics<Vectors<float>, float>(p, stream);
  }
}

}  // namespace fdcr::cuda
