// The CUDA operators: tensors in, plain structs to the kernels, tensors out. Those that are not here are
// Triton's or the reference's.
#include "operators.h"

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "device.h"

void fdcr::check_place(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(cuda::Device::holds(tensor), name, " must be on the device of the other tensors");
}

namespace {

using namespace fdcr;
using cuda::Device;
using cuda::Stream;

const double* numbers(const Tensor& tensor, int64_t expected, const char* name) {
  check_place(tensor, name);
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Double && tensor.dim() == 1 && tensor.size(0) == expected, name,
      " must be float64 [", expected, "]");
  return static_cast<const double*>(tensor.const_data_ptr());
}

template <class T>
void add_rows(const Tensor& rows, int64_t columns, void* result, const Stream& stream) {
  cuda::RowReduction<T> sum;
  sum.rows = static_cast<const T*>(rows.const_data_ptr());
  sum.count = rows.size(0);
  sum.columns = sum.row_stride = columns;
  sum.result = static_cast<T*>(result);
  cuda::reduce_rows(sum, stream);
}

// --- per-sample squared gradients

std::tuple<Tensor, Tensor> run(const Device& device, SquaredGradsCall call, const Tensor& grad) {
  if (grad.numel() == 0) {
    torch::stable::zero_(call.weight);
    torch::stable::zero_(call.bias);
    return {std::move(call.weight), std::move(call.bias)};
  }
  const int64_t splits = cuda::squared_grads_splits(call.problem, device.stream);
  SquaredGradsProblem p = call.problem;
  Tensor weights = call.weight, biases = call.bias;
  if (splits > 1) {
    weights = torch::stable::new_empty(call.weight, {splits, call.weight.numel()});
    biases = torch::stable::new_empty(call.bias, {splits, call.bias.numel()});
    p.weight = weights.mutable_data_ptr();
    p.bias = biases.mutable_data_ptr();
  }
  cuda::squared_grads(p, cuda::one_product_allowed(), device.stream);
  if (splits > 1) {
    const auto add = call.weight.scalar_type() == ScalarType::Double ? add_rows<double> : add_rows<float>;
    add(weights, call.weight.numel(), call.problem.weight, device.stream);
    add(biases, call.bias.numel(), call.problem.bias, device.stream);
  }
  return {std::move(call.weight), std::move(call.bias)};
}

std::tuple<Tensor, Tensor> sum_squared_grads_linear(const Tensor& grad, const Tensor& input) {
  const Device device(grad);
  return run(device, linear_call(grad, input), grad);
}

std::tuple<Tensor, Tensor> sum_squared_grads_conv(const Tensor& grad, const Tensor& input,
                                                  std::vector<int64_t> kernel, std::vector<int64_t> stride,
                                                  std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                                  int64_t groups) {
  const Device device(grad);
  return run(device, conv_call(grad, input, kernel, stride, padding, dilation, groups), grad);
}

// --- client matrices

Tensor statistic(const cuda::StatisticsProblem& p, const Tensor& partial, cuda::Reduction kind,
                 const Tensor& like, const Stream& stream) {
  Tensor result = per_client(like);
  cuda::RowReduction<double> all;
  all.rows = doubles(partial);
  all.count = partial.size(0);
  all.columns = all.row_stride = p.clients;
  all.kind = kind;
  all.result = doubles(result);
  cuda::reduce_rows(all, stream);
  return result;
}

cuda::StatisticsProblem statistics_of(const Tensor& values, int64_t params, const char* name) {
  cuda::StatisticsProblem p;
  p.values = client_matrix(values, params, name);
  p.clients = values.size(1);
  p.params = params;
  return p;
}

Tensor partial_statistics(const Tensor& values, const cuda::StatisticsProblem& p, const Stream& stream) {
  return torch::stable::new_empty(values, {cuda::statistics_chunks(p, stream), p.clients},
                                  ScalarType::Double);
}

std::tuple<Tensor, Tensor> importance_range(const Tensor& fishers, int64_t params) {
  const Device device(fishers);
  STD_TORCH_CHECK(params >= 1, "the range of ", params, " parameters is undefined");
  cuda::StatisticsProblem p = statistics_of(fishers, params, "fishers");
  Tensor low = partial_statistics(fishers, p, device.stream), high = torch::stable::empty_like(low);
  p.low = doubles(low);
  p.high = doubles(high);
  cuda::statistics(p, device.stream);
  return {statistic(p, low, cuda::Reduction::kMin, fishers, device.stream),
          statistic(p, high, cuda::Reduction::kMax, fishers, device.stream)};
}

Tensor squared_norm(const Tensor& updates, int64_t params) {
  const Device device(updates);
  cuda::StatisticsProblem p = statistics_of(updates, params, "updates");
  Tensor norm = partial_statistics(updates, p, device.stream);
  p.norm = doubles(norm);
  cuda::statistics(p, device.stream);
  return statistic(p, norm, cuda::Reduction::kSum, updates, device.stream);
}

// The tensors behind an AggregationProblem, gathered in turn; contiguous copies live as long as this does.
class Aggregation {
 public:
  Aggregation(const Tensor& updates, const std::optional<Tensor>& fishers,
              const std::optional<Tensor>& fisher_min, const std::optional<Tensor>& fisher_max,
              int64_t params, bool single)
      : device_(updates), updates_(updates) {
    problem_.updates = client_matrix(updates, params, "updates");
    problem_.clients = updates.size(1);
    problem_.params = params;
    problem_.single = single;
    check_fishers(updates, fishers, fisher_min, fisher_max);
    if (fishers.has_value()) {
      problem_.fishers = client_matrix(*fishers, params, "fishers");
      problem_.fisher_min = keep(*fisher_min, problem_.clients, "fisher_min");
      problem_.fisher_max = keep(*fisher_max, problem_.clients, "fisher_max");
    }
    const auto wide = [](const ClientMatrix& m) {
      return m.source.data != nullptr && m.source.element == Element::kFloat64;
    };
    STD_TORCH_CHECK(!single || !(wide(problem_.updates) || wide(problem_.fishers)),
                    "single is not for float64 updates or fishers");
  }

  void want_scores(const Tensor& alpha, const Tensor& totals, bool reweight) {
    check_importances(reweight);
    problem_.alpha = keep(alpha, problem_.clients, "alpha");
    problem_.reweight = reweight;
    before_ = numbers(totals, width(), "totals");
    before_stride_ = totals.stride(0);
  }

  Tensor want_mean(const Tensor& global, const Tensor& weights, bool rescale) {
    check_importances(rescale);
    STD_TORCH_CHECK(global.dim() == 1, "expected global_params [P]");
    problem_.weights = keep(weights, problem_.clients, "weights");
    problem_.rescale = rescale;
    Tensor result = torch::stable::new_empty(global, {global.size(0)});
    const Source from = source(global, "global_params");
    problem_.to = {from, global.stride(0), largest(from.element), result.mutable_data_ptr()};
    return result;
  }

  // The new totals, where scores are wanted.
  Tensor run() {
    if (problem_.alpha == nullptr) {
      cuda::aggregate(problem_, nullptr, device_.stream);
      return {};
    }
    const int64_t blocks = cuda::aggregation_blocks(problem_, device_.stream);
    const Tensor partial = torch::stable::new_empty(updates_, {blocks, width()}, ScalarType::Double);
    Tensor result = torch::stable::new_empty(updates_, {width()}, ScalarType::Double);
    cuda::aggregate(problem_, doubles(partial), device_.stream);
    cuda::RowReduction<double> sum;
    sum.rows = doubles(partial);
    sum.count = blocks;
    sum.columns = sum.row_stride = width();
    sum.before = before_;
    sum.before_stride = before_stride_;
    sum.result = doubles(result);
    cuda::reduce_rows(sum, device_.stream);
    return result;
  }

 private:
  int64_t width() const { return 2 * problem_.clients + 1; }

  void check_importances(bool wanted) const {
    STD_TORCH_CHECK(!wanted || problem_.fisher_min != nullptr, "importances need fishers");
  }

  const double* keep(const Tensor& tensor, int64_t size, const char* name) {
    numbers(tensor, size, name);
    kept_.push_back(torch::stable::contiguous(tensor));
    return static_cast<const double*>(kept_.back().const_data_ptr());
  }

  Device device_;
  Tensor updates_;
  AggregationProblem problem_{};
  std::vector<Tensor> kept_;
  const double* before_ = nullptr;
  int64_t before_stride_ = 0;
};

Tensor discrepancy(const Tensor& updates, const std::optional<Tensor>& fishers,
                   const std::optional<Tensor>& fisher_min, const std::optional<Tensor>& fisher_max,
                   const Tensor& alpha, const Tensor& totals, int64_t params, bool single) {
  Aggregation aggregation(updates, fishers, fisher_min, fisher_max, params, single);
  aggregation.want_scores(alpha, totals, fishers.has_value());
  return aggregation.run();
}

Tensor rescaled_mean(const Tensor& global, const Tensor& updates, const std::optional<Tensor>& fishers,
                     const std::optional<Tensor>& fisher_min, const std::optional<Tensor>& fisher_max,
                     const Tensor& weights, bool single) {
  Aggregation aggregation(updates, fishers, fisher_min, fisher_max, global.numel(), single);
  Tensor result = aggregation.want_mean(global, weights, fishers.has_value());
  aggregation.run();
  return result;
}

std::tuple<Tensor, Tensor> discrepancy_and_mean(const Tensor& global, const Tensor& updates,
                                                const std::optional<Tensor>& fishers,
                                                const std::optional<Tensor>& fisher_min,
                                                const std::optional<Tensor>& fisher_max, const Tensor& alpha,
                                                const Tensor& weights, const Tensor& totals, bool reweight,
                                                bool rescale, bool single) {
  Aggregation aggregation(updates, fishers, fisher_min, fisher_max, global.numel(), single);
  aggregation.want_scores(alpha, totals, reweight);
  Tensor result = aggregation.want_mean(global, weights, rescale);
  Tensor scores = aggregation.run();
  return {std::move(scores), std::move(result)};
}

// --- inner products

Tensor gram(const Tensor& updates, const std::optional<Tensor>& fishers,
            const std::optional<Tensor>& fisher_min, const std::optional<Tensor>& fisher_max,
            const Tensor& read, const std::vector<std::string>& transforms, const std::vector<Tensor>& ranges,
            const Tensor& total, int64_t params, bool single) {
  const Device device(updates);
  GramProblem p;
  p.updates = client_matrix(updates, params, "updates");
  p.params = params;
  const int64_t K = updates.size(1), V = static_cast<int64_t>(transforms.size());
  check_fishers(updates, fishers, fisher_min, fisher_max);
  std::vector<Tensor> kept;
  if (fishers.has_value()) {
    p.fishers = client_matrix(*fishers, params, "fishers");
    numbers(*fisher_min, K, "fisher_min");
    numbers(*fisher_max, K, "fisher_max");
    kept = {torch::stable::contiguous(*fisher_min), torch::stable::contiguous(*fisher_max)};
    p.fisher_min = doubles(kept[0]);
    p.fisher_max = doubles(kept[1]);
  }
  p.single = single && p.updates.source.element != Element::kFloat64 &&
             !(fishers.has_value() && p.fishers.source.element == Element::kFloat64);
  check_place(total, "total");
  STD_TORCH_CHECK(total.scalar_type() == ScalarType::Double && total.dim() == 3 && total.size(0) == V &&
                      total.size(1) == K && total.size(2) == K,
                  "total must be float64 [", V, ", ", K, ", ", K, "]");
  const std::vector<int64_t> rows = chosen_rows(read, K);
  const std::unique_ptr<bool[]> is_read(new bool[static_cast<size_t>(K)]());
  for (const int64_t row : rows) is_read[static_cast<size_t>(row)] = true;
  STD_TORCH_CHECK(ranges.size() == transforms.size(), "expected ranges for each of ", V, " transforms");
  const Tensor partial = torch::stable::new_empty(total, {cuda::gram_splits(p, K, device.stream), K, K});
  Tensor result = torch::stable::new_empty(total, {V, K, K});
  for (int64_t v = 0; v < V; ++v) {
    cuda::GramCall call;
    call.transform = gram_transform(transforms[static_cast<size_t>(v)]);
    STD_TORCH_CHECK(fishers.has_value() || call.transform == GramTransform::kUpdate,
                    transforms[static_cast<size_t>(v)], " reads Fishers, and there are none");
    const std::vector<ParamRange> selected = parameter_ranges(ranges[static_cast<size_t>(v)], params);
    call.ranges = selected.data();
    call.range_count = static_cast<int64_t>(selected.size());
    call.is_read = is_read.get();
    call.before = static_cast<const double*>(total.const_data_ptr()) + v * total.stride(0);
    call.before_stride[0] = total.stride(1);
    call.before_stride[1] = total.stride(2);
    call.partial = doubles(partial);
    call.result = doubles(result) + v * K * K;
    cuda::gram(p, K, call, device.stream);
  }
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(fdcr_fast, FDCR_DISPATCH_KEY, library) {
  library.impl("sum_squared_grads_linear", TORCH_BOX(&sum_squared_grads_linear));
  library.impl("sum_squared_grads_conv", TORCH_BOX(&sum_squared_grads_conv));
  library.impl("importance_range", TORCH_BOX(&importance_range));
  library.impl("squared_norm", TORCH_BOX(&squared_norm));
  library.impl("discrepancy", TORCH_BOX(&discrepancy));
  library.impl("rescaled_mean", TORCH_BOX(&rescaled_mean));
  library.impl("discrepancy_and_mean", TORCH_BOX(&discrepancy_and_mean));
  library.impl("gram", TORCH_BOX(&gram));
}

}  // namespace
