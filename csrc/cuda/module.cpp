// The Python module of the CUDA kernels: what was built. Loading it registers the operators of operators.cpp.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#include "operators.h"

bool fdcr::cuda::one_product_allowed() {
  const pybind11::gil_scoped_acquire held;
  const pybind11::object precision =
      pybind11::module_::import("torch").attr("get_float32_matmul_precision")();
  return precision.cast<std::string>() != "highest";
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fdcr_fast: build information. Use fdcr_fast.info() and fdcr_fast.ops.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["cuda"] =
            std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
        info["torch"] = FDCR_TORCH_VERSION;
        info["architectures"] = FDCR_CUDA_ARCHITECTURES;
        return info;
      },
      "CUDA's version, the torch built against, and the architectures compiled for.");
}
