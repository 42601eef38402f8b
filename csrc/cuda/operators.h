// What the operators ask the module that they are part of.
#pragma once

namespace fdcr::cuda {

// Whether products of float32 may be one product of TF32, as in PyTorch's own matrix products.
bool one_product_allowed();

}  // namespace fdcr::cuda
