// The CPU operators of convolutions of 3 by 3 taps; see operators.cpp.
#include <cstdint>

#include "cpu/kernels.h"
#include "tensors.h"
#include "torch_pool.h"

namespace {

using fdcr::floats;
using fdcr::ScalarType;
using fdcr::Tensor;

Tensor checked(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() == 4, name,
                  " must be float32 of four dimensions on the CPU");
  return fdcr::dense(x);
}

const float* numbers(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }

void check_channels(int64_t channels) {
  STD_TORCH_CHECK(channels > 0 && channels % fdcr::kConvChannels == 0, "channels must be multiples of ",
                  fdcr::kConvChannels, ", got ", channels);
}

// Images of the size of a problem.
template <class Problem>
Problem problem_of(const Tensor& images, int64_t in_channels, int64_t out_channels) {
  check_channels(in_channels);
  check_channels(out_channels);
  Problem p;
  p.samples = images.size(0);
  p.height = images.size(1);
  p.width = images.size(2);
  p.in_channels = in_channels;
  p.out_channels = out_channels;
  return p;
}

Tensor convolved(const Tensor& images, const Tensor& filters, bool transposed) {
  const Tensor input = checked(images, "images"), weight = checked(filters, "weight");
  const int64_t in = weight.size(transposed ? 0 : 3), out = weight.size(transposed ? 3 : 0);
  STD_TORCH_CHECK(weight.size(1) == 3 && weight.size(2) == 3 && input.size(3) == in,
                  "weight must be [O, 3, 3, I] with the channels of the images");
  auto p = problem_of<fdcr::Conv3x3Problem>(input, in, out);
  Tensor result = torch::stable::new_empty(input, {p.samples, p.height, p.width, out});
  p.input = numbers(input);
  p.weight = numbers(weight);
  p.transposed = transposed;
  p.output = floats(result);
  fdcr::kernels().conv3x3(p, fdcr::torch_pool);
  return result;
}

Tensor conv3x3(const Tensor& input, const Tensor& weight) { return convolved(input, weight, false); }

Tensor conv3x3_input_grad(const Tensor& output_grad, const Tensor& weight) {
  return convolved(output_grad, weight, true);
}

Tensor conv3x3_weight_grad(const Tensor& output_grad, const Tensor& input) {
  const Tensor grad = checked(output_grad, "output_grad"), images = checked(input, "input");
  const int64_t in = images.size(3), out = grad.size(3);
  STD_TORCH_CHECK(
      grad.size(0) == images.size(0) && grad.size(1) == images.size(1) && grad.size(2) == images.size(2),
      "output_grad and input must have the same samples and pixels");
  auto p = problem_of<fdcr::Conv3x3WeightProblem>(images, in, out);
  Tensor result = torch::stable::new_empty(images, {out, 3, 3, in});
  p.input = numbers(images);
  p.output_grad = numbers(grad);
  p.weight_grad = floats(result);
  fdcr::kernels().conv3x3_weight_grad(p, fdcr::torch_pool);
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(fdcr_fast, CPU, library) {
  library.impl("conv3x3", TORCH_BOX(&conv3x3));
  library.impl("conv3x3_input_grad", TORCH_BOX(&conv3x3_input_grad));
  library.impl("conv3x3_weight_grad", TORCH_BOX(&conv3x3_weight_grad));
}

}  // namespace
