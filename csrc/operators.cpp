// The CPU operators of client matrices: tensors in, plain structs to the kernels, tensors out. The schemas
// and the documentation are in fdcr_fast/ops; the checks here only keep the kernels inside their memory.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "tensors.h"
#include "torch_pool.h"
#include "warm_memory.h"

void fdcr::check_place(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU, like the other tensors");
}

namespace {

using namespace fdcr;

std::vector<double> numbers(const Tensor& tensor, int64_t expected, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Double && tensor.dim() == 1 &&
                      tensor.size(0) == expected,
                  name, " must be float64 [", expected, "] on the CPU");
  const double* data = static_cast<const double*>(tensor.const_data_ptr());
  std::vector<double> copy(static_cast<size_t>(expected));
  for (size_t i = 0; i < copy.size(); ++i) copy[i] = data[static_cast<int64_t>(i) * tensor.stride(0)];
  return copy;
}

// --- client matrices

// A vector of any stride, or a contiguous tensor of any shape, as the numbers from `first` on.
VectorSegment segment(const Tensor& piece, int64_t first) {
  const bool vector = piece.dim() == 1;
  STD_TORCH_CHECK(vector || piece.is_contiguous(), "values must be vectors or contiguous");
  return {source(piece, "values"), first, piece.numel(), vector ? piece.stride(0) : 1};
}

// Vectors that arrive in pieces, one after the other, all of one length; segments live as long as this does.
struct Vectors {
  ClientVectors problem{};
  std::vector<VectorSegment> segments;
  int64_t params = 0;

  Vectors(const std::vector<Tensor>& values, int64_t clients, const std::optional<Tensor>& base) {
    segments.reserve(values.size());
    int64_t numbers = 0;
    for (const Tensor& piece : values) {
      const VectorSegment s = segment(piece, numbers);
      if (s.size > 0) segments.push_back(s);
      numbers += s.size;
    }
    STD_TORCH_CHECK(clients > 0 && numbers % clients == 0, numbers, " numbers are not ", clients,
                    " vectors of one length");
    params = numbers / clients;
    problem.segments = segments.data();
    problem.count = static_cast<int64_t>(segments.size());
    if (!base.has_value()) return;
    STD_TORCH_CHECK(base->dim() == 1 && base->size(0) == params, "base must have shape [", params, "]");
    problem.base = source(*base, "base");
    problem.base_stride = base->stride(0);
    STD_TORCH_CHECK(problem.base.element == Element::kFloat32 || problem.base.element == Element::kFloat64,
                    "base must be float32 or float64");
  }
  Vectors(const Vectors&) = delete;
  Vectors& operator=(const Vectors&) = delete;
};

void fill(const std::vector<Tensor>& values, const std::optional<Tensor>& base, const Tensor& rows,
          RowStatistics* totals) {
  STD_TORCH_CHECK(rows.dim() == 3, "expected a tiled client matrix, [T, K, L]");
  const Vectors vectors(values, rows.size(1), base);
  const ClientMatrix to = client_matrix(rows, vectors.params, "rows");
  FillRowsProblem p;
  p.vectors = vectors.problem;
  p.clients = rows.size(1);
  p.params = vectors.params;
  p.data = rows.mutable_data_ptr();
  p.element = to.source.element;
  p.tile_length = to.tile_length;
  p.tile_stride = to.tile_stride;
  p.client_stride = to.client_stride;
  p.stride = to.stride;
  if (p.params > 0) kernels().fill_rows(p, totals, torch_pool);
}

Tensor fill_row(const std::vector<Tensor>& values, Tensor row, const Tensor& statistics,
                const std::optional<Tensor>& base) {
  STD_TORCH_CHECK(row.dim() == 2, "expected a row of a tiled client matrix, [T, L]");
  const std::vector<double> before = numbers(statistics, 3, "statistics");
  RowStatistics total{before[0], before[1], before[2]};
  fill(values, base, torch::stable::unsqueeze(row, 1), &total);
  Tensor result = torch::stable::new_empty(statistics, {3});
  double* to_result = static_cast<double*>(result.mutable_data_ptr());
  to_result[0] = total.squared_norm;
  to_result[1] = total.low;
  to_result[2] = total.high;
  return result;
}

void fill_rows(const std::vector<Tensor>& values, Tensor rows, const std::optional<Tensor>& base) {
  fill(values, base, rows, nullptr);
}

std::tuple<Tensor, Tensor> vector_range(const std::vector<Tensor>& values, int64_t clients) {
  const Vectors vectors(values, clients, std::nullopt);
  STD_TORCH_CHECK(vectors.params > 0, "the range of no numbers is undefined");
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  Tensor low = torch::stable::new_empty(values[0], {clients}, ScalarType::Double);
  Tensor high = torch::stable::new_empty(values[0], {clients}, ScalarType::Double);
  std::fill_n(doubles(low), clients, kInfinity);
  std::fill_n(doubles(high), clients, -kInfinity);
  for (const VectorSegment& s : vectors.segments) {
    for (int64_t done = 0; done < s.size;) {  // a segment may hold numbers of several clients
      const int64_t client = (s.first + done) / vectors.params;
      const int64_t n = std::min(s.size, (client + 1) * vectors.params - s.first) - done;
      double &least = doubles(low)[client], &most = doubles(high)[client];
      double smallest, largest;
      const Source from{element_at(s.source, done * s.stride), s.source.element};
      kernels().range({from, n, 0, 0, s.stride}, 1, n, &smallest, &largest, pool_for(n));
      done += n;
      if (smallest != smallest || least != least) {
        least = most = std::numeric_limits<double>::quiet_NaN();
      } else {
        least = std::min(least, smallest);
        most = std::max(most, largest);
      }
    }
  }
  return {std::move(low), std::move(high)};
}

// --- aggregation

std::tuple<Tensor, Tensor> importance_range(const Tensor& fishers, int64_t params) {
  STD_TORCH_CHECK(params >= 1, "the range of ", params, " parameters is undefined");
  const ClientMatrix matrix = client_matrix(fishers, params, "fishers");
  Tensor low = per_client(fishers), high = per_client(fishers);
  kernels().range(matrix, fishers.size(1), params, doubles(low), doubles(high),
                  pool_for(fishers.size(1) * params));
  return {std::move(low), std::move(high)};
}

Tensor squared_norm(const Tensor& updates, int64_t params) {
  const ClientMatrix matrix = client_matrix(updates, params, "updates");
  Tensor result = per_client(updates);
  kernels().squared_norm(matrix, updates.size(1), params, doubles(result),
                         pool_for(updates.size(1) * params));
  return result;
}

Tensor moments(const Tensor& values, const std::vector<Tensor>& factors, const Tensor& read,
               const std::vector<Tensor>& ranges, const Tensor& total, int64_t params,
               const std::vector<bool>& squares) {
  MomentsProblem p;
  p.values = client_matrix(values, params, "values");
  p.params = params;
  const int64_t K = values.size(1), V = p.view_count = static_cast<int64_t>(factors.size());
  STD_TORCH_CHECK(ranges.size() == factors.size() && squares.size() == factors.size(),
                  "expected factors, ranges and squares of ", V, " views");
  std::vector<std::vector<ParamRange>> selected;
  std::vector<MomentsView> views;
  for (size_t i = 0; i < factors.size(); ++i) {
    const Tensor& own = factors[i];
    STD_TORCH_CHECK(own.dim() == 1 && (own.size(0) == 0 || own.size(0) == params), "factors must be [",
                    params, "] or [0]");
    selected.push_back(parameter_ranges(ranges[i], params));
    MomentsView view{};
    if (own.size(0) > 0) view.factors = source(own, "factors");
    view.factor_stride = own.stride(0);
    view.squares = squares[i];
    view.ranges = selected.back().data();
    view.count = static_cast<int64_t>(selected.back().size());
    views.push_back(view);
  }
  p.views = views.data();
  STD_TORCH_CHECK(total.is_cpu() && total.scalar_type() == ScalarType::Double && total.dim() == 3 &&
                      total.size(0) == V && total.size(1) == 2 && total.size(2) == K,
                  "total must be float64 [", V, ", 2, ", K, "] on the CPU");
  const std::vector<int64_t> rows = chosen_rows(read, K);
  p.rows = rows.data();
  const int64_t n = p.row_count = static_cast<int64_t>(rows.size());
  const double* before = static_cast<const double*>(total.const_data_ptr());
  std::vector<double> sums(static_cast<size_t>(2 * V * n));
  for (int64_t m = 0; m < 2 * V; ++m)
    for (int64_t i = 0; i < n; ++i)
      sums[static_cast<size_t>(m * n + i)] =
          before[m / 2 * total.stride(0) + m % 2 * total.stride(1) + rows[i] * total.stride(2)];
  if (n > 0 && V > 0) kernels().moments(p, sums.data(), pool_for(n * params));
  Tensor result = torch::stable::new_empty(total, {V, 2, K});
  double* to = doubles(result);
  std::fill_n(to, 2 * V * K, std::numeric_limits<double>::quiet_NaN());
  for (int64_t m = 0; m < 2 * V; ++m)
    for (int64_t i = 0; i < n; ++i) to[m * K + rows[i]] = sums[static_cast<size_t>(m * n + i)];
  return result;
}

// Where the kernels write new parameters: in float64 or float32, rounded to the narrower types afterwards.
Tensor new_params(const Tensor& global) {
  STD_TORCH_CHECK(global.dim() == 1, "expected global_params [P]");
  const bool wide = global.scalar_type() == ScalarType::Double;
  return warm_vector(global, global.size(0), wide ? ScalarType::Double : ScalarType::Float);
}

NewParams new_params_to(const Tensor& global, const Tensor& result) {
  const Source from = source(global, "global_params");
  return {from, global.stride(0), largest(from.element), result.mutable_data_ptr()};
}

Tensor as_type_of(const Tensor& global, Tensor params) {
  if (params.scalar_type() == global.scalar_type()) return params;
  Tensor narrow = torch::stable::new_empty(global, {global.size(0)});
  torch::stable::copy_(narrow, params);
  return narrow;
}

// The tensors behind an AggregationProblem, gathered in turn; the vectors live as long as this does.
struct Aggregation {
  AggregationProblem problem{};
  std::vector<double> low, high, alpha, weights, totals;

  Aggregation(const Vectors& updates, const Vectors* fishers, const std::optional<Tensor>& fisher_min,
              const std::optional<Tensor>& fisher_max, int64_t clients, bool single) {
    problem.update_vectors = &updates.problem;
    problem.clients = clients;
    problem.params = updates.params;
    problem.single = single;
    STD_TORCH_CHECK(updates.problem.base.element == Element::kFloat32, "base must be float32");
    const bool with_fishers = fishers != nullptr;
    STD_TORCH_CHECK(with_fishers == fisher_min.has_value() && with_fishers == fisher_max.has_value(),
                    "fishers, fisher_min and fisher_max go together");
    if (!with_fishers) return;
    STD_TORCH_CHECK(fishers->params == updates.params, "fishers differ in length from updates");
    problem.fisher_vectors = &fishers->problem;
    take_ranges(*fisher_min, *fisher_max);
  }

  Aggregation(const Tensor& updates, const std::optional<Tensor>& fishers,
              const std::optional<Tensor>& fisher_min, const std::optional<Tensor>& fisher_max,
              int64_t params, bool single) {
    problem.updates = client_matrix(updates, params, "updates");
    problem.clients = updates.size(1);
    problem.params = params;
    problem.single = single;
    check_fishers(updates, fishers, fisher_min, fisher_max);
    if (fishers.has_value()) {
      problem.fishers = client_matrix(*fishers, params, "fishers");
      take_ranges(*fisher_min, *fisher_max);
    }
    const auto wide = [](const ClientMatrix& m) {
      return m.source.data != nullptr && m.source.element == Element::kFloat64;
    };
    STD_TORCH_CHECK(!single || !(wide(problem.updates) || wide(problem.fishers)),
                    "single is not for float64 updates or fishers");
  }
  Aggregation(const Aggregation&) = delete;
  Aggregation& operator=(const Aggregation&) = delete;

  void want_scores(const Tensor& shares, const Tensor& so_far, bool reweight) {
    check_importances(reweight);
    alpha = numbers(shares, problem.clients, "alpha");
    totals = numbers(so_far, 2 * problem.clients + 1, "totals");
    problem.alpha = alpha.data();
    problem.reweight = reweight;
    problem.distance = totals.data();
    problem.norm = problem.distance + problem.clients;
    problem.mean_square = problem.norm + problem.clients;
  }

  void want_norms(const Tensor& so_far) {
    totals = numbers(so_far, problem.clients, "totals");
    problem.norm = totals.data();
  }

  void want_mean(const Tensor& global, const Tensor& shares, bool rescale, const Tensor& result) {
    check_importances(rescale);
    weights = numbers(shares, problem.clients, "weights");
    problem.weights = weights.data();
    problem.rescale = rescale;
    problem.to = new_params_to(global, result);
  }

  Tensor run(const Tensor& like) {
    kernels().aggregate(problem, pool_for(problem.clients * problem.params));
    if (problem.norm == nullptr) return {};
    Tensor result = torch::stable::new_empty(like, {static_cast<int64_t>(totals.size())}, ScalarType::Double);
    const double* const shares = problem.alpha != nullptr ? problem.alpha : problem.weights;
    for (int64_t k = 0; k < problem.clients; ++k) {
      if (shares[k] != 0) continue;
      problem.norm[k] = std::numeric_limits<double>::quiet_NaN();
      if (problem.distance != nullptr) problem.distance[k] = problem.norm[k];
    }
    std::copy(totals.begin(), totals.end(), doubles(result));
    return result;
  }

 private:
  void take_ranges(const Tensor& fisher_min, const Tensor& fisher_max) {
    low = numbers(fisher_min, problem.clients, "fisher_min");
    high = numbers(fisher_max, problem.clients, "fisher_max");
    problem.fisher_min = low.data();
    problem.fisher_max = high.data();
  }

  void check_importances(bool wanted) const {
    STD_TORCH_CHECK(!wanted || problem.fisher_min != nullptr, "importances need fishers");
  }
};

Tensor discrepancy(const Tensor& updates, const std::optional<Tensor>& fishers,
                   const std::optional<Tensor>& fisher_min, const std::optional<Tensor>& fisher_max,
                   const Tensor& alpha, const Tensor& totals, int64_t params, bool single) {
  Aggregation aggregation(updates, fishers, fisher_min, fisher_max, params, single);
  aggregation.want_scores(alpha, totals, fishers.has_value());
  return aggregation.run(updates);
}

Tensor rescaled_mean(const Tensor& global, const Tensor& updates, const std::optional<Tensor>& fishers,
                     const std::optional<Tensor>& fisher_min, const std::optional<Tensor>& fisher_max,
                     const Tensor& weights, bool single) {
  Tensor params = new_params(global);
  Aggregation aggregation(updates, fishers, fisher_min, fisher_max, params.size(0), single);
  aggregation.want_mean(global, weights, fishers.has_value(), params);
  aggregation.run(updates);
  return as_type_of(global, std::move(params));
}

std::tuple<Tensor, Tensor> discrepancy_and_mean(const Tensor& global, const Tensor& updates,
                                                const std::optional<Tensor>& fishers,
                                                const std::optional<Tensor>& fisher_min,
                                                const std::optional<Tensor>& fisher_max, const Tensor& alpha,
                                                const Tensor& weights, const Tensor& totals, bool reweight,
                                                bool rescale, bool single) {
  Tensor params = new_params(global);
  Aggregation aggregation(updates, fishers, fisher_min, fisher_max, params.size(0), single);
  aggregation.want_scores(alpha, totals, reweight);
  aggregation.want_mean(global, weights, rescale, params);
  Tensor result = aggregation.run(updates);
  return {std::move(result), as_type_of(global, std::move(params))};
}

std::tuple<Tensor, Tensor> norms_and_mean(const Tensor& global, const Tensor& updates, const Tensor& weights,
                                          const Tensor& totals, bool single) {
  Tensor params = new_params(global);
  Aggregation aggregation(updates, std::nullopt, std::nullopt, std::nullopt, params.size(0), single);
  aggregation.want_norms(totals);
  aggregation.want_mean(global, weights, false, params);
  Tensor result = aggregation.run(updates);
  return {std::move(result), as_type_of(global, std::move(params))};
}

std::tuple<Tensor, Tensor> aggregate_vectors(
    const std::optional<Tensor>& global, const std::vector<Tensor>& updates,
    const std::optional<Tensor>& base, const std::vector<Tensor>& fishers,
    const std::optional<Tensor>& fisher_min, const std::optional<Tensor>& fisher_max,
    const std::optional<Tensor>& alpha, const std::optional<Tensor>& weights, const Tensor& totals,
    bool reweight, bool rescale, bool single) {
  STD_TORCH_CHECK(alpha.has_value() || weights.has_value(), "alpha, weights or both must be given");
  const int64_t clients = (alpha.has_value() ? *alpha : *weights).size(0);
  const Vectors rows(updates, clients, base);
  std::optional<Vectors> importances;
  if (!fishers.empty()) importances.emplace(fishers, clients, std::nullopt);
  Aggregation aggregation(rows, importances.has_value() ? &*importances : nullptr, fisher_min, fisher_max,
                          clients, single);
  if (alpha.has_value()) {
    aggregation.want_scores(*alpha, totals, reweight);
  } else if (totals.numel() > 0) {
    STD_TORCH_CHECK(!rescale, "norms come beside the plain mean alone");
    aggregation.want_norms(totals);
  }
  if (!weights.has_value()) return {aggregation.run(totals), torch::stable::new_empty(totals, {0})};
  STD_TORCH_CHECK(global.has_value() && global->dim() == 1 && global->size(0) == rows.params,
                  "expected global_params [", rows.params, "]");
  Tensor params = new_params(*global);
  aggregation.want_mean(*global, *weights, rescale, params);
  Tensor result = aggregation.run(totals);
  if (aggregation.problem.norm == nullptr) result = torch::stable::new_empty(totals, {0});
  return {std::move(result), as_type_of(*global, std::move(params))};
}

// --- the middle of every parameter

Tensor central_mean(const Tensor& global, const Tensor& updates, const Tensor& read, int64_t keep,
                    bool nearest) {
  Tensor params = new_params(global);
  CentralMeanProblem p;
  p.params = params.size(0);
  p.updates = client_matrix(updates, p.params, "updates");
  const std::vector<int64_t> rows = chosen_rows(read, updates.size(1));
  p.rows = rows.data();
  p.row_count = static_cast<int64_t>(rows.size());
  p.keep = keep;
  p.nearest = nearest;
  STD_TORCH_CHECK(1 <= keep && keep <= p.row_count && (nearest || (p.row_count - keep) % 2 == 0),
                  "keep = ", keep, " is not a central part of ", p.row_count, " clients");
  p.to = new_params_to(global, params);
  kernels().central_mean(p, pool_for(p.row_count * p.params));
  return as_type_of(global, std::move(params));
}

// --- inner products

Tensor gram(const Tensor& updates, const std::optional<Tensor>& fishers,
            const std::optional<Tensor>& fisher_min, const std::optional<Tensor>& fisher_max,
            const Tensor& read, const std::vector<std::string>& transforms, const std::vector<Tensor>& ranges,
            const Tensor& total, int64_t params, bool single) {
  GramProblem p;
  p.updates = client_matrix(updates, params, "updates");
  p.params = params;
  const int64_t K = updates.size(1), V = p.view_count = static_cast<int64_t>(transforms.size());
  check_fishers(updates, fishers, fisher_min, fisher_max);
  std::vector<double> low, high;
  if (fishers.has_value()) {
    p.fishers = client_matrix(*fishers, params, "fishers");
    low = numbers(*fisher_min, K, "fisher_min");
    high = numbers(*fisher_max, K, "fisher_max");
    p.fisher_min = low.data();
    p.fisher_max = high.data();
  }
  STD_TORCH_CHECK(total.is_cpu() && total.scalar_type() == ScalarType::Double && total.dim() == 3 &&
                      total.size(0) == V && total.size(1) == K && total.size(2) == K,
                  "total must be float64 [", V, ", ", K, ", ", K, "] on the CPU");
  const std::vector<int64_t> rows = chosen_rows(read, K);
  p.rows = rows.data();
  p.row_count = static_cast<int64_t>(rows.size());
  STD_TORCH_CHECK(ranges.size() == transforms.size(), "expected ranges for each of ", V, " transforms");
  std::vector<std::vector<ParamRange>> selected;
  std::vector<GramView> views;
  for (size_t i = 0; i < transforms.size(); ++i) {
    const GramTransform transform = gram_transform(transforms[i]);
    STD_TORCH_CHECK(fishers.has_value() || transform == GramTransform::kUpdate, transforms[i],
                    " reads Fishers, and there are none");
    selected.push_back(parameter_ranges(ranges[i], params));
    views.push_back({transform, selected.back().data(), static_cast<int64_t>(selected.back().size())});
  }
  p.views = views.data();
  p.single = single && p.updates.source.element != Element::kFloat64 &&
             !(fishers.has_value() && p.fishers.source.element == Element::kFloat64);

  // The kernel sums one triangle of the clients that are read.
  const int64_t n = p.row_count;
  Tensor sums = torch::stable::new_empty(total, {V, n, n});
  Tensor result = torch::stable::new_empty(total, {V, K, K});
  double *const triangle = doubles(sums), *const symmetric = doubles(result);
  const double* before = static_cast<const double*>(total.const_data_ptr());
  for (int64_t v = 0; v < V; ++v)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i; j < n; ++j)
        triangle[(v * n + i) * n + j] =
            before[v * total.stride(0) + rows[i] * total.stride(1) + rows[j] * total.stride(2)];
  kernels().gram(p, triangle, pool_for(p.row_count * p.row_count * p.params));
  if (n < K) std::fill_n(symmetric, V * K * K, std::numeric_limits<double>::quiet_NaN());
  for (int64_t v = 0; v < V; ++v)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i; j < n; ++j)
        symmetric[(v * K + rows[i]) * K + rows[j]] = symmetric[(v * K + rows[j]) * K + rows[i]] =
            triangle[(v * n + i) * n + j];
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(fdcr_fast, CPU, library) {
  library.impl("fill_row", TORCH_BOX(&fill_row));
  library.impl("fill_rows", TORCH_BOX(&fill_rows));
  library.impl("vector_range", TORCH_BOX(&vector_range));
  library.impl("importance_range", TORCH_BOX(&importance_range));
  library.impl("squared_norm", TORCH_BOX(&squared_norm));
  library.impl("moments", TORCH_BOX(&moments));
  library.impl("discrepancy", TORCH_BOX(&discrepancy));
  library.impl("rescaled_mean", TORCH_BOX(&rescaled_mean));
  library.impl("discrepancy_and_mean", TORCH_BOX(&discrepancy_and_mean));
  library.impl("norms_and_mean", TORCH_BOX(&norms_and_mean));
  library.impl("aggregate_vectors", TORCH_BOX(&aggregate_vectors));
  library.impl("central_mean", TORCH_BOX(&central_mean));
  library.impl("gram", TORCH_BOX(&gram));
}

}  // namespace
