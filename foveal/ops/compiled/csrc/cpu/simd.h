// Vectors of the instruction set being compiled, and what a CPU kernel needs around them.
//
// Everything lives in the namespace of the instruction set and nothing comes from the standard library's templates:
// the linker merges equal inline functions, and must never take one that was compiled for a wider CPU.
#pragma once

#include <stdlib.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "common.h"

#if defined(__AVX512F__)
#define FOVEAL_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FOVEAL_VECTOR_BYTES 32
#else
#define FOVEAL_VECTOR_BYTES 16
#endif
#define FOVEAL_INLINE inline __attribute__((always_inline))

namespace foveal::FOVEAL_ISA {

// S lanes of one vector, for S = float or double.
template <class S>
constexpr int lanes = FOVEAL_VECTOR_BYTES / int(sizeof(S));

template <class S>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(FOVEAL_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(FOVEAL_VECTOR_BYTES)));
};
template <class S>
using Vector = typename VectorOf<S>::type;

typedef uint32_t Bits32 __attribute__((vector_size(FOVEAL_VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(FOVEAL_VECTOR_BYTES / 2)));

template <class A, class B>
FOVEAL_INLINE B least(A a, B b) { return b < a ? b : B(a); }
template <class A, class B>
FOVEAL_INLINE B most(A a, B b) { return a < b ? b : B(a); }

template <class S>
FOVEAL_INLINE Vector<S> broadcast(S x) { return x - Vector<S>{}; }

// load<S>(p): a vector from memory of type S or bfloat16, at any alignment.
template <class S>
FOVEAL_INLINE Vector<S> load(const S* from) {
  Vector<S> result;
  __builtin_memcpy(&result, from, sizeof result);
  return result;
}

template <class S>
FOVEAL_INLINE Vector<S> load(const bfloat16* from) {
  HalfBits half;
  __builtin_memcpy(&half, from, sizeof half);
#if defined(__AVX512F__)
  return (Vector<S>)((Bits32)_mm512_cvtepu16_epi32((__m256i)half) << 16);  // GCC 12 converts in four instructions
#else
  return (Vector<S>)(__builtin_convertvector(half, Bits32) << 16);
#endif
}

template <class S>
FOVEAL_INLINE void store(S* to, Vector<S> x) { __builtin_memcpy(to, &x, sizeof x); }

// bfloat16, in the low half of every lane; rounds to nearest, ties to even; NaN stays NaN.
FOVEAL_INLINE Bits32 rounded(Vector<float> x) {
  const Bits32 bits = (Bits32)x;
  const Bits32 half = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? half : Bits32{} + 0x7fc0;
}

FOVEAL_INLINE void store(bfloat16* to, Vector<float> x) {
  const HalfBits half = __builtin_convertvector(rounded(x), HalfBits);
  __builtin_memcpy(to, &half, sizeof half);
}

// p / q within 2 units in the last place, for finite q; three times as fast as the division where there is AVX-512.
FOVEAL_INLINE Vector<float> divide(Vector<float> p, Vector<float> q) {
#if defined(__AVX512F__)
  const Vector<float> estimate = (Vector<float>)_mm512_rcp14_ps((__m512)q);
  return p * (estimate * (2.0f - q * estimate));
#else
  return p / q;
#endif
}

FOVEAL_INLINE Vector<float> square_root(Vector<float> x) {
  for (int lane = 0; lane < lanes<float>; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
}

FOVEAL_INLINE Vector<double> square_root(Vector<double> x) {
  for (int lane = 0; lane < lanes<double>; ++lane) x[lane] = __builtin_sqrt(x[lane]);
  return x;
}

FOVEAL_INLINE float sum_of_lanes(Vector<float> x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0;
  for (int lane = 0; lane < lanes<float>; ++lane) sum += x[lane];
  return sum;
#endif
}

FOVEAL_INLINE double sum_of_lanes(Vector<double> x) {
  double sum = 0;
  for (int lane = 0; lane < lanes<double>; ++lane) sum += x[lane];
  return sum;
}

// The first `count` lanes alone; the others load as zero.
template <class S, class T>
FOVEAL_INLINE Vector<S> load(const T* from, int64_t count) {
  if (count >= lanes<S>) return load<S>(from);
  T padded[lanes<S>] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return load<S>(padded);
}

template <class T, class V>
FOVEAL_INLINE void store(T* to, V x, int64_t count) {
  constexpr int64_t width = sizeof(V) / sizeof(Compute<T>);
  if (count >= width) return store(to, x);
  T padded[width];
  store(padded, x);
  for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

// Call `body(c, count)` for vectors that cover [0, size). The last one overlaps its neighbour where it can, so a body
// may see an element twice; it is shorter than a vector only if size is.
template <class S, class F>
FOVEAL_INLINE void for_vectors(int64_t size, F&& body) {
  constexpr int64_t step = lanes<S>;
  int64_t c = 0;
  for (; c + step <= size; c += step) body(c, step);
  if (c < size) size > step ? body(size - step, step) : body(int64_t(0), size);
}

// Aligned working memory of one task.
template <class S>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<S*>(aligned_alloc(64, (size * sizeof(S) / 64 + 1) * 64))) {
    if (data_ == nullptr) out_of_memory(size * sizeof(S));
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator S*() const { return data_; }

 private:
  S* data_;
};

// Run `body(begin, end)` over [0, count) on PyTorch's threads.
template <class F>
FOVEAL_INLINE void parallel_for(int64_t count, int64_t grain, F&& body) {
  auto call = [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); };
  run_parallel(count, grain, call, &body);
}

}  // namespace foveal::FOVEAL_ISA
