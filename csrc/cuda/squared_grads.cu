// Squared per-sample gradients of linear layers and convolutions; a linear layer is a convolution of its
// positions.
//
// A thread block owns a tile of the weight. For each of its samples it forms that tile of the sample's
// gradient by matrix products over the positions, squares it where it stands, in registers, and adds it.
// Windows of a convolution are gathered while they are loaded (implicit im2col). Nothing grows with samples
// times parameters.
//
// Where there is one position, (g x)^2 = g^2 x^2: the samples become the positions of one matrix product of
// squares.
#include "elements.cuh"
#include "product.cuh"

namespace fdcr::cuda {
namespace {

struct SquaredGrads {
  SquaredGradsProblem problem;
  int64_t columns;    // of the weight of a group: input channels times kernel
  int64_t positions;  // whose products are summed: of the output, or the samples if there is one
  int64_t per_split;  // samples of a thread block, or positions if these are the samples
  bool squares, padded, one_product;
};

// Where a position or a column of the weight is in the input, and for padding in each dimension.
struct Place {
  int64_t grad, input, at[kMaxDims];
  bool there;
};

__device__ __forceinline__ Place place_of_position(const SquaredGrads& s, int64_t position, int64_t stop) {
  const SquaredGradsProblem& p = s.problem;
  Place place{};
  place.there = position < stop;
  if (s.squares) {
    place.grad = position * p.grad_sample;
    place.input = position * p.in_sample;
    position = 0;
  }
#pragma unroll
  for (int d = kMaxDims - 1; d >= 0; --d) {
    const int64_t at = p.output[d] == 1 ? 0 : d > 0 ? position % p.output[d] : position;
    if (p.output[d] != 1 && d > 0) position /= p.output[d];
    place.at[d] = at * p.stride[d] - p.padding[d];
    place.grad += at * p.grad_position[d];
    place.input += place.at[d] * p.in_position[d];
  }
  return place;
}

__device__ __forceinline__ Place place_of_column(const SquaredGrads& s, int64_t group, int64_t column) {
  const SquaredGradsProblem& p = s.problem;
  Place place{};
  place.there = column < s.columns;
#pragma unroll
  for (int d = kMaxDims - 1; d >= 0; --d) {
    place.at[d] = column % p.kernel[d] * p.dilation[d];
    place.input += place.at[d] * p.in_position[d];
    column /= p.kernel[d];
  }
  place.input += (group * p.in_channels + column) * p.in_channel;
  return place;
}

__device__ __forceinline__ bool inside(const SquaredGrads& s, const Place& position, const Place& column) {
  bool result = position.there && column.there;
#pragma unroll
  for (int d = 0; d < kMaxDims && s.padded; ++d) {
    const int64_t at = position.at[d] + column.at[d];
    result = result && 0 <= at && at < s.problem.input[d];
  }
  return result;
}

// Row and depth of the i-th number that threads load next to each other: along what lies together in memory.
template <int kDepth>
__device__ __forceinline__ void spread(int i, bool by_rows, int& row, int& depth) {
  row = by_rows ? i % 8 + i / (8 * kDepth) * 8 : i / kDepth;
  depth = by_rows ? i / 8 % kDepth : i % kDepth;
}

template <class L, class M>
__global__ void __launch_bounds__(kThreads, 2) squared_grads_tile(const __grid_constant__ SquaredGrads s) {
  using P = Product<M>;
  __shared__ M g[P::kSlice], x[P::kSlice];
  __shared__ Place columns[P::kTile], positions[P::kDepth];
  const SquaredGradsProblem& p = s.problem;
  const int64_t column_tiles = larger(1, ceil_div(s.columns, P::kTile)),
                out_tiles = ceil_div(p.out_channels, P::kTile);
  const int64_t j0 = blockIdx.x % column_tiles * P::kTile,
                o0 = blockIdx.x / column_tiles % out_tiles * P::kTile;
  const int64_t group = blockIdx.x / column_tiles / out_tiles, begin = blockIdx.y * s.per_split;
  const int64_t end = smaller(begin + s.per_split, s.squares ? s.positions : p.samples);
  const int64_t first_position = s.squares ? begin : 0, last_position = s.squares ? end : s.positions;
  const bool biased = j0 == 0 && threadIdx.x < P::kTile;
  const bool useful =
      o0 + P::row(0, 0) - threadIdx.x % 32 / 4 < p.out_channels && j0 + threadIdx.x / 32 % 2 * 32 < s.columns;

  for (int j = threadIdx.x; j < P::kTile; j += kThreads) columns[j] = place_of_column(s, group, j0 + j);
  typename P::Held total = {};
  M bias = 0;
  for (int64_t n = s.squares ? end - 1 : begin; n < end; ++n) {
    const int64_t grad_at =
        (s.squares ? 0 : n * p.grad_sample) + (group * p.out_channels + o0) * p.grad_channel;
    const int64_t input_at = s.squares ? 0 : n * p.in_sample;
    typename P::Held of_sample = {};
    M bias_of_sample = 0;
    for (int64_t start = first_position; start < last_position; start += P::kDepth) {
      __syncthreads();
      if (threadIdx.x < P::kDepth)
        positions[threadIdx.x] = place_of_position(s, start + threadIdx.x, last_position);
      __syncthreads();
#pragma unroll 4
      for (int i = threadIdx.x; i < P::kTile * P::kDepth; i += kThreads) {
        int o, t;
        spread<P::kDepth>(i, p.grad_channel == 1, o, t);
        const bool there = positions[t].there && o0 + o < p.out_channels;
        const M value =
            there ? L::template load<M>(p.grad, grad_at + o * p.grad_channel + positions[t].grad) : M(0);
        g[o * P::kPitch + t] = s.squares ? value * value : value;
      }
#pragma unroll 4
      for (int i = threadIdx.x; i < P::kTile * P::kDepth; i += kThreads) {
        int j, t;
        spread<P::kDepth>(i, p.in_channel == 1, j, t);
        const bool there = inside(s, positions[t], columns[j]);
        const M value =
            there ? L::template load<M>(p.in, input_at + positions[t].input + columns[j].input) : M(0);
        x[j * P::kPitch + t] = s.squares ? value * value : value;
      }
      __syncthreads();
      for (int t = 0; t < P::kDepth && biased; ++t) bias_of_sample += g[threadIdx.x * P::kPitch + t];
      if (useful) P::add(of_sample, g, x, s.one_product);
    }
    bias += s.squares ? bias_of_sample : bias_of_sample * bias_of_sample;
#pragma unroll
    for (int i = 0; i < P::kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < P::kColumnTiles; ++j)
#pragma unroll
        for (int r = 0; r < P::kHeld; ++r)
          total[i][j][r] += s.squares ? of_sample[i][j][r] : of_sample[i][j][r] * of_sample[i][j][r];
  }

  const int64_t out = (blockIdx.y * p.groups + group) * p.out_channels;
#pragma unroll
  for (int i = 0; i < P::kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < P::kColumnTiles; ++j)
#pragma unroll
      for (int r = 0; r < P::kHeld; ++r) {
        const int64_t o = o0 + P::row(i, r), column = j0 + P::column(j, r);
        if (o < p.out_channels && column < s.columns)
          write(static_cast<M*>(p.weight) + (out + o) * s.columns + column, total[i][j][r]);
      }
  if (biased && o0 + threadIdx.x < p.out_channels)
    write(static_cast<M*>(p.bias) + out + o0 + threadIdx.x, bias);
}

SquaredGrads launch_of(const SquaredGradsProblem& p, const Stream& stream, Grid& grid) {
  SquaredGrads s{p, p.in_channels, 1, 1, false, false, false};
  for (int d = 0; d < kMaxDims; ++d) {
    s.columns *= p.kernel[d];
    s.positions *= p.output[d];
    s.padded = s.padded || p.padding[d] > 0;
  }
  s.squares = s.positions == 1;
  if (s.squares) s.positions = p.samples;
  const bool wide = p.grad.element == Element::kFloat64 || p.in.element == Element::kFloat64;
  const int64_t depth = wide ? Product<double>::kDepth : Product<float>::kDepth, tile = Product<float>::kTile;
  grid.x = p.groups * ceil_div(p.out_channels, tile) * larger(1, ceil_div(s.columns, tile));
  const int64_t size = s.squares ? ceil_div(p.samples, depth) : p.samples;
  const int64_t wanted = smaller(256, ceil_div(2 * stream.multiprocessors, larger(1, grid.x)));
  const int64_t each = ceil_div(size, larger(1, smaller(size, wanted)));
  grid.y = larger(1, ceil_div(size, larger(1, each)));
  s.per_split = s.squares ? each * depth : each;
  return s;
}

}  // namespace

int64_t squared_grads_splits(const SquaredGradsProblem& p, const Stream& stream) {
  Grid grid;
  launch_of(p, stream, grid);
  return grid.y;
}

void squared_grads(const SquaredGradsProblem& p, bool one_product, const Stream& stream) {
  Grid grid;
  SquaredGrads s = launch_of(p, stream, grid);
  // Numbers of 16 bits are numbers of TF32; their squares are not.
  s.one_product = one_product || (!s.squares && size_of(p.grad.element) == 2 && size_of(p.in.element) == 2);
  const auto go = [&](auto* kernel) { launch(kernel, grid, stream, s); };
  if (p.grad.element != p.in.element) {
    const bool wide = p.grad.element == Element::kFloat64 || p.in.element == Element::kFloat64;
    return wide ? go(squared_grads_tile<Any, double>) : go(squared_grads_tile<Any, float>);
  }
  switch (p.in.element) {
    case Element::kFloat64:
      return go(squared_grads_tile<Typed<double>, double>);
    case Element::kBFloat16:
      return go(squared_grads_tile<Typed<BFloat16>, float>);
    case Element::kFloat16:
      return go(squared_grads_tile<Typed<Float16>, float>);
    default:
      return go(squared_grads_tile<Typed<float>, float>);
  }
}

}  // namespace fdcr::cuda
