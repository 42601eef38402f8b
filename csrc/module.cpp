// The Python module: what was built, what the processor supports, which kernels are in use. The operators are
// in a library of their own, which knows nothing of Python; this is all that is compiled anew for each.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace {

std::vector<const fdcr::Kernels*> compiled() {
  const fdcr::Kernels* table[8];
  return {table, table + fdcr::compiled_kernels(table, 8)};
}

std::vector<std::string> simd_levels(bool only_supported) {
  std::vector<std::string> names;
  for (const fdcr::Kernels* candidate : compiled())
    if (!only_supported || fdcr::supported(*candidate)) names.emplace_back(candidate->name);
  return names;
}

std::string compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#else
  return "GCC " __VERSION__;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Compiled kernels of fdcr_fast: build and CPU information. Use fdcr_fast.info() and fdcr_fast.ops.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = compiler();
        info["torch"] = FDCR_TORCH_VERSION;
        info["simd_levels"] = simd_levels(false);
        return info;
      },
      "Compiler, the torch built against, and the instruction sets compiled.");
  m.def(
      "cpu_features", [] { return simd_levels(true); },
      "The compiled instruction sets that this processor runs.");
  m.def("simd_level", [] { return std::string(fdcr::kernels().name); }, "The instruction set in use.");
  m.def(
      "set_simd_level", [](const std::string& name) { fdcr::select_kernels(name.c_str()); },
      pybind11::arg("name"),
      "Use another instruction set from now on; raises ValueError where it is unknown or not supported.");
}
