// Chooses the kernels for the processor that runs.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fdcr {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
#endif
namespace baseline {
extern const Kernels kKernels;
}

namespace {

const Kernels* const kCompiled[] = {
#if defined(__x86_64__)
    &avx512::kKernels,
    &avx2::kKernels,
#endif
    &baseline::kKernels,
};

const Kernels& find(const char* name) {
  std::string known;
  for (const Kernels* candidate : kCompiled) {
    if (std::strcmp(candidate->name, name) == 0) {
      if (supported(*candidate)) return *candidate;
      throw std::invalid_argument(std::string("this processor does not support ") + name);
    }
    known += std::string(known.empty() ? "" : ", ") + candidate->name;
  }
  throw std::invalid_argument(std::string("unknown instruction set '") + name + "', expected auto, " + known);
}

const Kernels& widest() {
  for (const Kernels* candidate : kCompiled)
    if (supported(*candidate)) return *candidate;
  return baseline::kKernels;
}

const Kernels& choose(const char* name) { return std::strcmp(name, "auto") == 0 ? widest() : find(name); }

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen{[] {
    const char* wanted = std::getenv("FDCR_FAST_SIMD");
    return &choose(wanted == nullptr ? "auto" : wanted);
  }()};
  return chosen;
}

}  // namespace

bool supported(const Kernels& candidate) {
#if defined(__x86_64__)
  if (&candidate == &avx512::kKernels)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("fma");
  if (&candidate == &avx2::kKernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &candidate == &baseline::kKernels;
}

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

void select_kernels(const char* name) { current().store(&choose(name)); }

int compiled_kernels(const Kernels** table, int capacity) {
  int count = 0;
  for (const Kernels* candidate : kCompiled)
    if (count < capacity) table[count++] = candidate;
  return count;
}

}  // namespace fdcr
