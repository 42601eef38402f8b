// From tensors to the structs of problems.h, for the operators of every backend: shapes are checked here, so
// that kernels stay inside their memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "problems.h"

namespace fdcr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Refuses tensors that the backend's kernels cannot reach; each backend defines it.
void check_place(const Tensor& tensor, const char* name);

inline Source source(const Tensor& tensor, const char* name) {
  check_place(tensor, name);
  const void* data = tensor.const_data_ptr();
  STD_TORCH_CHECK(data != nullptr || tensor.numel() == 0, name, " has no memory: it was freed");
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return {data, Element::kFloat32};
    case ScalarType::Double:
      return {data, Element::kFloat64};
    case ScalarType::BFloat16:
      return {data, Element::kBFloat16};
    case ScalarType::Half:
      return {data, Element::kFloat16};
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16");
  }
}

inline double* doubles(const Tensor& x) { return static_cast<double*>(x.mutable_data_ptr()); }

inline float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline ScalarType accumulation_type(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == ScalarType::Double || b.scalar_type() == ScalarType::Double ? ScalarType::Double
                                                                                        : ScalarType::Float;
}

// A problem, and the tensors that its results go to.
struct SquaredGradsCall {
  SquaredGradsProblem problem;
  Tensor weight, bias;
};

inline SquaredGradsCall squared_grads_call(SquaredGradsProblem p, const Tensor& grad, const Tensor& input,
                                           const std::vector<int64_t>& shape) {
  const ScalarType type = accumulation_type(grad, input);
  SquaredGradsCall call{p, torch::stable::new_empty(grad, shape, type),
                        torch::stable::new_empty(grad, {shape[0]}, type)};
  call.problem.grad_sample = grad.stride(0);
  call.problem.weight = call.weight.mutable_data_ptr();
  call.problem.bias = call.bias.mutable_data_ptr();
  return call;
}

inline SquaredGradsCall linear_call(const Tensor& grad, const Tensor& input) {
  STD_TORCH_CHECK(
      grad.dim() == 3 && input.dim() == 3 && grad.size(0) == input.size(0) && grad.size(1) == input.size(1),
      "expected grad_output [N, T, O] and input [N, T, I]");
  const int64_t out = grad.size(2), in = input.size(2), positions = grad.size(1);
  SquaredGradsProblem p;
  p.samples = grad.size(0);
  p.out_channels = out;
  p.in_channels = in;
  p.output[2] = p.input[2] = positions;
  p.grad = source(grad, "grad_output");
  p.in = source(input, "input");
  p.grad_channel = grad.stride(2);
  p.grad_position[2] = grad.stride(1);
  p.in_sample = input.stride(0);
  p.in_channel = input.stride(2);
  p.in_position[2] = input.stride(1);
  return squared_grads_call(p, grad, input, {out, in});
}

inline SquaredGradsCall conv_call(const Tensor& grad, const Tensor& input, std::vector<int64_t> kernel,
                                  std::vector<int64_t> stride, std::vector<int64_t> padding,
                                  std::vector<int64_t> dilation, int64_t groups) {
  const int64_t dims = static_cast<int64_t>(kernel.size());
  STD_TORCH_CHECK(dims >= 1 && dims <= kMaxDims && stride.size() == kernel.size() &&
                      padding.size() == kernel.size() && dilation.size() == kernel.size(),
                  "expected 1 to 3 spatial dimensions, and a stride, padding and dilation for each");
  STD_TORCH_CHECK(grad.dim() == dims + 2 && input.dim() == dims + 2 && grad.size(0) == input.size(0) &&
                      groups > 0 && grad.size(1) % groups == 0 && input.size(1) % groups == 0,
                  "expected grad_output [N, O, *output] and input [N, C, *size] with ", dims,
                  " spatial dimensions and groups that divide O and C");
  SquaredGradsProblem p;
  p.samples = grad.size(0);
  p.groups = groups;
  p.out_channels = grad.size(1) / groups;
  p.in_channels = input.size(1) / groups;
  p.grad = source(grad, "grad_output");
  p.in = source(input, "input");
  p.grad_channel = grad.stride(1);
  p.in_sample = input.stride(0);
  p.in_channel = input.stride(1);
  std::vector<int64_t> size{grad.size(1), p.in_channels};
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t at = kMaxDims - dims + d, i = d;
    p.kernel[at] = kernel[i];
    p.stride[at] = stride[i];
    p.padding[at] = padding[i];
    p.dilation[at] = dilation[i];
    p.output[at] = grad.size(2 + d);
    p.input[at] = input.size(2 + d);
    p.grad_position[at] = grad.stride(2 + d);
    p.in_position[at] = input.stride(2 + d);
    STD_TORCH_CHECK(kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0,
                    "kernel_size, stride and dilation must be positive, padding not negative");
    const int64_t reach = p.input[at] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
    STD_TORCH_CHECK(reach >= 0 && p.output[at] == reach / stride[i] + 1, "grad_output has spatial size ",
                    p.output[at], " where the convolution gives ", reach / stride[i] + 1);
    size.push_back(kernel[i]);
  }
  return squared_grads_call(p, grad, input, size);
}

inline ClientMatrix client_matrix(const Tensor& x, int64_t params, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3, name, " must be a client matrix [T, K, L]");
  const int64_t tiles = x.size(0), length = x.size(2);
  STD_TORCH_CHECK(
      params >= 0 && tiles * length >= params && (tiles - 1) * length < std::max<int64_t>(params, 1), tiles,
      " tiles of ", length, " do not hold exactly ", params, " parameters");
  return {source(x, name), length, x.stride(0), x.stride(1), x.stride(2)};
}

inline Tensor per_client(const Tensor& x) {
  return torch::stable::new_empty(x, {x.size(1)}, ScalarType::Double);
}

inline double largest(Element element) {
  switch (element) {
    case Element::kFloat64:
      return std::numeric_limits<double>::max();
    case Element::kBFloat16:
      return 0x1.fep127;
    case Element::kFloat16:
      return 65504;
    default:
      return std::numeric_limits<float>::max();
  }
}

inline void check_fishers(const Tensor& updates, const std::optional<Tensor>& fishers,
                          const std::optional<Tensor>& fisher_min, const std::optional<Tensor>& fisher_max) {
  STD_TORCH_CHECK(
      fishers.has_value() == fisher_min.has_value() && fishers.has_value() == fisher_max.has_value(),
      "fishers, fisher_min and fisher_max go together");
  STD_TORCH_CHECK(
      !fishers.has_value() || (fishers->dim() == 3 && fishers->size(0) == updates.size(0) &&
                               fishers->size(1) == updates.size(1) && fishers->size(2) == updates.size(2)),
      "fishers differ in shape from updates");
}

inline std::vector<int64_t> chosen_rows(const Tensor& read, int64_t clients) {
  STD_TORCH_CHECK(
      read.is_cpu() && read.scalar_type() == ScalarType::Bool && read.dim() == 1 && read.size(0) == clients,
      "read must be bool [", clients, "] on the CPU");
  const bool* is_read = static_cast<const bool*>(read.const_data_ptr());
  std::vector<int64_t> rows;
  for (int64_t k = 0; k < clients; ++k)
    if (is_read[k * read.stride(0)]) rows.push_back(k);
  return rows;
}

inline GramTransform gram_transform(const std::string& name) {
  if (name == "update") return GramTransform::kUpdate;
  if (name == "fisher_update") return GramTransform::kFisherUpdate;
  if (name == "reweighted_update") return GramTransform::kReweightedUpdate;
  STD_TORCH_CHECK(name == "fourth_root_fisher", "unknown transform ", name);
  return GramTransform::kFourthRootFisher;
}

// The rows of an int64 tensor [R, 2], if they are ascending, disjoint ranges of the parameters.
inline std::vector<ParamRange> parameter_ranges(const Tensor& ranges, int64_t params) {
  STD_TORCH_CHECK(
      ranges.is_cpu() && ranges.scalar_type() == ScalarType::Long && ranges.dim() == 2 && ranges.size(1) == 2,
      "ranges must be int64 [R, 2] on the CPU");
  const int64_t* from = static_cast<const int64_t*>(ranges.const_data_ptr());
  std::vector<ParamRange> result;
  int64_t end = 0;
  for (int64_t i = 0; i < ranges.size(0); ++i, from += ranges.stride(0)) {
    const int64_t start = from[0], stop = from[ranges.stride(1)];
    STD_TORCH_CHECK(end <= start && start <= stop && stop <= params, "the range [", start, ", ", stop,
                    ") is not an ascending part of the rest of ", params, " parameters");
    result.push_back({start, end = stop});
  }
  return result;
}

}  // namespace fdcr
