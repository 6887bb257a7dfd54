// What a kernel may use of a GPU: CUDA's own names and the few below. Tests compile kernels for the host with an
// emulator of the same names (tests/ops/cuda_emulator).
//
// A kernel keeps what its block shares in one struct, `Shared& s = shared_memory<Shared>()`, and is launched with its
// size; it states its block's threads and how many blocks a multiprocessor is meant to hold: FOVEAL_OCCUPANCY.
#pragma once

#include "common.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "emulated_cuda.h"
#endif

// CI checks that the registers leave room for it, and that nothing spills.
#define FOVEAL_OCCUPANCY(threads, blocks) __launch_bounds__(threads, blocks)

namespace foveal::cuda {

#if defined(__CUDACC__)

template <class Shared>
__device__ __forceinline__ Shared& shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return *reinterpret_cast<Shared*>(memory);
}

// Memory as something else of a size that divides the address.
template <class To, class From>
__device__ __forceinline__ To* as(From* from) {
  return reinterpret_cast<To*>(from);
}

// Two neighbouring values of a half type, the first in the low bits, and as floats.
__device__ __forceinline__ float2 floats_of(bfloat16, uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
__device__ __forceinline__ float2 floats_of(float16, uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
__device__ __forceinline__ uint32_t pair_of(bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pair_of(float16, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

#endif

// p / q within 2 units in the last place.
__device__ __forceinline__ float divide(float p, float q) { return __fdividef(p, q); }

// n values in registers, as floats.
template <int n>
struct Floats {
  float values[n];

  __device__ __forceinline__ float& operator[](int i) { return values[i]; }
  __device__ __forceinline__ float operator[](int i) const { return values[i]; }
};

template <class T>
constexpr bool is_float = false;
template <>
inline constexpr bool is_float<float> = true;

template <int bytes>
struct WordOf {
  using type = uint32_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};

// n values (1 or an even number) of a stored type, moved by one instruction: at most 16 bytes, at an address that their
// size divides. Packed{} holds zeros.
template <class T, int n>
struct alignas(n * sizeof(T)) Packed {
  using Word = typename WordOf<n * sizeof(T)>::type;
  Word words[n * sizeof(T) / sizeof(Word)];

  static __device__ __forceinline__ Packed load(const T* from) { return *as<const Packed>(from); }
  __device__ __forceinline__ void store(T* to) const { *as<Packed>(to) = *this; }

  __device__ __forceinline__ Floats<n> floats() const {
    Floats<n> to;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if constexpr (is_float<T>) {
        to[i] = __uint_as_float(words[i]);
      } else {
        const float2 pair = floats_of(T(), words[i / 2]);
        to[i] = i % 2 ? pair.y : pair.x;
      }
    }
    return to;
  }

  // Rounds to nearest.
  static __device__ __forceinline__ Packed of(const Floats<n>& from) {
    Packed to;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if constexpr (is_float<T>) {
        to.words[i] = __float_as_uint(from[i]);
      } else if (i % 2 == 0) {
        to.words[i / 2] = Word(pair_of(T(), from[i], i + 1 < n ? from[i + 1 < n ? i + 1 : i] : 0.0f));
      }
    }
    return to;
  }
};

template <int n, class T>
__device__ __forceinline__ Floats<n> load(const T* from) {
  return Packed<T, n>::load(from).floats();
}

template <int n, class T>
__device__ __forceinline__ void store(T* to, const Floats<n>& from) {
  Packed<T, n>::of(from).store(to);
}

}  // namespace foveal::cuda
