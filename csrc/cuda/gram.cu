// Inner products of all pairs of clients, transformed as they are read.
//
// A thread block owns a tile of the Gram matrix, on the diagonal or below it, and some of the parameters. It
// forms products of short runs of these by matrix instructions and adds them in float64. In float32 every
// client's run is divided by a power of two first, so that no product leaves the range.
#include "elements.cuh"
#include "product.cuh"
#include "reduction.cuh"

namespace fdcr::cuda {
namespace {

// What the host knows travels with the launch: nothing is copied to the device, nothing waits.
constexpr int kRanges = 64;    // of one launch
constexpr int kSquare = 4096;  // clients on either side of what one launch computes
constexpr int kWord = 32;      // of them in a number of the mask
using Mask = uint32_t[kSquare / kWord];

struct InnerProducts {
  GramProblem problem;
  GramTransform transform;
  int64_t clients, first_row, first_column;
  int64_t starts[kRanges], stops[kRanges], runs_before[kRanges];  // a range has runs of kDepth parameters
  int64_t range_count, runs, per_split;
  Mask rows_read, columns_read;
  double* partial;
  bool vectors, no_scale;
};

template <class M>
__device__ __forceinline__ double transformed(const GramProblem& p, GramTransform kind, int64_t k, M x, M f) {
  if (kind == GramTransform::kUpdate) return x;
  if (kind == GramTransform::kFisherUpdate) return double(sqrt(f)) * double(x);
  if (kind == GramTransform::kFourthRootFisher) return sqrt(sqrt(f));
  const double low = read(p.fisher_min + k);
  return (f - low) / (read(p.fisher_max + k) - low) * x;
}

// Rounded down to a power of two; 1 of zero, and of what is not finite.
__device__ __forceinline__ double power_of_two(double x) {
  union {
    double value;
    uint64_t bits;
  } number = {x};
  number.bits &= 0x7ff0000000000000u;
  return x > 0 && x < INFINITY ? number.value : 1;
}

// kTile clients' run of parameters, divided by scale[row].
template <class V, class M>
__device__ __forceinline__ void load_rows(const InnerProducts& a, int64_t first, const Mask& is_read,
                                          int64_t start, int64_t stop, M* to, double* scale) {
  using P = Product<M>;
  constexpr int kVector = V::kVector, kLanes = P::kDepth / kVector;
  const GramProblem& p = a.problem;
  const int lane = threadIdx.x % kLanes;
  const int64_t v = start + lane * kVector, count = stop - v;
  const bool with_update = a.transform != GramTransform::kFourthRootFisher;
  const bool with_fisher = a.transform != GramTransform::kUpdate;
  const int64_t update_at = count > 0 ? place(p.updates, v) : 0;
  const int64_t fisher_at = count > 0 && with_fisher ? place(p.fishers, v) : 0;
#pragma unroll 2
  for (int row = threadIdx.x / kLanes; row < P::kTile; row += kThreads / kLanes) {
    const int64_t k = first + row;
    const int bit = static_cast<int>(k % kSquare);
    const bool known = k < a.clients && (is_read[bit / kWord] >> bit % kWord & 1) != 0;
    M x[kVector] = {}, f[kVector] = {};
    if (known && count > 0) {
      if (with_update) V::load(p.updates, k, update_at, x);
      if (with_fisher) V::load(p.fishers, k, fisher_at, f);
    }
    double entries[kVector], largest = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      entries[i] = known && i < count ? transformed(p, a.transform, k, x[i], f[i]) : 0;
      largest = combine(Reduction::kMax, largest, entries[i] < 0 ? -entries[i] : entries[i]);
    }
    double inverse = 1;
    if (sizeof(M) == 4) {
      const double unit = power_of_two(over_lanes(Reduction::kMax, largest, kLanes));
      inverse = 1 / unit;
      if (lane == 0) scale[row] = unit;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      to[row * P::kPitch + lane * kVector + i] = static_cast<M>(entries[i] * inverse);
  }
}

template <class V, class M>
__global__ void __launch_bounds__(kThreads, 2) inner_products(const __grid_constant__ InnerProducts a) {
  using P = Product<M>;
  __shared__ M rows[P::kSlice], columns[P::kSlice];
  __shared__ double row_scale[P::kTile], column_scale[P::kTile];
  const int64_t i0 = a.first_row + blockIdx.x * P::kTile, j0 = a.first_column + blockIdx.y * P::kTile;
  if (j0 > i0) return;
  double total[P::kRowTiles][P::kColumnTiles][P::kHeld] = {};
  const int64_t begin = blockIdx.z * a.per_split, end = smaller(begin + a.per_split, a.runs);
  int range = 0;
  for (int64_t run = begin; run < end; ++run) {
    while (range + 1 < a.range_count && a.runs_before[range + 1] <= run) ++range;
    const int64_t start = a.starts[range] + (run - a.runs_before[range]) * P::kDepth;
    const int64_t stop = smaller(start + P::kDepth, a.stops[range]);
    __syncthreads();
    load_rows<V, M>(a, i0, a.rows_read, start, stop, rows, row_scale);
    load_rows<V, M>(a, j0, a.columns_read, start, stop, columns, column_scale);
    __syncthreads();
    typename P::Held products = {};
    P::add(products, rows, columns, false);
#pragma unroll
    for (int i = 0; i < P::kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < P::kColumnTiles; ++j)
#pragma unroll
        for (int r = 0; r < P::kHeld; ++r) {
          const double unit = sizeof(M) == 4 ? row_scale[P::row(i, r)] * column_scale[P::column(j, r)] : 1;
          total[i][j][r] += products[i][j][r] * unit;
        }
  }
#pragma unroll
  for (int i = 0; i < P::kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < P::kColumnTiles; ++j)
#pragma unroll
      for (int r = 0; r < P::kHeld; ++r) {
        const int64_t row = i0 + P::row(i, r), column = j0 + P::column(j, r);
        if (row < a.clients && column <= row)
          write(a.partial + (blockIdx.z * a.clients + row) * a.clients + column, total[i][j][r]);
      }
}

struct Mirror {
  GramCall call;
  int64_t clients, splits, first_row, first_column;
  Mask rows_read, columns_read;
};

// Adds the partial results of a square of the matrix up, and writes them on both sides of the diagonal.
__global__ void __launch_bounds__(kThreads) mirror(const __grid_constant__ Mirror m) {
  const int64_t row = m.first_row + blockIdx.x, column = m.first_column + blockIdx.y * kThreads + threadIdx.x;
  if (column > row) return;
  const int i = static_cast<int>(row % kSquare), j = static_cast<int>(column % kSquare);
  const bool known = (m.rows_read[i / kWord] >> i % kWord & m.columns_read[j / kWord] >> j % kWord & 1) != 0;
  double sum = known ? read(m.call.before + row * m.call.before_stride[0] + column * m.call.before_stride[1])
                     : nan("");
  for (int64_t split = 0; split < m.splits && known; ++split)
    sum += read(m.call.partial + (split * m.clients + row) * m.clients + column);
  write(m.call.result + row * m.clients + column, sum);
  if (row != column) write(m.call.result + column * m.clients + row, sum);
}

void fill_mask(const bool* is_read, int64_t first, int64_t clients, Mask& mask) {
  for (uint32_t& word : mask) word = 0;
  for (int64_t k = first; k < smaller(first + kSquare, clients); ++k)
    mask[(k - first) / kWord] |= static_cast<uint32_t>(is_read[k]) << (k - first) % kWord;
}

bool aligned(const GramProblem& p, const InnerProducts& a, int64_t vector) {
  bool result = in_vectors(p.updates) && (a.transform == GramTransform::kUpdate || in_vectors(p.fishers));
  for (int64_t r = 0; r < a.range_count; ++r) result = result && a.starts[r] % vector == 0;
  return result;
}

template <class V, class M>
void launch_products(InnerProducts a, int64_t splits, const Stream& stream) {
  constexpr int64_t kTile = Product<M>::kTile;
  const auto tiles = [&](int64_t first) { return ceil_div(smaller(kSquare, a.clients - first), kTile); };
  a.runs = 0;
  for (int64_t r = 0; r < a.range_count; ++r) {
    a.runs_before[r] = a.runs;
    a.runs += ceil_div(a.stops[r] - a.starts[r], Product<M>::kDepth);
  }
  a.per_split = larger(1, ceil_div(a.runs, splits));
  launch(inner_products<V, M>, {tiles(a.first_row), tiles(a.first_column), splits}, stream, a);
}

}  // namespace

int64_t gram_splits(const GramProblem& p, int64_t clients, const Stream& stream) {
  const int64_t edge = ceil_div(clients, Product<float>::kTile);
  const int64_t wanted = ceil_div(2 * stream.multiprocessors, larger(1, edge * (edge + 1) / 2));
  return larger(1, smaller(wanted, ceil_div(p.params, Product<float>::kDepth)));
}

void gram(const GramProblem& p, int64_t clients, const GramCall& call, const Stream& stream) {
  const int64_t splits = gram_splits(p, clients, stream);
  InnerProducts a{};
  Mirror m{};
  a.problem = p;
  a.transform = call.transform;
  a.clients = m.clients = clients;
  a.partial = call.partial;
  m.call = call;
  m.splits = splits;
  int64_t done = 0;
  do {
    a.range_count = smaller(kRanges, call.range_count - done);
    for (int64_t r = 0; r < a.range_count; ++r) {
      a.starts[r] = call.ranges[done + r].start;
      a.stops[r] = call.ranges[done + r].stop;
    }
    for (int64_t i = 0; i < clients; i += kSquare)
      for (int64_t j = 0; j <= i; j += kSquare) {
        a.first_row = m.first_row = i;
        a.first_column = m.first_column = j;
        fill_mask(call.is_read, i, clients, a.rows_read);
        fill_mask(call.is_read, j, clients, a.columns_read);
        fill_mask(call.is_read, i, clients, m.rows_read);
        fill_mask(call.is_read, j, clients, m.columns_read);
        const Element element = p.updates.source.element;
        const bool same = a.transform == GramTransform::kUpdate || p.fishers.source.element == element;
        if (same && element == Element::kFloat64 && aligned(p, a, 2))
          launch_products<Vectors<double>, double>(a, splits, stream);
        else if (same && element == Element::kFloat32 && p.single && aligned(p, a, 4))
          launch_products<Vectors<float>, float>(a, splits, stream);
        else if (!p.single)
          launch_products<Singles, double>(a, splits, stream);
        else
          launch_products<Singles, float>(a, splits, stream);
        const int64_t rows = smaller(kSquare, clients - i), columns = smaller(kSquare, clients - j);
        launch(mirror, {rows, ceil_div(columns, kThreads)}, stream, m);
      }
    done += a.range_count;
    m.call.before = call.result;
    m.call.before_stride[0] = clients;
    m.call.before_stride[1] = 1;
  } while (done < call.range_count);
}

}  // namespace fdcr::cuda
