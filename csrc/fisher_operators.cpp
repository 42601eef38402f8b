// The CPU operators of per-sample squared gradients.
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "tensors.h"
#include "torch_pool.h"

namespace {

using namespace fdcr;

std::tuple<Tensor, Tensor> run(SquaredGradsCall call, const Tensor& grad) {
  if (grad.numel() != 0) {
    kernels().squared_grads(call.problem, torch_pool);
  } else {
    torch::stable::zero_(call.weight);
    torch::stable::zero_(call.bias);
  }
  return {std::move(call.weight), std::move(call.bias)};
}

std::tuple<Tensor, Tensor> sum_squared_grads_linear(const Tensor& grad, const Tensor& input) {
  return run(linear_call(grad, input), grad);
}

std::tuple<Tensor, Tensor> sum_squared_grads_conv(const Tensor& grad, const Tensor& input,
                                                  const std::vector<int64_t>& kernel,
                                                  const std::vector<int64_t>& stride,
                                                  const std::vector<int64_t>& padding,
                                                  const std::vector<int64_t>& dilation, int64_t groups) {
  return run(conv_call(grad, input, kernel, stride, padding, dilation, groups), grad);
}

NormStrides norm_strides(const Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
}

// Statistics per channel, or none.
Source statistics(const std::optional<Tensor>& given, const Tensor& input, const char* name,
                  int64_t* stride) {
  if (!given.has_value()) return {};
  STD_TORCH_CHECK(given->dim() == 2 && given->size(0) == input.size(2) && given->size(1) == input.size(3),
                  name, " must have shape [", input.size(2), ", ", input.size(3), "]");
  stride[0] = given->stride(0);
  stride[1] = given->stride(1);
  return source(*given, name);
}

std::tuple<Tensor, Tensor> sum_squared_grads_norm(const Tensor& grad, const Tensor& input,
                                                  const std::optional<Tensor>& mean,
                                                  const std::optional<Tensor>& variance, double eps) {
  bool same_shape = grad.dim() == 5 && input.dim() == 5;
  for (int64_t d = 0; same_shape && d < 5; ++d) same_shape = grad.size(d) == input.size(d);
  STD_TORCH_CHECK(same_shape, "expected grad_output and input [N, T, G, C, S]");
  SquaredNormGradsProblem p;
  p.samples = input.size(0);
  p.positions = input.size(1);
  p.groups = input.size(2);
  p.channels = input.size(3);
  p.pixels = input.size(4);
  p.grad = source(grad, "grad_output");
  p.in = source(input, "input");
  p.grad_stride = norm_strides(grad);
  p.in_stride = norm_strides(input);
  p.mean = statistics(mean, input, "mean", p.mean_stride);
  p.variance = statistics(variance, input, "variance", p.variance_stride);
  p.eps = eps;
  const ScalarType type = accumulation_type(grad, input);
  Tensor weight = torch::stable::new_empty(grad, {p.groups, p.channels}, type);
  Tensor bias = torch::stable::new_empty(grad, {p.groups, p.channels}, type);
  p.weight = weight.mutable_data_ptr();
  p.bias = bias.mutable_data_ptr();
  kernels().squared_norm_grads(p, torch_pool);
  return {std::move(weight), std::move(bias)};
}

Tensor sum_squared_grads_embedding(const Tensor& grad, const Tensor& indices, int64_t rows) {
  STD_TORCH_CHECK(grad.dim() == 3 && indices.dim() == 2 && indices.size(0) == grad.size(0) &&
                      indices.size(1) == grad.size(1) && rows >= 0,
                  "expected grad_output [N, T, D] and indices [N, T]");
  STD_TORCH_CHECK(indices.is_cpu() && indices.scalar_type() == ScalarType::Long,
                  "indices must be int64 on the CPU");
  SquaredEmbeddingGradsProblem p;
  p.samples = grad.size(0);
  p.tokens = grad.size(1);
  p.rows = rows;
  p.columns = grad.size(2);
  std::vector<int64_t> tokens;
  tokens.reserve(static_cast<size_t>(p.samples * p.tokens));
  const int64_t* from = static_cast<const int64_t*>(indices.const_data_ptr());
  for (int64_t n = 0; n < p.samples; ++n)
    for (int64_t t = 0; t < p.tokens; ++t) {
      const int64_t index = from[n * indices.stride(0) + t * indices.stride(1)];
      STD_TORCH_CHECK(index < rows, "index ", index, " is out of range for ", rows, " embeddings");
      tokens.push_back(index);
    }
  p.indices = tokens.data();
  p.grad = source(grad, "grad_output");
  p.grad_sample = grad.stride(0);
  p.grad_token = grad.stride(1);
  p.grad_column = grad.stride(2);
  Tensor result = torch::stable::new_empty(grad, {rows, p.columns}, accumulation_type(grad, grad));
  p.result = result.mutable_data_ptr();
  kernels().squared_embedding_grads(p, torch_pool);
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(fdcr_fast, CPU, library) {
  library.impl("sum_squared_grads_linear", TORCH_BOX(&sum_squared_grads_linear));
  library.impl("sum_squared_grads_conv", TORCH_BOX(&sum_squared_grads_conv));
  library.impl("sum_squared_grads_norm", TORCH_BOX(&sum_squared_grads_norm));
  library.impl("sum_squared_grads_embedding", TORCH_BOX(&sum_squared_grads_embedding));
}

}  // namespace
