// Tiles: one vector holds one channel of consecutive queries of a row, so tile[c * stride + lane] is a transposed piece
// of a map. Norms, softmax and sums of many queries then need no shuffles.
#pragma once

#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "activation.h"
#include "cpu/simd.h"

namespace foveal::FOVEAL_ISA {

#if defined(__AVX512F__)
constexpr int registers = 32;
#else
constexpr int registers = 16;
#endif

constexpr int64_t max_dim = 128;

template <class A>
constexpr int64_t tile_size = max_dim * lanes<A>;

inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// Working memory, handed out piece by piece; without a base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base + used);
    used += round_up(count * int64_t(sizeof(T)), 64);
    return piece;
  }
};

template <int N>
struct Size {
  static constexpr int value = N;
};

template <int Max, class F>
FOVEAL_INLINE void with_size(int64_t size, const F& f) {
  if constexpr (Max > 0) {
    if (size == Max) f(Size<Max>{});
    else with_size<Max - 1>(size, f);
  }
}

// Calls f(Size<N>(), first) over [0, total), cut evenly into as few blocks of at most Max as there can be.
template <int Max, class F>
FOVEAL_INLINE void in_even_blocks(int64_t total, const F& f) {
  const int64_t blocks = (total + Max - 1) / Max;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = total * block / blocks;
    with_size<Max>(total * (block + 1) / blocks - first, [&](auto size) { f(size, first); });
  }
}

// ---- arithmetic of lanes

// The logarithm of finite numbers >= 1, within 2 units in the last place: that of the power of two, plus a minimax
// polynomial of the rest, which lies in [sqrt(1/2), sqrt(2)).
FOVEAL_INLINE Vector<float> logarithm(Vector<float> x) {
  typedef int32_t Integers __attribute__((vector_size(FOVEAL_VECTOR_BYTES)));
  const Integers exponent = ((Integers)x - 0x3f3504f3) >> 23;
  const Vector<float> m = (Vector<float>)((Integers)x - (exponent << 23)) - 1.0f;
  const Vector<float> e = __builtin_convertvector(exponent, Vector<float>);
  Vector<float> p = 7.0376836292e-2f * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = (p * m - 0.5f) * (m * m) - 2.12194440e-4f * e;
  return x == x ? p + m + 0.693359375f * e : x;
}

FOVEAL_INLINE Vector<double> logarithm(Vector<double> x) {
  for (int lane = 0; lane < lanes<double>; ++lane) x[lane] = __builtin_log(x[lane]);
  return x;
}

// ---- products of a tile with rows of keys or values

// Rows that all lanes share: pooled keys or values, positional tokens. (count, d)
template <class A>
struct SharedRows {
  const A* data;
  int64_t d;

  FOVEAL_INLINE Vector<A> at(int64_t n, int64_t c) const { return broadcast(data[n * d + c]); }
};

// Rows of which every lane has its own: the cells of its window, each a shifted view of transposed map rows.
template <class A>
struct WindowRows {
  const A* const* cells;
  int64_t stride;

  FOVEAL_INLINE Vector<A> at(int64_t n, int64_t c) const { return load(cells[n] + c * stride); }
};

// sums[n] += tile . rows[first + n]
template <int N, class A, class Rows>
FOVEAL_INLINE void dot(const A* tile, int64_t stride, int64_t d, const Rows& rows, int64_t first, Vector<A> (&sums)[N]) {
  for (int64_t c = 0; c < d; ++c) {
    const Vector<A> x = load(tile + c * stride);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sums[n] += x * rows.at(first + n, c);
  }
}

// tile += sum over n of weights[n] * rows[n]; blocks of channels stay in registers.
template <int D, class A>
FOVEAL_INLINE void accumulate(const A* weights, int64_t count, const SharedRows<A>& rows, A* tile) {
  constexpr int block = registers == 32 && D == 24 ? 12 : 8;
  in_even_blocks<block>(D ? D : rows.d, [&](auto size, int64_t first) {
    constexpr int N = decltype(size)::value;
    A* channels = tile + first * lanes<A>;
    Vector<A> sums[N];
#pragma GCC unroll 16
    for (int c = 0; c < N; ++c) sums[c] = load(channels + c * lanes<A>);
    for (int64_t n = 0; n < count; ++n) {
      const Vector<A> weight = load(weights + n * lanes<A>);
#pragma GCC unroll 16
      for (int c = 0; c < N; ++c) sums[c] += weight * rows.at(n, first + c);
    }
#pragma GCC unroll 16
    for (int c = 0; c < N; ++c) store(channels + c * lanes<A>, sums[c]);
  });
}

// The same over windows, of which the weights too may be shifted views; here blocks of weights stay in registers.
template <class A>
__attribute__((noinline)) void accumulate(const A* const* weights, int64_t count, const WindowRows<A>& rows, int64_t d, A* tile) {
  in_even_blocks<9>(count, [&](auto size, int64_t first) {
    constexpr int N = decltype(size)::value;
    Vector<A> weight[N];
    const A* cell[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      weight[n] = load(weights[first + n]);
      cell[n] = rows.cells[first + n];
    }
    for (int64_t c = 0; c < d; ++c) {
      Vector<A> sum = load(tile + c * lanes<A>);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sum += weight[n] * load(cell[n] + c * rows.stride);
      store(tile + c * lanes<A>, sum);
    }
  });
}

// sums[n] += sum over lanes of weights[n][lane] * rows[lane], for products that outlive the tile. Rows and sums are
// row-major, padded to whole vectors.
template <class A>
__attribute__((noinline)) void accumulate_lanes(const A* weights, int64_t count, const A* rows, int64_t padded_d,
                                                A* sums) {
  in_even_blocks<2>(padded_d / lanes<A>, [&](auto vectors, int64_t first_vector) {
    constexpr int V = decltype(vectors)::value;
    in_even_blocks<registers / 4>(count, [&](auto size, int64_t first) {
      constexpr int N = decltype(size)::value;
      const A* from = rows + first_vector * lanes<A>;
      const A* weight = weights + first * lanes<A>;
      A* to = sums + first * padded_d + first_vector * lanes<A>;
      Vector<A> sum[N][V];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sum[n][v] = load(to + n * padded_d + v * lanes<A>);
      for (int lane = 0; lane < lanes<A>; ++lane) {
        Vector<A> row[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) row[v] = load(from + lane * padded_d + v * lanes<A>);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
          const Vector<A> factor = broadcast(weight[n * lanes<A> + lane]);
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) sum[n][v] += factor * row[v];
        }
      }
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) store(to + n * padded_d + v * lanes<A>, sum[n][v]);
    });
  });
}

// ---- between tiles and rows of memory

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FOVEAL_CAN_SHUFFLE 1
#endif
#endif

template <class T>
constexpr int64_t quad = 16 / sizeof(T);

// Of d channels, those that move in quads of 16 bytes; the others move one by one.
template <class T, class A>
FOVEAL_INLINE int64_t in_quads(int64_t d) {
#if defined(FOVEAL_CAN_SHUFFLE)
  if (sizeof(A) == sizeof(float)) return d / quad<T> * quad<T>;
#endif
  return 0;
}

#if defined(FOVEAL_CAN_SHUFFLE)

// 16 bytes of each of lanes<float> rows, a quad each; row 4 q + r is quad q of the vector for `rows + r`.
template <class T>
FOVEAL_INLINE Vector<float> load_quads(const T* const* rows, int64_t c) {
  const auto at = [&](int64_t row) { return reinterpret_cast<const float*>(rows[row] + c); };
#if defined(__AVX512F__)
  __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(at(0)));
  x = _mm512_insertf32x4(x, _mm_loadu_ps(at(4)), 1);
  x = _mm512_insertf32x4(x, _mm_loadu_ps(at(8)), 2);
  return (Vector<float>)_mm512_insertf32x4(x, _mm_loadu_ps(at(12)), 3);
#elif defined(__AVX2__)
  const __m256 x = _mm256_castps128_ps256(_mm_loadu_ps(at(0)));
  return (Vector<float>)_mm256_insertf128_ps(x, _mm_loadu_ps(at(4)), 1);
#else
  return load(at(0));
#endif
}

template <class T>
FOVEAL_INLINE void store_quads(T* const* rows, int64_t c, Vector<float> x) {
  const auto at = [&](int64_t row) { return reinterpret_cast<float*>(rows[row] + c); };
#if defined(__AVX512F__)
  _mm_storeu_ps(at(0), _mm512_castps512_ps128((__m512)x));
  _mm_storeu_ps(at(4), _mm512_extractf32x4_ps((__m512)x, 1));
  _mm_storeu_ps(at(8), _mm512_extractf32x4_ps((__m512)x, 2));
  _mm_storeu_ps(at(12), _mm512_extractf32x4_ps((__m512)x, 3));
#elif defined(__AVX2__)
  _mm_storeu_ps(at(0), _mm256_castps256_ps128((__m256)x));
  _mm_storeu_ps(at(4), _mm256_extractf128_ps((__m256)x, 1));
#else
  store(at(0), x);
#endif
}

// Transposes the 4 x 4 blocks of four vectors.
template <int... I>
FOVEAL_INLINE void transpose_quads(Vector<float> (&x)[4], std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  const auto low = [](auto a, auto b) { return __builtin_shufflevector(a, b, ((I & ~3) + I % 4 / 2 + I % 2 * n)...); };
  const auto high = [](auto a, auto b) {
    return __builtin_shufflevector(a, b, ((I & ~3) + 2 + I % 4 / 2 + I % 2 * n)...);
  };
  const Vector<float> a = low(x[0], x[2]), b = low(x[1], x[3]), c = high(x[0], x[2]), d = high(x[1], x[3]);
  x[0] = low(a, b);
  x[1] = high(a, b);
  x[2] = low(c, d);
  x[3] = high(c, d);
}

#endif

struct AsItIs {
  template <class V>
  FOVEAL_INLINE V operator()(int64_t, V x) const { return x; }
};

// rows[lane][c] to tile[c * stride + lane], and back. T: A, or bfloat16, of which a quad holds four pairs of channels.
// `finish(c, lanes of channel c)` is what becomes of a channel on its way.
template <class T, class A, class F = AsItIs>
FOVEAL_INLINE void rows_to_tile(const T* const* rows, int64_t d, A* tile, int64_t stride, const F& finish = {}) {
  const int64_t whole = in_quads<T, A>(d);
#if defined(FOVEAL_CAN_SHUFFLE)
  for (int64_t c = 0; c < whole; c += quad<T>) {
    Vector<float> x[4];
    for (int r = 0; r < 4; ++r) x[r] = load_quads(rows + r, c);
    transpose_quads(x, std::make_integer_sequence<int, lanes<float>>{});
    for (int r = 0; r < 4; ++r) {
      if constexpr (sizeof(T) == sizeof(float)) {
        store(tile + (c + r) * stride, finish(c + r, x[r]));
      } else if constexpr (sizeof(T) < sizeof(float)) {
        const int64_t even = c + 2 * r, odd = even + 1;
        store(tile + even * stride, finish(even, (Vector<float>)((Bits32)x[r] << 16)));
        store(tile + odd * stride, finish(odd, (Vector<float>)((Bits32)x[r] & 0xffff0000)));
      }
    }
  }
#endif
  for (int64_t c = whole; c < d; ++c) {
    T column[lanes<A>];
    for (int lane = 0; lane < lanes<A>; ++lane) column[lane] = rows[lane][c];
    store(tile + c * stride, finish(c, load<A>(column)));
  }
}

template <class T, class A>
FOVEAL_INLINE void tile_to_rows(const A* tile, int64_t stride, int64_t d, T* const* rows) {
  const int64_t whole = in_quads<T, A>(d);
#if defined(FOVEAL_CAN_SHUFFLE)
  for (int64_t c = 0; c < whole; c += quad<T>) {
    Vector<float> x[4];
    for (int r = 0; r < 4; ++r) {
      if constexpr (sizeof(T) == sizeof(float)) {
        x[r] = load(tile + (c + r) * stride);
      } else if constexpr (sizeof(T) < sizeof(float)) {
        const Bits32 even = rounded(load(tile + (c + 2 * r) * stride));
        x[r] = (Vector<float>)(even | rounded(load(tile + (c + 2 * r + 1) * stride)) << 16);
      }
    }
    transpose_quads(x, std::make_integer_sequence<int, lanes<float>>{});
    for (int r = 0; r < 4; ++r) store_quads(rows + r, c, x[r]);
  }
#endif
  for (int64_t c = whole; c < d; ++c) {
    T column[lanes<A>];
    store(column, load(tile + c * stride));
    for (int lane = 0; lane < lanes<A>; ++lane) rows[lane][c] = column[lane];
  }
}

// d channels of one pixel, to and from the type computed in.
template <class A>
FOVEAL_INLINE void read_pixel(const char* from, bool is_bfloat16, int64_t d, A* to) {
  if (d == 0) return;  // from nowhere
  if constexpr (sizeof(A) == sizeof(float)) {
    if (is_bfloat16) {
      const bfloat16* half = reinterpret_cast<const bfloat16*>(from);
      return for_vectors<A>(d, [&](int64_t c, int64_t n) { store(to + c, load<A>(half + c, n), n); });
    }
  }
  __builtin_memcpy(to, from, d * sizeof(A));
}

template <class A>
FOVEAL_INLINE void write_pixel(const A* from, bool is_bfloat16, int64_t d, char* to) {
  if constexpr (sizeof(A) == sizeof(float)) {
    if (is_bfloat16) {
      bfloat16* half = reinterpret_cast<bfloat16*>(to);
      return for_vectors<A>(d, [&](int64_t c, int64_t n) { store(half + c, load<A>(from + c, n), n); });
    }
  }
  __builtin_memcpy(to, from, d * sizeof(A));
}

}  // namespace foveal::FOVEAL_ISA
