// What csrc/cuda/device.h says of GPUs, for kernels that run on the host: tensors are on the CPU.
#pragma once

#define FDCR_DISPATCH_KEY CPU

namespace fdcr::cuda {

struct Device {
  explicit Device(const Tensor&) {}
  static bool holds(const Tensor& tensor) { return tensor.is_cpu(); }
  Stream stream{nullptr, 2};
};

}  // namespace fdcr::cuda
