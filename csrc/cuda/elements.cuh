// Numbers in memory: the types they may have, and where those of a client are.
#pragma once

#include "platform.cuh"

namespace fdcr::cuda {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(Float16 x) { return float16_to_float(x.bits); }
__device__ __forceinline__ float widen(BFloat16 x) {
  union {
    uint32_t bits;
    float value;
  } wide = {static_cast<uint32_t>(x.bits) << 16};
  return wide.value;
}

// To the nearest, of two equally near ones the even one.
__device__ __forceinline__ BFloat16 to_bfloat16(float x) {
  union {
    float value;
    uint32_t bits;
  } wide = {x};
  const uint32_t nearest = (wide.bits + 0x7fff + ((wide.bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(x == x ? nearest : 0x7fc0)};
}

constexpr int size_of(Element element) {
  return element == Element::kFloat64 ? 8 : element == Element::kFloat32 ? 4 : 2;
}

// Number `at` of an array whose type is known at run time.
template <class M>
__device__ __forceinline__ M read_any(const Source& source, int64_t at) {
  switch (source.element) {
    case Element::kFloat64:
      return static_cast<M>(read(static_cast<const double*>(source.data) + at));
    case Element::kBFloat16:
      return static_cast<M>(widen(read(static_cast<const BFloat16*>(source.data) + at)));
    case Element::kFloat16:
      return static_cast<M>(widen(read(static_cast<const Float16*>(source.data) + at)));
    default:
      return static_cast<M>(read(static_cast<const float*>(source.data) + at));
  }
}

// The nearest number of that type, of narrow ones by way of float32, as PyTorch does.
__device__ __forceinline__ void write_any(void* to, Element element, int64_t at, double x) {
  switch (element) {
    case Element::kFloat64:
      return write(static_cast<double*>(to) + at, x);
    case Element::kBFloat16:
      return write(static_cast<BFloat16*>(to) + at, to_bfloat16(static_cast<float>(x)));
    case Element::kFloat16:
      return write(static_cast<Float16*>(to) + at, Float16{float_to_float16(static_cast<float>(x))});
    default:
      return write(static_cast<float*>(to) + at, static_cast<float>(x));
  }
}

// One type, or any: how a number is read where strides are arbitrary.
template <class T>
struct Typed {
  template <class M>
  static __device__ __forceinline__ M load(const Source& source, int64_t at) {
    return static_cast<M>(widen(read(static_cast<const T*>(source.data) + at)));
  }
};

struct Any {
  template <class M>
  static __device__ __forceinline__ M load(const Source& source, int64_t at) {
    return read_any<M>(source, at);
  }
};

// Where parameter v of the first client is.
__device__ __forceinline__ int64_t place(const ClientMatrix& m, int64_t v) {
  return v < m.tile_length ? v * m.stride : v / m.tile_length * m.tile_stride + v % m.tile_length * m.stride;
}

// How kVector parameters of client k are read, of which the first of the first client is at place `at`: in
// one type and 128 bits, whatever lies behind the last parameter;
template <class T>
struct Vectors {
  static constexpr int kVector = 16 / sizeof(T);
  template <class M>
  static __device__ __forceinline__ void load(const ClientMatrix& m, int64_t k, int64_t at,
                                              M (&to)[kVector]) {
    const T* const from = static_cast<const T*>(m.source.data) + at + k * m.client_stride;
    union {
      Bits128 bits;
      T number[kVector];
    } all = {read(reinterpret_cast<const Bits128*>(from))};
#pragma unroll
    for (int i = 0; i < kVector; ++i) to[i] = static_cast<M>(widen(all.number[i]));
  }
};

// or in any type and any strides, one at a time.
struct Singles {
  static constexpr int kVector = 1;

  template <class M>
  static __device__ __forceinline__ void load(const ClientMatrix& m, int64_t k, int64_t at, M (&to)[1]) {
    to[0] = read_any<M>(m.source, at + k * m.client_stride);
  }
};

// Whether vectors of 128 bits are aligned, and never end in another tile or row than they begin in.
inline bool in_vectors(const ClientMatrix& m) {
  const int64_t vector = 16 / size_of(m.source.element);
  return m.stride == 1 && m.tile_length % vector == 0 && m.tile_stride % vector == 0 &&
         m.client_stride % vector == 0 && reinterpret_cast<uintptr_t>(m.source.data) % 16 == 0;
}

}  // namespace fdcr::cuda
