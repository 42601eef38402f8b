// Memory for results that are as large as a model, and of which each round makes one.
//
// New memory is zeroed by the system when it is first written to, which takes up to a sixth of a round of
// ten clients. The last result that was let go of is kept for the next one of its size.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "tensors.h"

namespace fdcr {

#if defined(__linux__)

// Mapped memory in pages of 2 MiB, which the system is asked for: it may give others.
class WarmMemory {
 public:
  static constexpr size_t kPage = size_t{2} << 20;

  // Memory for so many bytes, which are anything; null where there is none. To be given back.
  static std::unique_ptr<WarmMemory> take(size_t bytes) {
    const size_t size = (bytes + kPage - 1) / kPage * kPage;
    std::unique_ptr<WarmMemory> memory(spare_.exchange(nullptr));
    if (memory != nullptr && memory->size_ == size) return memory;
    memory.reset(new WarmMemory(size));
    if (memory->data_ == nullptr) return nullptr;
    return memory;
  }

  static void give_back(std::unique_ptr<WarmMemory> memory) { delete spare_.exchange(memory.release()); }

  void* data() const { return data_; }

  ~WarmMemory() {
    if (data_ != nullptr) munmap(data_, size_);
  }
  WarmMemory(const WarmMemory&) = delete;
  WarmMemory& operator=(const WarmMemory&) = delete;

 private:
  // One page more is mapped than asked for, and what lies before and behind whole pages unmapped again.
  explicit WarmMemory(size_t size) : size_(size) {
    void* const mapped =
        mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return;
    char* const begin = static_cast<char*>(mapped);
    const size_t before = (kPage - reinterpret_cast<uintptr_t>(begin) % kPage) % kPage;
    if (before > 0) munmap(begin, before);
    if (before < kPage) munmap(begin + before + size, kPage - before);
    data_ = begin + before;
#if defined(MADV_HUGEPAGE)
    madvise(data_, size, MADV_HUGEPAGE);  // a wish: it may fail
#endif
  }

  void* data_ = nullptr;
  size_t size_;

  // No lock: a process that is forked while another thread holds one could never take it.
  static inline std::atomic<WarmMemory*> spare_{nullptr};
};

#endif

// A vector of numbers that are anything, on the CPU.
inline Tensor warm_vector(const Tensor& like, int64_t size, ScalarType dtype) {
#if defined(__linux__)
  const size_t bytes = static_cast<size_t>(size) * (dtype == ScalarType::Double ? 8 : 4);
  std::unique_ptr<WarmMemory> memory = bytes < WarmMemory::kPage / 2 ? nullptr : WarmMemory::take(bytes);
  if (memory != nullptr) {
    void* const data = memory->data();
    const int64_t stride = 1;
    return torch::stable::from_blob(
        data, {&size, 1}, {&stride, 1}, torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
        [owned = memory.release()](void*) { WarmMemory::give_back(std::unique_ptr<WarmMemory>(owned)); });
  }
#endif
  return torch::stable::new_empty(like, {size}, dtype);
}

}  // namespace fdcr
