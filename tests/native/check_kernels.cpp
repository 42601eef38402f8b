// Runs the CPU kernels on random problems, with threads of its own and buffers that are exactly as large as
// they must be, and compares them with naive float64 loops. Meant for ThreadSanitizer: it needs neither
// Python nor PyTorch.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

namespace {

int threads = 3;

void pool(int64_t n, fdcr::RangeBody body, void* context) {
  std::vector<std::thread> workers;
  for (int64_t i = 0; i < threads; ++i)
    workers.emplace_back([=] { body(context, i * n / threads, (i + 1) * n / threads); });
  for (std::thread& worker : workers) worker.join();
}

std::mt19937_64 generator(0);

int64_t draw(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

template <class T>
std::vector<T> numbers(int64_t n) {
  std::vector<T> x(static_cast<size_t>(n));
  std::normal_distribution<double> normal;
  for (T& value : x) value = static_cast<T>(normal(generator));
  return x;
}

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

template <class T, class U>
void require_close(const std::vector<T>& got, const std::vector<U>& expected, double tolerance,
                   const char* what) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += std::pow(static_cast<double>(got[i]) - static_cast<double>(expected[i]), 2);
    norm += std::pow(static_cast<double>(expected[i]), 2);
  }
  if (std::sqrt(error) > tolerance * std::sqrt(norm) + 1e-300)
    std::fprintf(stderr, "relative error %g of %g\n", std::sqrt(error / norm), std::sqrt(norm));
  require(std::sqrt(error) <= tolerance * std::sqrt(norm) + 1e-300, what);
}

template <class T>
fdcr::Source source(const std::vector<T>& x) {
  return {x.data(), sizeof(T) == 4 ? fdcr::Element::kFloat32 : fdcr::Element::kFloat64};
}

// Contiguous [n, channels, size...], or with the channels last.
void strides(bool last, int64_t channels, const int64_t* size, int64_t* sample, int64_t* channel,
             int64_t* position) {
  const int64_t inner = last ? channels : 1;
  position[2] = inner;
  position[1] = inner * size[2];
  position[0] = inner * size[2] * size[1];
  *channel = last ? 1 : size[0] * size[1] * size[2];
  *sample = channels * size[0] * size[1] * size[2];
}

template <class T>
void check_squared_grads(const fdcr::Kernels& kernels, bool large) {
  fdcr::SquaredGradsProblem p;
  const bool one_position = !large && draw(0, 5) == 0;
  p.samples = one_position ? draw(1, 600) : draw(1, 5);
  p.groups = large || one_position ? 1 : draw(1, 3);
  p.out_channels = large ? draw(60, 140) : draw(1, 20);
  p.in_channels = large ? draw(90, 110) : draw(1, 7);
  const bool last = draw(0, 1) == 1;
  for (int d = one_position ? fdcr::kMaxDims : static_cast<int>(draw(0, 2)); d < fdcr::kMaxDims; ++d) {
    p.kernel[d] = draw(1, 3);
    p.stride[d] = draw(1, 2);
    p.padding[d] = draw(0, 2);
    p.dilation[d] = draw(1, 2);
    const int64_t reach = p.dilation[d] * (p.kernel[d] - 1) + 1;
    p.input[d] = std::max<int64_t>(1, reach - 2 * p.padding[d]) + draw(0, 6);
    p.output[d] = (p.input[d] + 2 * p.padding[d] - reach) / p.stride[d] + 1;
  }
  const int64_t O = p.groups * p.out_channels, C = p.groups * p.in_channels;
  const int64_t positions = p.output[0] * p.output[1] * p.output[2];
  const int64_t volume = p.kernel[0] * p.kernel[1] * p.kernel[2];
  strides(last, O, p.output, &p.grad_sample, &p.grad_channel, p.grad_position);
  strides(last, C, p.input, &p.in_sample, &p.in_channel, p.in_position);
  const std::vector<T> grad = numbers<T>(p.samples * O * positions);
  const std::vector<T> in = numbers<T>(p.samples * C * p.input[0] * p.input[1] * p.input[2]);
  p.grad = source(grad);
  p.in = source(in);
  const T unset = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> weight(static_cast<size_t>(O * p.in_channels * volume), unset);
  std::vector<T> bias(static_cast<size_t>(O), unset);
  p.weight = weight.data();
  p.bias = bias.data();
  kernels.squared_grads(p, pool);

  std::vector<double> expected_weight(weight.size()), expected_bias(bias.size());
  for (int64_t n = 0; n < p.samples; ++n)
    for (int64_t o = 0; o < O; ++o) {
      std::vector<double> w(static_cast<size_t>(p.in_channels * volume));
      double b = 0;
      for (int64_t s = 0; s < positions; ++s) {
        const int64_t at[3] = {s / (p.output[1] * p.output[2]), s / p.output[2] % p.output[1],
                               s % p.output[2]};
        int64_t g_index = n * p.grad_sample + o * p.grad_channel;
        for (int d = 0; d < 3; ++d) g_index += at[d] * p.grad_position[d];
        const double g = static_cast<double>(grad[static_cast<size_t>(g_index)]);
        b += g;
        for (int64_t column = 0; column < p.in_channels * volume; ++column) {
          int64_t rest = column % volume;
          const int64_t k[3] = {rest / (p.kernel[1] * p.kernel[2]), rest / p.kernel[2] % p.kernel[1],
                                rest % p.kernel[2]};
          const int64_t channel = o / p.out_channels * p.in_channels + column / volume;
          int64_t index = n * p.in_sample + channel * p.in_channel;
          bool inside = true;
          for (int d = 0; d < 3; ++d) {
            const int64_t x = at[d] * p.stride[d] + k[d] * p.dilation[d] - p.padding[d];
            inside = inside && x >= 0 && x < p.input[d];
            index += x * p.in_position[d];
          }
          if (inside)
            w[static_cast<size_t>(column)] += g * static_cast<double>(in[static_cast<size_t>(index)]);
        }
      }
      for (size_t i = 0; i < w.size(); ++i)
        expected_weight[static_cast<size_t>(o * p.in_channels * volume) + i] += w[i] * w[i];
      expected_bias[static_cast<size_t>(o)] += b * b;
    }
  const double tolerance = sizeof(T) == 4 ? 1e-5 : 1e-13;
  require_close(weight, expected_weight, tolerance, "squared weight gradients");
  require_close(bias, expected_bias, tolerance, "squared bias gradients");
}

template <class T>
void check_norm_grads(const fdcr::Kernels& kernels) {
  fdcr::SquaredNormGradsProblem p;
  p.samples = draw(0, 5);
  p.positions = draw(1, 3);
  p.groups = draw(1, 3);
  p.channels = draw(1, 40);
  p.pixels = draw(draw(0, 1) == 1 ? 1 : 5, 40);
  if (p.channels * p.pixels < 8) p.channels += 8;  // few elements that share statistics are ill conditioned
  const int64_t C = p.groups * p.channels, volume = p.positions * C * p.pixels;
  const bool last = draw(0, 1) == 1;
  p.grad_stride = {volume, C * p.pixels, p.channels * p.pixels, last ? 1 : p.pixels, last ? p.channels : 1};
  p.in_stride = p.grad_stride;
  const std::vector<T> grad = numbers<T>(p.samples * volume), in = numbers<T>(p.samples * volume);
  const std::vector<T> mean = numbers<T>(C), root = numbers<T>(C);
  std::vector<T> variance;
  for (const T r : root) variance.push_back(r * r);
  const bool given_mean = draw(0, 1) == 1, given_variance = draw(0, 1) == 1;
  p.grad = source(grad);
  p.in = source(in);
  if (given_mean) p.mean = source(mean);
  if (given_variance) p.variance = source(variance);
  p.mean_stride[0] = p.variance_stride[0] = p.channels;
  p.mean_stride[1] = p.variance_stride[1] = 1;
  p.eps = 1e-3;
  std::vector<T> weight(static_cast<size_t>(C)), bias(static_cast<size_t>(C));
  p.weight = weight.data();
  p.bias = bias.data();
  kernels.squared_norm_grads(p, pool);

  std::vector<double> expected_weight(weight.size()), expected_bias(bias.size());
  for (int64_t n = 0; n < p.samples; ++n) {
    std::vector<double> w(weight.size()), b(weight.size());
    for (int64_t t = 0; t < p.positions; ++t)
      for (int64_t g = 0; g < p.groups; ++g) {
        const auto index = [&](int64_t c, int64_t i) {
          const fdcr::NormStrides& s = p.in_stride;
          return static_cast<size_t>(n * s.sample + t * s.position + g * s.group + c * s.channel +
                                     i * s.pixel);
        };
        const double count = static_cast<double>(p.channels * p.pixels);
        double m = 0, v = 0;
        const auto center = [&](int64_t c) {
          return given_mean ? static_cast<double>(mean[static_cast<size_t>(g * p.channels + c)]) : m;
        };
        double sum = 0;
        for (int64_t c = 0; c < p.channels; ++c)
          for (int64_t i = 0; i < p.pixels; ++i) sum += static_cast<double>(in[index(c, i)]);
        m = sum / count;
        for (int64_t c = 0; c < p.channels; ++c)
          for (int64_t i = 0; i < p.pixels; ++i)
            v += std::pow(static_cast<double>(in[index(c, i)]) - center(c), 2) / count;
        for (int64_t c = 0; c < p.channels; ++c) {
          const size_t channel = static_cast<size_t>(g * p.channels + c);
          const double scale =
              1 / std::sqrt((given_variance ? static_cast<double>(variance[channel]) : v) + p.eps);
          for (int64_t i = 0; i < p.pixels; ++i) {
            const double at = static_cast<double>(grad[index(c, i)]);
            w[channel] += at * (static_cast<double>(in[index(c, i)]) - center(c)) * scale;
            b[channel] += at;
          }
        }
      }
    for (size_t c = 0; c < w.size(); ++c) {
      expected_weight[c] += w[c] * w[c];
      expected_bias[c] += b[c] * b[c];
    }
  }
  const double tolerance = sizeof(T) == 4 ? 1e-5 : 1e-12;
  require_close(weight, expected_weight, tolerance, "squared scale gradients");
  require_close(bias, expected_bias, tolerance, "squared shift gradients");
}

template <class T>
void check_embedding_grads(const fdcr::Kernels& kernels) {
  fdcr::SquaredEmbeddingGradsProblem p;
  p.samples = draw(0, 5);
  p.tokens = draw(1, 9);
  p.rows = draw(1, 6);
  p.columns = draw(1, 300);
  p.grad_sample = p.tokens * p.columns;
  p.grad_token = p.columns;
  p.grad_column = 1;
  const std::vector<T> grad = numbers<T>(p.samples * p.grad_sample);
  std::vector<int64_t> indices;
  for (int64_t i = 0; i < p.samples * p.tokens; ++i) indices.push_back(draw(-1, p.rows - 1));
  p.grad = source(grad);
  p.indices = indices.data();
  std::vector<T> result(static_cast<size_t>(p.rows * p.columns));
  p.result = result.data();
  kernels.squared_embedding_grads(p, pool);

  std::vector<double> expected(result.size());
  for (int64_t n = 0; n < p.samples; ++n) {
    std::vector<double> table(result.size());
    for (int64_t t = 0; t < p.tokens; ++t) {
      const int64_t row = indices[static_cast<size_t>(n * p.tokens + t)];
      for (int64_t c = 0; row >= 0 && c < p.columns; ++c)
        table[static_cast<size_t>(row * p.columns + c)] +=
            static_cast<double>(grad[static_cast<size_t>(n * p.grad_sample + t * p.grad_token + c)]);
    }
    for (size_t i = 0; i < table.size(); ++i) expected[i] += table[i] * table[i];
  }
  require_close(result, expected, sizeof(T) == 4 ? 1e-5 : 1e-13, "squared embedding gradients");
}

template <class T>
void check_aggregation(const fdcr::Kernels& kernels) {
  const int64_t K = draw(1, 9), P = draw(1, 9000), L = draw(1, 3) * P / 2 + 1, tiles = (P + L - 1) / L;
  std::vector<T> updates = numbers<T>(tiles * K * L), fishers = numbers<T>(tiles * K * L);
  for (T& f : fishers) f = f * f;
  fdcr::AggregationProblem p;
  p.clients = K;
  p.params = P;
  p.updates = {source(updates), L, K * L, L, 1};
  p.fishers = {source(fishers), L, K * L, L, 1};
  p.single = sizeof(T) == 4 && draw(0, 1) == 1;
  const size_t k = static_cast<size_t>(K);
  std::vector<double> low(k), high(k), norm(k), score(k), weights(k, 1.0 / static_cast<double>(K));
  kernels.range(p.fishers, K, P, low.data(), high.data(), pool);
  kernels.squared_norm(p.updates, K, P, norm.data(), pool);
  if (K > 2) weights[1] = 0;
  p.weights = weights.data();
  const bool reweighted = P > 1 && draw(0, 1) == 1, rescaled = P > 1 && draw(0, 1) == 1;
  if (reweighted || rescaled) {
    p.fisher_min = low.data();
    p.fisher_max = high.data();
  } else {
    p.fishers = {};
  }
  std::vector<double> row_norm(k);
  double mean_square = 0;
  p.alpha = weights.data();
  p.reweight = reweighted;
  p.distance = score.data();
  p.norm = row_norm.data();
  p.mean_square = &mean_square;
  p.weights = draw(0, 1) == 1 ? weights.data() : nullptr;
  p.rescale = rescaled;
  const std::vector<T> global = numbers<T>(P);
  std::vector<T> result(static_cast<size_t>(P));
  p.to = {source(global), 1, std::numeric_limits<T>::max(), result.data()};
  kernels.aggregate(p, pool);
  if (p.weights == nullptr) {
    p.alpha = nullptr;
    p.norm = nullptr;
    p.weights = weights.data();
    kernels.aggregate(p, pool);
  }

  std::vector<double> e_low(k, INFINITY), e_high(k, -INFINITY), e_norm(k), e_score(k), e_result;
  const auto at = [&](int64_t client, int64_t v) {
    return static_cast<size_t>((v / L * K + client) * L + v % L);
  };
  for (int64_t v = 0; v < P; ++v)
    for (int64_t c = 0; c < K; ++c) {
      const size_t i = static_cast<size_t>(c);
      const double f = static_cast<double>(fishers[at(c, v)]), d = static_cast<double>(updates[at(c, v)]);
      e_low[i] = std::min(e_low[i], f);
      e_high[i] = std::max(e_high[i], f);
      e_norm[i] += d * d;
    }
  for (int64_t v = 0; v < P; ++v) {
    double mean = 0, sum = static_cast<double>(global[static_cast<size_t>(v)]);
    std::vector<double> u(k);
    for (int64_t c = 0; c < K; ++c) {
      const size_t i = static_cast<size_t>(c);
      const double d = static_cast<double>(updates[at(c, v)]);
      const double importance = (static_cast<double>(fishers[at(c, v)]) - e_low[i]) / (e_high[i] - e_low[i]);
      u[i] = reweighted ? importance * d : d;
      mean += weights[i] * u[i];
      sum += weights[i] * d * (rescaled ? 2 / (1 + std::exp(-importance)) : 1.0);
    }
    for (size_t i = 0; i < k; ++i) e_score[i] += (mean - u[i]) * (mean - u[i]);
    e_result.push_back(sum);
  }
  if (K > 2) {
    require(score[1] == 0 && row_norm[1] == 0, "the scores of a client that is not read");
    e_score[1] = row_norm[1] = 0;
  }
  require(low == e_low && high == e_high, "range");
  require_close(norm, e_norm, 1e-12, "squared norm");
  if (K > 2) e_norm[1] = 0;
  require_close(row_norm, e_norm, p.single ? 1e-6 : 1e-12, "squared norm beside scores");
  require_close(score, e_score, p.single ? 1e-6 : 1e-12, "discrepancy");
  require_close(result, e_result, sizeof(T) == 4 ? 1e-6 : 1e-13, "rescaled mean");
}

template <class T>
void check_moments(const fdcr::Kernels& kernels) {
  const int64_t K = draw(1, 9), P = draw(1, 9000), L = draw(0, 1) == 0 ? 32 : draw(1, 3) * P / 2 + 1,
                tiles = (P + L - 1) / L;
  const std::vector<T> values = numbers<T>(tiles * K * L);
  const std::vector<double> factors = numbers<double>(P);
  const int64_t start = draw(0, P), stop = draw(start, P);
  const fdcr::ParamRange ranges[] = {{0, start / 2}, {start, stop}, {0, P}};
  const bool weighted = draw(0, 1) == 1, squares = draw(0, 1) == 1;
  const fdcr::Source given{factors.data(), fdcr::Element::kFloat64}, ones{};
  const fdcr::MomentsView views[] = {{weighted ? given : ones, 1, squares, ranges, 2},
                                     {weighted ? ones : given, 1, !squares, ranges + 2, 1}};
  fdcr::MomentsProblem p;
  p.params = P;
  p.values = {source(values), L, K * L, L, 1};
  std::vector<int64_t> rows;
  for (int64_t k = 0; k < K; ++k)
    if (k == 0 || draw(0, 4) != 0) rows.push_back(k);
  p.rows = rows.data();
  p.row_count = static_cast<int64_t>(rows.size());
  p.views = views;
  p.view_count = 2;
  const size_t n = rows.size();
  std::vector<double> total(4 * n, 0.5), expected(4 * n, 0.5), sizes(2 * n, 1.0);
  kernels.moments(p, total.data(), pool);
  for (size_t m = 0; m < 2; ++m)
    for (size_t i = 0; i < n; ++i)
      for (int64_t v = 0; v < P; ++v) {
        if (m == 0 && !(v < start / 2 || (start <= v && v < stop))) continue;
        double x = static_cast<double>(values[static_cast<size_t>((v / L * K + rows[i]) * L + v % L)]);
        if (views[m].squares) x *= x;
        if (views[m].factors.data != nullptr) x *= factors[static_cast<size_t>(v)];
        expected[2 * m * n + i] += x;
        expected[(2 * m + 1) * n + i] += x * x;
        sizes[m * n + i] += std::abs(x);
      }
  for (size_t m = 0; m < 2; ++m)
    for (size_t i = 0; i < n; ++i) {
      const size_t first = 2 * m * n + i, second = first + n;
      require(std::abs(total[first] - expected[first]) <= 1e-12 * sizes[m * n + i], "sums of moments");
      require(std::abs(total[second] - expected[second]) <= 1e-12 * expected[second],
              "sums of squares of moments");
    }
}

template <class T>
void check_central_mean(const fdcr::Kernels& kernels) {
  const int64_t K = draw(0, 9) == 0 ? draw(60, 140) : draw(1, 20), P = draw(1, 300),
                L = draw(1, 3) * P / 2 + 1, tiles = (P + L - 1) / L;
  const std::vector<T> updates = numbers<T>(tiles * K * L), global = numbers<T>(P);
  fdcr::CentralMeanProblem p;
  p.params = P;
  p.updates = {source(updates), L, K * L, L, 1};
  std::vector<int64_t> rows;
  for (int64_t k = 0; k < K; ++k)
    if (K == 1 || k == 0 || draw(0, 4) != 0) rows.push_back(k);
  const int64_t n = p.row_count = static_cast<int64_t>(rows.size());
  p.rows = rows.data();
  p.nearest = draw(0, 1) == 1;
  p.keep = p.nearest ? draw(1, n) : n - 2 * draw(0, (n - 1) / 2);
  std::vector<T> result(static_cast<size_t>(P));
  p.to = {source(global), 1, std::numeric_limits<T>::max(), result.data()};
  kernels.central_mean(p, pool);

  std::vector<double> expected;
  for (int64_t v = 0; v < P; ++v) {
    std::vector<double> x;
    for (const int64_t k : rows)
      x.push_back(static_cast<double>(updates[static_cast<size_t>((v / L * K + k) * L + v % L)]));
    std::sort(x.begin(), x.end());
    size_t first = static_cast<size_t>(n - p.keep) / 2;
    const size_t keep = static_cast<size_t>(p.keep), size = x.size();
    if (p.nearest) {
      const double twice = x[(size - 1) / 2] + x[size / 2];
      for (first = 0; first + keep < size && twice > x[first] + x[first + keep];) ++first;
    }
    double sum = 0;
    for (size_t i = first; i < first + keep; ++i) sum += x[i];
    expected.push_back(static_cast<double>(global[static_cast<size_t>(v)]) + sum / static_cast<double>(keep));
  }
  require_close(result, expected, sizeof(T) == 4 ? 1e-6 : 1e-13, "central mean");
}

template <class T>
void check_fill_row(const fdcr::Kernels& kernels) {
  const int64_t P = draw(1, draw(0, 4) == 0 ? 60000 : 5000), L = draw(1, 3) * P / 2 + 1,
                tiles = (P + L - 1) / L, gap = draw(0, 9);
  std::vector<std::vector<T>> pieces;
  std::vector<fdcr::VectorSegment> segments;
  std::vector<T> expected;
  for (int64_t first = 0; first < P;) {
    const int64_t size = draw(1, P - first), stride = draw(1, 2);
    pieces.push_back(numbers<T>((size - 1) * stride + 1));
    segments.push_back({source(pieces.back()), first, size, stride});
    for (int64_t i = 0; i < size; ++i) expected.push_back(pieces.back()[static_cast<size_t>(i * stride)]);
    first += size;
  }
  const T padding = static_cast<T>(-77);
  std::vector<T> row(static_cast<size_t>(tiles * (L + gap) - gap), padding);
  fdcr::FillRowsProblem p;
  p.vectors.segments = segments.data();
  p.vectors.count = static_cast<int64_t>(segments.size());
  p.params = P;
  p.data = row.data();
  p.element = source(row).element;
  p.tile_length = L;
  p.tile_stride = L + gap;
  p.stride = 1;
  fdcr::RowStatistics statistics{1, INFINITY, -INFINITY};
  kernels.fill_rows(p, &statistics, pool);

  double norm = 1, low = INFINITY, high = -INFINITY;
  for (int64_t v = 0; v < P; ++v) {
    const double x = static_cast<double>(expected[static_cast<size_t>(v)]);
    norm += x * x;
    low = std::min(low, x);
    high = std::max(high, x);
    T& kept = row[static_cast<size_t>(v / L * (L + gap) + v % L)];
    require(static_cast<double>(kept) == x, "copied row");
    kept = padding;
  }
  for (const T x : row) require(x == padding, "padding of a row");
  require(statistics.low == low && statistics.high == high, "range of a row");
  require(std::abs(statistics.squared_norm - norm) <= 1e-12 * norm, "squared norm of a row");

  std::vector<uint16_t> narrow(static_cast<size_t>(tiles * (L + gap) - gap));
  p.data = narrow.data();
  for (const fdcr::Element element : {fdcr::Element::kBFloat16, fdcr::Element::kFloat16}) {
    p.element = element;
    kernels.fill_rows(p, &statistics, pool);
    require(std::isfinite(statistics.squared_norm), "statistics of a narrow row");
  }
}

template <class T>
void check_gram(const fdcr::Kernels& kernels, bool large) {
  const int64_t K = large ? draw(257, 300) : draw(1, 20), P = draw(1, large ? 60 : 5000);
  const int64_t L = draw(1, 3) * P / 2 + 1, tiles = (P + L - 1) / L;
  std::vector<T> updates = numbers<T>(tiles * K * L), fishers = numbers<T>(tiles * K * L);
  for (T& f : fishers) f = f * f;
  if (draw(0, 3) == 0)
    for (T& u : updates) u *= T(1e30);  // beyond float32 when multiplied
  fdcr::GramProblem p;
  p.params = P;
  p.updates = {source(updates), L, K * L, L, 1};
  p.fishers = {source(fishers), L, K * L, L, 1};
  const std::vector<double> low(static_cast<size_t>(K), -1.0), high(static_cast<size_t>(K), 3.0);
  p.fisher_min = low.data();
  p.fisher_max = high.data();
  std::vector<int64_t> rows;
  for (int64_t k = 0; k < K; ++k)
    if (K == 1 || draw(0, 4) != 0) rows.push_back(k);
  p.rows = rows.data();
  p.row_count = static_cast<int64_t>(rows.size());
  p.single = sizeof(T) == 4 && draw(0, 1) == 1;
  const std::vector<fdcr::ParamRange> all{{0, P}}, some{{P / 5, P / 5}, {P / 4, P / 3}, {P / 3, P / 2 + 1}};
  using Transform = fdcr::GramTransform;
  std::vector<fdcr::GramView> views;
  for (const Transform transform : {Transform::kUpdate, Transform::kFisherUpdate,
                                    Transform::kReweightedUpdate, Transform::kFourthRootFisher}) {
    const std::vector<fdcr::ParamRange>& ranges = draw(0, 1) == 1 ? all : some;
    views.push_back({transform, ranges.data(), static_cast<int64_t>(ranges.size())});
  }
  p.views = views.data();
  p.view_count = static_cast<int64_t>(views.size());
  const size_t n = rows.size();
  std::vector<double> total(views.size() * n * n, 1.0), expected = total;
  kernels.gram(p, total.data(), pool);

  for (size_t view = 0; view < views.size(); ++view)
    for (int64_t r = 0; r < views[view].count; ++r)
      for (int64_t v = views[view].ranges[r].start; v < views[view].ranges[r].stop; ++v) {
        std::vector<double> x;
        for (const int64_t k : rows) {
          const size_t i = static_cast<size_t>((v / L * K + k) * L + v % L);
          const double u = static_cast<double>(updates[i]), f = static_cast<double>(fishers[i]);
          const double entry[] = {u, std::sqrt(f) * u, (f + 1) / 4 * u, std::sqrt(std::sqrt(f))};
          x.push_back(entry[view]);
        }
        for (size_t i = 0; i < n; ++i)
          for (size_t j = i; j < n; ++j) expected[(view * n + i) * n + j] += x[i] * x[j];
      }
  require_close(total, expected, p.single ? 1e-5 : 1e-12, "inner products");
}

// The logits of one image, and the gradient of its cross-entropy, in float64.
std::vector<double> naive_network(const std::vector<fdcr::NetworkLayer>& layers,
                                  const std::vector<float>& params, std::vector<double> x, int64_t label,
                                  std::vector<double>* grad) {
  struct Trace {
    std::vector<double> in, out;
    std::vector<size_t> winner;  // the pixel of the convolution that became this one
    int64_t size[2], result[2];
  };
  const auto each_tap = [](const fdcr::NetworkLayer& l, int64_t y, int64_t column, const auto& body) {
    for (int64_t c = 0; c < l.in_channels; ++c)
      for (int64_t i = 0; i < l.kernel[0]; ++i)
        for (int64_t j = 0; j < l.kernel[1]; ++j) {
          const int64_t at[] = {y + i - l.padding[0], column + j - l.padding[1]};
          if (at[0] >= 0 && at[0] < l.input[0] && at[1] >= 0 && at[1] < l.input[1])
            body(static_cast<size_t>((c * l.kernel[0] + i) * l.kernel[1] + j),
                 static_cast<size_t>((c * l.input[0] + at[0]) * l.input[1] + at[1]));
        }
  };
  const auto weight = [](const fdcr::NetworkLayer& l, int64_t o) {
    return static_cast<size_t>(l.weight + o * l.in_channels * l.kernel[0] * l.kernel[1]);
  };
  std::vector<Trace> traces;
  for (const fdcr::NetworkLayer& l : layers) {
    Trace t;
    for (int d = 0; d < 2; ++d) {
      t.size[d] = l.input[d] + 2 * l.padding[d] - l.kernel[d] + 1;
      t.result[d] = l.pool ? t.size[d] / 2 : t.size[d];
    }
    std::vector<double> pixels;
    for (int64_t o = 0; o < l.out_channels; ++o)
      for (int64_t y = 0; y < t.size[0]; ++y)
        for (int64_t column = 0; column < t.size[1]; ++column) {
          double sum = l.bias < 0 ? 0.0 : static_cast<double>(params[static_cast<size_t>(l.bias + o)]);
          each_tap(l, y, column, [&](size_t w, size_t in) {
            sum += static_cast<double>(params[weight(l, o) + w]) * x[in];
          });
          pixels.push_back(sum);
        }
    for (int64_t o = 0; o < l.out_channels; ++o)
      for (int64_t y = 0; y < t.result[0]; ++y)
        for (int64_t column = 0; column < t.result[1]; ++column) {
          const int64_t scale = l.pool ? 2 : 1;
          size_t best = static_cast<size_t>((o * t.size[0] + scale * y) * t.size[1] + scale * column);
          const size_t first = best, row = static_cast<size_t>(t.size[1]);
          for (const size_t other : {first + 1, first + row, first + row + 1})
            if (l.pool && pixels[other] > pixels[best]) best = other;
          t.winner.push_back(best);
          t.out.push_back(l.relu ? std::max(pixels[best], 0.0) : pixels[best]);
        }
    t.in = x;
    x = t.out;
    traces.push_back(t);
  }
  double sum = 0;
  for (const double z : x) sum += std::exp(z);
  std::vector<double> g;
  for (const double z : x) g.push_back(std::exp(z) / sum);
  g[static_cast<size_t>(label)] -= 1;
  grad->assign(params.size(), 0.0);
  for (size_t i = layers.size(); i-- > 0;) {
    const fdcr::NetworkLayer& l = layers[i];
    const Trace& t = traces[i];
    std::vector<double> in_grad(t.in.size());
    for (size_t k = 0; k < g.size(); ++k) {
      if (l.relu && t.out[k] <= 0) continue;
      const int64_t pixel = static_cast<int64_t>(t.winner[k]), o = pixel / (t.size[0] * t.size[1]);
      if (l.bias >= 0) (*grad)[static_cast<size_t>(l.bias + o)] += g[k];
      each_tap(l, pixel / t.size[1] % t.size[0], pixel % t.size[1], [&](size_t w, size_t in) {
        (*grad)[weight(l, o) + w] += g[k] * t.in[in];
        in_grad[in] += g[k] * static_cast<double>(params[weight(l, o) + w]);
      });
    }
    g = in_grad;
  }
  return x;
}

void check_network(const fdcr::Kernels& kernels, bool large) {
  std::vector<fdcr::NetworkLayer> layers;
  int64_t channels = draw(1, 3), size[] = {draw(1, 8), draw(1, 8)}, used = 0;
  const int64_t image[] = {channels, size[0], size[1]}, convolutions = draw(0, 2),
                all = convolutions + draw(1, 3);
  std::vector<float> params;
  for (int64_t i = 0; i < all; ++i) {
    fdcr::NetworkLayer l;
    l.in_channels = channels;
    l.out_channels = channels = draw(1, 18);
    l.relu = draw(0, 1) == 1 && i + 1 < all;
    l.pool = i < convolutions && draw(0, 1) == 1;
    for (int d = 0; d < 2; ++d) {
      l.input[d] = size[d];
      l.padding[d] = i < convolutions ? draw(0, 2) : 0;
      l.kernel[d] = i < convolutions ? draw(1, std::min<int64_t>(5, size[d] + 2 * l.padding[d])) : size[d];
      size[d] += 2 * l.padding[d] - l.kernel[d] + 1;
      if (size[d] == 1) l.pool = false;
    }
    if (size[0] == 1) l.pool = false;
    for (int64_t& s : size) s = l.pool ? s / 2 : s;
    const int64_t fan_in = l.in_channels * l.kernel[0] * l.kernel[1];
    l.weight = used;
    used += fan_in * channels;
    if (draw(0, 3) != 0) {
      l.bias = used;
      used += channels;
    }
    for (float w : numbers<float>(used - static_cast<int64_t>(params.size())))
      params.push_back(w / std::sqrt(static_cast<float>(fan_in)));
    layers.push_back(l);
  }
  const int64_t M = draw(1, 4), volume = image[0] * image[1] * image[2];
  const bool last = draw(0, 1) == 1;
  const std::vector<float> images = numbers<float>(M * volume);
  fdcr::NetworkProblem p;
  p.layers = layers.data();
  p.layer_count = all;
  p.params = params.data();
  p.params_count = used;
  p.images = images.data();
  const int64_t strides[] = {volume, last ? 1 : image[1] * image[2], image[2] * (last ? image[0] : 1),
                             last ? image[0] : 1};
  std::copy_n(strides, 4, p.image_stride);
  std::vector<int64_t> rows, labels;
  p.samples = large ? draw(1030, 1200) : draw(0, 9) == 0 ? draw(60, 140) : draw(1, 20);
  for (int64_t n = 0; n < p.samples; ++n) rows.push_back(draw(0, M - 1));
  for (int64_t n = 0; n < p.samples; ++n) labels.push_back(draw(0, channels - 1));
  p.rows = rows.data();
  p.labels = labels.data();
  std::vector<float> outputs(static_cast<size_t>(p.samples * channels)), grad(params.size()),
      squares(params.size());
  double loss = 0;
  p.outputs = outputs.data();
  kernels.network(p, pool);
  p.outputs = nullptr;
  p.loss = &loss;
  p.grad = grad.data();
  kernels.network(p, pool);
  p.grad = squares.data();
  p.squared = true;
  kernels.network(p, pool);

  std::vector<double> e_outputs, e_grad(params.size()), e_squares(params.size()), one;
  double e_loss = 0;
  for (size_t n = 0; n < rows.size(); ++n) {
    std::vector<double> x;
    for (int64_t c = 0; c < image[0]; ++c)
      for (int64_t i = 0; i < image[1] * image[2]; ++i)
        x.push_back(static_cast<double>(images[static_cast<size_t>(
            rows[n] * volume + c * strides[1] + i / image[2] * strides[2] + i % image[2] * strides[3])]));
    const std::vector<double> z = naive_network(layers, params, x, labels[n], &one);
    double sum = 0;
    for (const double v : z) sum += std::exp(v);
    e_loss += (std::log(sum) - z[static_cast<size_t>(labels[n])]) / static_cast<double>(p.samples);
    e_outputs.insert(e_outputs.end(), z.begin(), z.end());
    for (size_t i = 0; i < one.size(); ++i) {
      e_grad[i] += one[i] / static_cast<double>(p.samples);
      e_squares[i] += one[i] * one[i];
    }
  }
  require(std::abs(loss - e_loss) <= 1e-5 * (1 + e_loss), "loss of a network");
  require_close(outputs, e_outputs, 1e-5, "outputs of a network");
  require_close(grad, e_grad, 1e-5, "gradient of a network");
  require_close(squares, e_squares, 1e-5, "squared gradients of a network");

  std::vector<float> velocity = numbers<float>(used), expected_velocity = velocity, expected = params;
  const fdcr::SgdProblem step{used, params.data(), velocity.data(), grad.data(), 0.5f, 0.75f, 0.25f};
  for (size_t i = 0; i < expected.size(); ++i) {
    expected_velocity[i] = 0.75f * velocity[i] + grad[i] + 0.25f * params[i];
    expected[i] -= 0.5f * expected_velocity[i];
  }
  kernels.sgd_step(step, pool);
  require_close(velocity, expected_velocity, 1e-6, "velocity");
  require_close(params, expected, 1e-6, "parameters after a step");
}

// Two threads add to one number: a detector that finds nothing here finds nothing anywhere.
void plant_race() {
  volatile int shared = 0;
  std::thread other([&] { shared = shared + 1; });
  shared = shared + 1;
  other.join();
}

}  // namespace

// ROUNDS [--plant-race]
int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
  if (argc > 2 && std::strcmp(argv[2], "--plant-race") == 0) plant_race();
  const fdcr::Kernels* table[8];
  const int count = fdcr::compiled_kernels(table, 8);
  for (int i = 0; i < count; ++i) {
    if (!fdcr::supported(*table[i])) continue;
    for (int round = 0; round < rounds; ++round) {
      threads = 1 + round % 4;
      check_squared_grads<float>(*table[i], round % 25 == 0);
      check_squared_grads<double>(*table[i], round % 25 == 0);
      check_norm_grads<float>(*table[i]);
      check_norm_grads<double>(*table[i]);
      check_embedding_grads<float>(*table[i]);
      check_embedding_grads<double>(*table[i]);
      check_fill_row<float>(*table[i]);
      check_fill_row<double>(*table[i]);
      check_aggregation<float>(*table[i]);
      check_aggregation<double>(*table[i]);
      check_moments<float>(*table[i]);
      check_moments<double>(*table[i]);
      check_central_mean<float>(*table[i]);
      check_central_mean<double>(*table[i]);
      check_network(*table[i], round % 50 == 7);
      if (round % 5 == 0) {
        check_gram<float>(*table[i], round % 25 == 0);
        check_gram<double>(*table[i], round % 25 == 0);
      }
    }
    std::printf("%s: %d rounds right\n", table[i]->name, rounds);
  }
  return 0;
}
