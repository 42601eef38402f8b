// What the kernels compute, in plain structs: no tensor and no PyTorch header is needed below this line, so
// the same kernels link into the extension, into stand-alone sanitizer builds, and (those of cuda/) into a
// host's emulation of a GPU. Pointers are to memory of the device that computes.
#pragma once

#include <cstdint>

namespace fdcr {

enum class Element : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A strided array of floating numbers of any supported type; strides count elements.
struct Source {
  const void* data = nullptr;
  Element element = Element::kFloat32;
};

inline const void* element_at(const Source& source, int64_t index) {
  const int64_t bytes = source.element == Element::kFloat64 ? 8 : source.element == Element::kFloat32 ? 4 : 2;
  return static_cast<const char*>(source.data) + index * bytes;
}

constexpr int kMaxDims = 3;

// Sum over n of the squares of the per-sample weight gradients of a (grouped) convolution with zero padding.
// A linear layer over T positions is the convolution of T positions with a kernel of one. Unused dimensions
// have size 1.
struct SquaredGradsProblem {
  int64_t samples = 0, groups = 1;
  int64_t out_channels = 0, in_channels = 0;  // of one group
  int64_t output[kMaxDims] = {1, 1, 1}, input[kMaxDims] = {1, 1, 1}, kernel[kMaxDims] = {1, 1, 1};
  int64_t stride[kMaxDims] = {1, 1, 1}, padding[kMaxDims] = {}, dilation[kMaxDims] = {1, 1, 1};
  Source grad;  // [sample, group * out_channels, output...]
  int64_t grad_sample = 0, grad_channel = 0, grad_position[kMaxDims] = {};
  Source in;  // [sample, group * in_channels, input...]
  int64_t in_sample = 0, in_channel = 0, in_position[kMaxDims] = {};
  // Contiguous results: [groups * out_channels, in_channels, kernel...] and [groups *
  // out_channels]; float64 if either source is, else float32.
  void* weight = nullptr;
  void* bias = nullptr;
};

// Strides of an array [sample, position, group, channel, pixel].
struct NormStrides {
  int64_t sample = 0, position = 0, group = 0, channel = 0, pixel = 0;
};

// Sum over n of the squares of the per-sample gradients of a norm layer's scale and shift, one of each per
// channel of every group. Channels and pixels of one position and group share their statistics: the mean, and
// the mean squared distance from it, unless these are given for each channel.
struct SquaredNormGradsProblem {
  int64_t samples = 0, positions = 0, groups = 0, channels = 0, pixels = 0;
  Source grad, in;
  NormStrides grad_stride, in_stride;
  Source mean, variance;  // [group, channel]; data == nullptr: of the data
  int64_t mean_stride[2] = {}, variance_stride[2] = {};
  double eps = 0;
  // Contiguous results [groups * channels]; float64 if grad or in is, else float32.
  void* weight = nullptr;
  void* bias = nullptr;
};

// Sum over n of the squares of the per-sample gradients of a table that was looked up at `indices`.
struct SquaredEmbeddingGradsProblem {
  int64_t samples = 0, tokens = 0, rows = 0, columns = 0;
  Source grad;  // [sample, token, column]
  int64_t grad_sample = 0, grad_token = 0, grad_column = 0;
  const int64_t* indices = nullptr;  // contiguous [samples, tokens], less than rows; negative: no token
  void* result = nullptr;            // contiguous [rows, columns]; float64 if grad is, else float32
};

// Numbers [first, first + size) of vectors that arrive in pieces, one vector after the other.
struct VectorSegment {
  Source source;
  int64_t first = 0, size = 0, stride = 0;
};

// The clients' vectors where they came: number p of client k is number k * params + p of the segments, less
// the base, to whose type it is rounded first.
struct ClientVectors {
  const VectorSegment* segments = nullptr;  // in order, without gaps
  int64_t count = 0;
  Source base;  // [params], in float32 or float64; data == nullptr: none
  int64_t base_stride = 0;
};

// Vectors that are copied into tiles: number p of client k to data[(p / tile_length) * tile_stride + k *
// client_stride + (p % tile_length) * stride].
struct FillRowsProblem {
  ClientVectors vectors;
  int64_t clients = 1, params = 0;
  void* data = nullptr;
  Element element = Element::kFloat32;
  int64_t tile_length = 0, tile_stride = 0, client_stride = 0, stride = 0;
};

// Of numbers as they are kept; NaN in any makes all three NaN.
struct RowStatistics {
  double squared_norm, low, high;
};

// Parameter p of client k is data[(p / tile_length) * tile_stride + k * client_stride + (p % tile_length) *
// stride].
struct ClientMatrix {
  Source source;  // data == nullptr: absent
  int64_t tile_length = 0, tile_stride = 0, client_stride = 0, stride = 0;
};

// Where new parameters go: result[v] = global[v] + a sum, kept within [-limit, limit]; contiguous, float64 if
// global is, else float32.
struct NewParams {
  Source global;
  int64_t global_stride = 0;
  double limit = 0;
  void* result = nullptr;
};

// Scores, the mean, or both.
struct AggregationProblem {
  int64_t clients = 0, params = 0;
  ClientMatrix updates, fishers;
  // In place of both, with the base in float32 or none: rows are float32.
  const ClientVectors *update_vectors = nullptr, *fisher_vectors = nullptr;
  const double* fisher_min = nullptr;  // [clients], null without fishers
  const double* fisher_max = nullptr;
  bool single = false;  // products in float instead of double; the caller knows that nothing overflows

  // Scores of the updates, times their importance with `reweight`; alpha == nullptr for none. Each sum is
  // added to what is there.
  const double* alpha = nullptr;  // [clients]
  bool reweight = false;
  double* distance = nullptr;     // [clients] sum_v (u_v - u_{k,v})^2 with u = sum_k alpha_k u_k
  double* norm = nullptr;         // [clients] sum_v update^2; also without scores, beside the plain mean
  double* mean_square = nullptr;  // sum_v u_v^2

  // The sum of weights[k] * c * update, c = 1 + tanh(importance / 2) with `rescale`, else 1. weights ==
  // nullptr for none.
  const double* weights = nullptr;  // [clients]
  bool rescale = false;
  NewParams to;
  // A client whose alpha and weight are both zero is not read.
};

// For every parameter the mean of `keep` of the rows' values: those in the middle, as many below as above, or
// with `nearest` those nearest to the median, the smaller of two equally near ones.
struct CentralMeanProblem {
  int64_t params = 0;
  ClientMatrix updates;           // finite
  const int64_t* rows = nullptr;  // [row_count]: the clients
  int64_t row_count = 0, keep = 0;
  bool nearest = false;
  NewParams to;
};

// Parameters [start, stop).
struct ParamRange {
  int64_t start, stop;
};

// Sums over some of the parameters of x and of x^2, with x = factors[v] * values[k][v], or values[k][v]^2 in
// its place.
struct MomentsView {
  Source factors;  // [params]; data == nullptr: ones
  int64_t factor_stride;
  bool squares;
  const ParamRange* ranges;  // [count], ascending, disjoint, not beyond the parameters
  int64_t count;
};

struct MomentsProblem {
  int64_t params = 0;
  ClientMatrix values;
  const int64_t* rows = nullptr;  // [row_count]: the clients
  int64_t row_count = 0;
  const MomentsView* views = nullptr;
  int64_t view_count = 0;
};

enum class GramTransform : int { kUpdate, kFisherUpdate, kReweightedUpdate, kFourthRootFisher };

// The rows whose inner products are wanted: a transform of updates and Fishers, over some of the columns.
struct GramView {
  GramTransform transform;
  const ParamRange* ranges;  // [count], ascending, disjoint, not beyond the parameters
  int64_t count;
};

struct GramProblem {
  int64_t params = 0;
  ClientMatrix updates, fishers;       // fishers: null where no view reads them
  const double* fisher_min = nullptr;  // [clients], null where no view reweights
  const double* fisher_max = nullptr;
  const int64_t* rows = nullptr;  // [row_count]: the clients
  int64_t row_count = 0;
  const GramView* views = nullptr;
  int64_t view_count = 0;
  bool single = false;  // products in float, summed in it over short runs of columns, instead of double
};

// A convolution of stride one with zero padding, then pooling and ReLU. A linear layer is the convolution
// whose kernel is as large as its input.
struct NetworkLayer {
  int64_t in_channels = 0, out_channels = 0;
  int64_t input[2] = {}, kernel[2] = {}, padding[2] = {};
  bool pool = false, relu = false;  // the maximum of 2 by 2 pixels; what is left over at the end is dropped
  int64_t weight = 0, bias = -1;    // where they start in the parameters; no bias: -1
};

// Layers one after the other, the last of which gives one pixel of as many channels as there are classes, and
// the cross-entropy of its softmax.
struct NetworkProblem {
  const NetworkLayer* layers = nullptr;
  int64_t layer_count = 0, params_count = 0;
  const float* params = nullptr;
  const float* images = nullptr;  // [image, channel, row, column]
  int64_t image_stride[4] = {};
  const int64_t* rows = nullptr;    // [samples]: their images
  const int64_t* labels = nullptr;  // [samples]: their classes
  int64_t samples = 0;
  // Contiguous results; those that are null are not computed.
  float* outputs = nullptr;  // [samples, classes]
  float* grad =
      nullptr;  // [params]: of the mean loss, or with `squared` the sum of the squares of the samples'
  bool squared = false;
  double* loss = nullptr;  // its mean, where grad is wanted
};

// A convolution of 3 by 3 taps, stride 1 and one pixel of zero padding. Everything is contiguous: images
// [sample, row, column, channel], weights [output, row, column, input]. Channels are multiples of
// kConvChannels.
struct Conv3x3Problem {
  int64_t samples = 0, height = 0, width = 0;
  int64_t in_channels = 0, out_channels = 0;
  const float* input = nullptr;
  const float* weight = nullptr;
  bool transposed = false;  // the weight is that of a convolution whose output's gradient is the input here
  float* output = nullptr;
};

// The gradient at the weight of such a convolution.
struct Conv3x3WeightProblem {
  int64_t samples = 0, height = 0, width = 0;
  int64_t in_channels = 0, out_channels = 0;
  const float* input = nullptr;
  const float* output_grad = nullptr;
  float* weight_grad = nullptr;
};

constexpr int64_t kConvChannels = 16;

// velocity = momentum * velocity + grad + decay * params; params -= rate * velocity
struct SgdProblem {
  int64_t count = 0;
  float* params = nullptr;
  float* velocity = nullptr;
  const float* grad = nullptr;
  float rate = 0, momentum = 0, decay = 0;
  bool first = false;  // velocity holds nothing yet and counts as zero
};

}  // namespace fdcr
