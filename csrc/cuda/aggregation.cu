// Discrepancy and rescaled mean: one kernel that computes either or both from one reading of the clients.
//
// A thread block owns a stretch of parameters and goes through it in steps. In a step a thread has some
// neighbouring parameters of up to kHeld clients in registers: the mean over the clients goes through shared
// memory, then the distances to it come from what is held. More clients than the block's threads can hold are
// read a second time, which is meant to find them in the L2 cache: few blocks run then, of narrow steps.
#include "elements.cuh"
#include "half_tanh.h"
#include "reduction.cuh"

namespace fdcr::cuda {
namespace {

struct Aggregation {
  AggregationProblem problem;
  double* partial;
  int64_t stretch;  // parameters of a thread block
  int vectors;      // threads side by side in a step, of kThreads; the others have other clients
};

template <class V, class M>
constexpr int held_clients() {
  return static_cast<int>(smaller(8, 128 / (V::kVector * sizeof(M))));
}

// The step that suits so many clients.
template <class V, class M>
int vectors_of(int64_t clients) {
  int rows = 4;
  while (rows < 32 && rows * held_clients<V, M>() < clients) rows *= 2;
  return kThreads / rows;
}

template <class M>
struct Client {
  M share, weight, low, scale;
  bool scored, averaged;
};

// The terms of the polynomial from kTerm on, by Horner's rule.
template <class M, int kTerm = 0>
__device__ __forceinline__ M half_tanh_terms(M squared) {
  constexpr int kTerms = sizeof(HalfTanh<M>::c) / sizeof(M);
  constexpr M c = HalfTanh<M>::c[kTerm];
  if constexpr (kTerm + 1 == kTerms)
    return c;
  else
    return half_tanh_terms<M, kTerm + 1>(squared) * squared + c;
}

// tanh(x / 2) for x in [0, 1].
template <class M>
__device__ __forceinline__ M half_tanh(M x) {
  return x * half_tanh_terms<M>(x * x);
}

template <class M>
__device__ __forceinline__ Client<M> client_of(const AggregationProblem& p, int64_t k) {
  Client<M> client{};
  if (k >= p.clients) return client;
  const double share = p.alpha != nullptr ? read(p.alpha + k) : 0;
  const double weight = p.weights != nullptr ? read(p.weights + k) : 0;
  client.share = static_cast<M>(share);
  client.weight = static_cast<M>(weight);
  client.scored = share != 0;
  client.averaged = weight != 0;
  if ((p.reweight || p.rescale) && (client.scored || client.averaged)) {
    const double low = read(p.fisher_min + k);
    client.low = static_cast<M>(low);
    client.scale = static_cast<M>(1 / (read(p.fisher_max + k) - low));
  }
  return client;
}

// Updates x and importances f of a client; zero behind the last parameter.
template <class V, class M>
__device__ __forceinline__ void load_client(const AggregationProblem& p, const Client<M>& client, int64_t k,
                                            int64_t update_at, int64_t fisher_at, int64_t count,
                                            bool importances, M (&x)[V::kVector], M (&f)[V::kVector]) {
  V::load(p.updates, k, update_at, x);
  if (importances) V::load(p.fishers, k, fisher_at, f);
#pragma unroll
  for (int i = 0; i < V::kVector; ++i) {
    if (importances) f[i] = i < count ? (f[i] - client.low) * client.scale : M(0);
    x[i] = i < count ? x[i] : M(0);
  }
}

template <class V, class M>
__global__ void __launch_bounds__(kThreads) aggregation(const __grid_constant__ Aggregation a) {
  constexpr int kVector = V::kVector, kHeld = held_clients<V, M>();
  __shared__ Client<M> clients[32 * kHeld];
  __shared__ double mean_parts[kVector][kThreads], moved_parts[kVector][kThreads], mean[32 * kVector];
  __shared__ double warps[kWarps];
  const AggregationProblem& p = a.problem;
  const bool score = p.alpha != nullptr, average = p.weights != nullptr,
             importances = p.reweight || p.rescale;
  const int vectors = a.vectors, rows = kThreads / vectors;
  const int vector = threadIdx.x % vectors, row = threadIdx.x / vectors;
  const int64_t group = rows * kHeld;
  const bool held = p.clients <= group;
  const int64_t begin = blockIdx.x * a.stretch,
                stop = begin + a.stretch < p.params ? begin + a.stretch : p.params;
  double* const sums = a.partial + blockIdx.x * (2 * p.clients + 1);

  M u[kHeld][kVector] = {};
  double distance[kHeld] = {}, norm[kHeld] = {}, mean_square = 0;
  for (int64_t first = begin; first < stop; first += vectors * kVector) {
    const int64_t v = first + vector * kVector, count = p.params - v;
    const int64_t update_at = count > 0 ? place(p.updates, v) : 0;
    const int64_t fisher_at = count > 0 && importances ? place(p.fishers, v) : 0;
    for (int64_t k0 = 0; k0 < p.clients; k0 += group) {
      if (!held || first == begin) {
        __syncthreads();
        for (int i = threadIdx.x; i < group; i += kThreads) clients[i] = client_of<M>(p, k0 + i);
        __syncthreads();
      }
      M mean_part[kVector] = {}, moved_part[kVector] = {};
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        const Client<M> client = clients[j * rows + row];
        if (count <= 0) {  // behind the last parameter nothing is left of the step before
#pragma unroll
          for (int i = 0; i < kVector; ++i) u[j][i] = 0;
        } else if (client.scored || client.averaged) {
          M x[kVector], f[kVector] = {};
          load_client<V, M>(p, client, k0 + j * rows + row, update_at, fisher_at, count, importances, x, f);
          M square = 0;
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            const M reweighted = p.reweight ? f[i] * x[i] : x[i];
            u[j][i] = reweighted;
            square += x[i] * x[i];
            if (client.scored) mean_part[i] += client.share * reweighted;
            if (client.averaged)
              moved_part[i] += client.weight * (p.rescale ? x[i] + half_tanh(f[i]) * x[i] : x[i]);
          }
          norm[j] += square;
        }
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) {  // of more than kHeld clients the sums are float64
        mean_parts[i][threadIdx.x] = (k0 > 0 ? mean_parts[i][threadIdx.x] : 0) + mean_part[i];
        moved_parts[i][threadIdx.x] = (k0 > 0 ? moved_parts[i][threadIdx.x] : 0) + moved_part[i];
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < vectors * kVector; c += kThreads) {
      double of_scored = 0, of_averaged = 0;
      for (int r = 0; r < rows && p.clients > 0; ++r) {
        of_scored += mean_parts[c % kVector][r * vectors + c / kVector];
        of_averaged += moved_parts[c % kVector][r * vectors + c / kVector];
      }
      mean[c] = of_scored;
      mean_square += of_scored * of_scored;
      if (average && first + c < p.params) {
        const double w = read_any<double>(p.to.global, (first + c) * p.to.global_stride) + of_averaged;
        const double kept = w > p.to.limit ? p.to.limit : w < -p.to.limit ? -p.to.limit : w;
        write_any(p.to.result, p.to.global.element, first + c, kept);
      }
    }
    __syncthreads();
    if (!score) continue;
    for (int64_t k0 = 0; k0 < p.clients; k0 += group) {
      if (!held) {
        __syncthreads();
        for (int i = threadIdx.x; i < group; i += kThreads) clients[i] = client_of<M>(p, k0 + i);
        __syncthreads();
      }
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        M square = 0, away_square = 0;
        const int64_t k = k0 + j * rows + row;
        if (!held) {
          const Client<M> client = clients[j * rows + row];
          M x[kVector] = {}, f[kVector] = {};
          if (count > 0 && client.scored)
            load_client<V, M>(p, client, k, update_at, fisher_at, count, p.reweight, x, f);
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            square += x[i] * x[i];
            u[j][i] = p.reweight && count > 0 && client.scored ? f[i] * x[i] : x[i];
          }
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const M away = static_cast<M>(mean[vector * kVector + i]) - u[j][i];
          away_square += away * away;
        }
        if (held) {
          distance[j] += away_square;
          continue;
        }
        const double of_step = over_lanes<double>(Reduction::kSum, away_square, vectors);
        const double norm_of_step = over_lanes<double>(Reduction::kSum, square, vectors);
        if (vector == 0 && k < p.clients) {
          write(sums + k, (first > begin ? read(sums + k) : 0) + of_step);
          write(sums + p.clients + k, (first > begin ? read(sums + p.clients + k) : 0) + norm_of_step);
        }
      }
    }
  }
  if (!score) return;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const double of_stretch = over_lanes(Reduction::kSum, distance[j], vectors);
    const double norm_of_stretch = over_lanes(Reduction::kSum, norm[j], vectors);
    for (int64_t k = j * rows + row; vector == 0 && k < p.clients; k += group) {
      const bool scored = read(p.alpha + k) != 0;
      if (scored && !held) continue;
      write(sums + k, scored ? of_stretch : nan(""));
      write(sums + p.clients + k, scored ? norm_of_stretch : nan(""));
    }
  }
  mean_square = over_threads(Reduction::kSum, mean_square, warps);
  if (threadIdx.x == 0) write(sums + 2 * p.clients, mean_square);
}

template <class Body>
void with_kernel(const AggregationProblem& p, Body body) {
  const bool fishers = p.reweight || p.rescale;
  const Element element = p.updates.source.element;
  const bool vectors =
      in_vectors(p.updates) && (!fishers || (p.fishers.source.element == element && in_vectors(p.fishers)));
  if (!vectors || (!p.single && element != Element::kFloat32 && element != Element::kFloat64))
    return p.single ? body(Singles{}, 0.0f) : body(Singles{}, 0.0);
  switch (element) {
    case Element::kFloat64:
      return body(Vectors<double>{}, 0.0);
    case Element::kBFloat16:
      return body(Vectors<BFloat16>{}, 0.0f);
    case Element::kFloat16:
      return body(Vectors<Float16>{}, 0.0f);
    default:
      return p.single ? body(Vectors<float>{}, 0.0f) : body(Vectors<float>{}, 0.0);
  }
}

template <class V, class M>
int64_t stretch_of(const AggregationProblem& p, const Stream& stream) {
  const int64_t vectors = vectors_of<V, M>(p.clients), step = vectors * V::kVector;
  const bool held = p.clients <= kThreads / vectors * held_clients<V, M>();
  const int64_t even = ceil_div(p.params, (held ? 8 : 2) * stream.multiprocessors);
  return ceil_div(larger(even, 2048), step) * step;
}

}  // namespace

int64_t aggregation_blocks(const AggregationProblem& p, const Stream& stream) {
  int64_t blocks = 0;
  with_kernel(p, [&](auto v, auto m) {
    blocks = larger(1, ceil_div(p.params, stretch_of<decltype(v), decltype(m)>(p, stream)));
  });
  return blocks;
}

void aggregate(const AggregationProblem& p, double* partial, const Stream& stream) {
  with_kernel(p, [&](auto v, auto m) {
    using V = decltype(v);
    using M = decltype(m);
    const Aggregation a{p, partial, stretch_of<V, M>(p, stream), vectors_of<V, M>(p.clients)};
    launch(aggregation<V, M>, {aggregation_blocks(p, stream)}, stream, a);
  });
}

}  // namespace fdcr::cuda
