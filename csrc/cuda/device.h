// The device of an operator's tensors: current while the operator runs, and the stream that it puts kernels
// in.
#pragma once

#include "kernels.h"
#include "tensors.h"

#ifdef FDCR_CUDA_ON_HOST
#include "device_on_host.h"
#else

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

// Of the stable ABI; its header declares it only to those who build PyTorch itself.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

#define FDCR_DISPATCH_KEY CUDA

namespace fdcr::cuda {

class Device {
 public:
  explicit Device(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    const int32_t index = tensor.get_device_index();
    int multiprocessors = 0, major = 0;
    const bool known =
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index) == cudaSuccess &&
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) == cudaSuccess;
    STD_TORCH_CHECK(known, "no CUDA device ", index);
    STD_TORCH_CHECK(
        major >= 8,
        "compiled for compute capability 8.0 and above; FDCR_FAST_BACKEND=reference serves others");
    stream.multiprocessors = multiprocessors;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream.handle));
  }

  static bool holds(const Tensor& tensor) {
    return tensor.is_cuda() &&
           tensor.get_device_index() == torch::stable::accelerator::getCurrentDeviceIndex();
  }

  Stream stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace fdcr::cuda

#endif
