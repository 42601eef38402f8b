// The CPU operators of small networks; see operators.cpp.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "tensors.h"
#include "torch_pool.h"

namespace {

using fdcr::dense;
using fdcr::floats;
using fdcr::ScalarType;
using fdcr::Tensor;

// A layer as operators get it: the numbers of NetworkLayer in fdcr_fast/ops/networks.py, in their order.
struct LayerNumbers {
  int64_t out_channels;
  int64_t kernel[2];  // 0: as large as the input
  int64_t padding[2];
  int64_t pool, relu, bias;  // 0 or 1
};
constexpr size_t kLayerNumbers = sizeof(LayerNumbers) / sizeof(int64_t);

void check_vector(const Tensor& x, ScalarType type, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == type && x.dim() == 1 && x.is_contiguous(), name,
                  " must be a contiguous vector of ", type == ScalarType::Float ? "float32" : "int64",
                  " on the CPU");
}

// The tensors behind a NetworkProblem; they live as long as this does.
struct Network {
  fdcr::NetworkProblem problem{};
  std::vector<fdcr::NetworkLayer> layers;
  std::vector<int64_t> rows, labels;
  Tensor params;
  int64_t classes = 0;

  Network(const Tensor& given, const Tensor& images, const Tensor& which, const std::vector<int64_t>& numbers)
      : params(dense(given)) {
    check_vector(params, ScalarType::Float, "params");
    STD_TORCH_CHECK(images.is_cpu() && images.scalar_type() == ScalarType::Float && images.dim() == 4,
                    "images must be float32 [M, C, H, W] on the CPU");
    int64_t channels = images.size(1), size[] = {images.size(2), images.size(3)};
    STD_TORCH_CHECK(!numbers.empty() && numbers.size() % kLayerNumbers == 0 && channels > 0,
                    "expected layers of ", kLayerNumbers, " numbers and images that have channels");
    int64_t used = 0;
    for (size_t at = 0; at < numbers.size(); at += kLayerNumbers) {
      LayerNumbers given;
      std::memcpy(&given, numbers.data() + at, sizeof given);
      fdcr::NetworkLayer layer;
      layer.in_channels = channels;
      layer.out_channels = channels = given.out_channels;
      layer.pool = given.pool != 0;
      layer.relu = given.relu != 0;
      int64_t weights = layer.in_channels * layer.out_channels;
      bool fits = channels > 0;
      for (int d = 0; d < 2; ++d) {
        layer.input[d] = size[d];
        layer.kernel[d] = given.kernel[d] == 0 ? size[d] : given.kernel[d];
        layer.padding[d] = given.padding[d];
        weights *= layer.kernel[d];
        size[d] = (size[d] + 2 * layer.padding[d] - layer.kernel[d] + 1) / (layer.pool ? 2 : 1);
        fits = fits && layer.kernel[d] > 0 && layer.padding[d] >= 0 && size[d] > 0;
      }
      layer.weight = used;
      used += weights;
      if (given.bias != 0) {
        layer.bias = used;
        used += channels;
      }
      STD_TORCH_CHECK(fits && used <= params.size(0), "a layer does not fit its input or the parameters");
      layers.push_back(layer);
    }
    STD_TORCH_CHECK(used == params.size(0) && size[0] == 1 && size[1] == 1, "the layers take ", used, " of ",
                    params.size(0), " parameters and end with ", size[0], " by ", size[1], " pixels");
    classes = channels;
    rows = indices(which, images.size(0), "rows");
    problem.layers = layers.data();
    problem.layer_count = static_cast<int64_t>(layers.size());
    problem.params = static_cast<const float*>(params.const_data_ptr());
    problem.params_count = used;
    problem.images = static_cast<const float*>(images.const_data_ptr());
    for (int d = 0; d < 4; ++d) problem.image_stride[d] = images.stride(d);
    problem.rows = rows.data();
    problem.samples = static_cast<int64_t>(rows.size());
  }

  static std::vector<int64_t> indices(const Tensor& x, int64_t end, const char* name) {
    STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Long && x.dim() == 1, name,
                    " must be an int64 vector on the CPU");
    const int64_t* from = static_cast<const int64_t*>(x.const_data_ptr());
    std::vector<int64_t> copy(static_cast<size_t>(x.size(0)));
    for (size_t i = 0; i < copy.size(); ++i) {
      copy[i] = from[static_cast<int64_t>(i) * x.stride(0)];
      STD_TORCH_CHECK(copy[i] >= 0 && copy[i] < end, name, " must be at least 0 and less than ", end,
                      ", got ", copy[i]);
    }
    return copy;
  }

  void set_labels(const Tensor& all) {
    STD_TORCH_CHECK(all.is_cpu() && all.scalar_type() == ScalarType::Long && all.dim() == 1,
                    "labels must be an int64 vector on the CPU");
    const int64_t* from = static_cast<const int64_t*>(all.const_data_ptr());
    for (const int64_t row : rows) {
      STD_TORCH_CHECK(row < all.size(0), "there is no label for image ", row);
      labels.push_back(from[row * all.stride(0)]);
      STD_TORCH_CHECK(labels.back() >= 0 && labels.back() < classes, "label ", labels.back(),
                      " is out of range for ", classes, " classes");
    }
    problem.labels = labels.data();
  }

  Tensor grad(bool squared, double* loss) {
    Tensor result = torch::stable::new_empty(params, {params.size(0)});
    problem.grad = floats(result);
    problem.squared = squared;
    problem.loss = loss;
    fdcr::kernels().network(problem, fdcr::torch_pool);
    return result;
  }
};

Tensor network_outputs(const Tensor& params, const Tensor& images, const Tensor& rows,
                       std::vector<int64_t> layers) {
  Network network(params, images, rows, layers);
  Tensor result = torch::stable::new_empty(params, {rows.size(0), network.classes});
  network.problem.outputs = floats(result);
  fdcr::kernels().network(network.problem, fdcr::torch_pool);
  return result;
}

std::tuple<Tensor, Tensor> network_grad(const Tensor& params, const Tensor& images, const Tensor& labels,
                                        const Tensor& rows, std::vector<int64_t> layers) {
  Network network(params, images, rows, layers);
  network.set_labels(labels);
  double mean = 0;
  Tensor grad = network.grad(false, &mean);
  Tensor loss = torch::stable::new_empty(params, {});
  *floats(loss) = static_cast<float>(mean);
  return {std::move(loss), std::move(grad)};
}

Tensor sum_squared_network_grads(const Tensor& params, const Tensor& images, const Tensor& labels,
                                 const Tensor& rows, std::vector<int64_t> layers) {
  Network network(params, images, rows, layers);
  network.set_labels(labels);
  double mean = 0;
  return network.grad(true, &mean);
}

fdcr::SgdProblem sgd_problem(const Tensor& params, const Tensor& velocity, const Tensor& grad, double lr,
                             double momentum, double weight_decay) {
  check_vector(params, ScalarType::Float, "params");
  check_vector(velocity, ScalarType::Float, "velocity");
  check_vector(grad, ScalarType::Float, "grad");
  STD_TORCH_CHECK(params.size(0) == velocity.size(0) && params.size(0) == grad.size(0),
                  "params, velocity and grad differ in length");
  fdcr::SgdProblem p;
  p.count = params.size(0);
  p.params = floats(params);
  p.velocity = floats(velocity);
  p.grad = static_cast<const float*>(grad.const_data_ptr());
  p.rate = static_cast<float>(lr);
  p.momentum = static_cast<float>(momentum);
  p.decay = static_cast<float>(weight_decay);
  return p;
}

void sgd_step(Tensor params, Tensor velocity, const Tensor& grad, double lr, double momentum,
              double weight_decay) {
  const Tensor from = dense(grad);
  fdcr::kernels().sgd_step(sgd_problem(params, velocity, from, lr, momentum, weight_decay), fdcr::torch_pool);
}

Tensor train_network(const Tensor& params, const Tensor& images, const Tensor& labels, const Tensor& order,
                     std::vector<int64_t> layers, int64_t batch_size, double lr, double momentum,
                     double weight_decay) {
  STD_TORCH_CHECK(order.dim() == 2 && batch_size > 0, "order must be a matrix and batch_size positive");
  Network network(torch::stable::clone(dense(params)), images, torch::stable::flatten(order), layers);
  network.set_labels(labels);
  const Tensor grad = torch::stable::empty_like(network.params);
  const Tensor velocity = torch::stable::empty_like(network.params);
  fdcr::SgdProblem step = sgd_problem(network.params, velocity, grad, lr, momentum, weight_decay);
  step.first = true;
  double loss = 0;
  fdcr::NetworkProblem batch = network.problem;
  batch.grad = floats(grad);
  batch.loss = &loss;
  for (int64_t epoch = 0; epoch < order.size(0); ++epoch)
    for (int64_t at = 0; at < order.size(1); at += batch_size) {
      const int64_t first = epoch * order.size(1) + at;
      batch.rows = network.rows.data() + first;
      batch.labels = network.labels.data() + first;
      batch.samples = std::min(batch_size, order.size(1) - at);
      fdcr::kernels().network(batch, fdcr::torch_pool);
      fdcr::kernels().sgd_step(step, fdcr::torch_pool);
      step.first = false;
    }
  return network.params;
}

STABLE_TORCH_LIBRARY_IMPL(fdcr_fast, CPU, library) {
  library.impl("network_outputs", TORCH_BOX(&network_outputs));
  library.impl("network_grad", TORCH_BOX(&network_grad));
  library.impl("sum_squared_network_grads", TORCH_BOX(&sum_squared_network_grads));
  library.impl("sgd_step", TORCH_BOX(&sgd_step));
  library.impl("train_network", TORCH_BOX(&train_network));
}

}  // namespace
