// What the attention's kernels multiply by a warp: rows of a tile in shared memory, 16 at a time, with others.
//
// Results lie as tensor cores leave them: lane 4 g + t holds of 16 rows and 8 columns (g, 2t), (g, 2t + 1), (g + 8, 2t)
// and (g + 8, 2t + 1). Half types are multiplied by tensor cores, float32 by ordinary ones.
#pragma once

#include "cuda/mma.cuh"

namespace foveal::cuda {

constexpr int side = 8;  // of a block's tile
constexpr int warps = 4, threads = 32 * warps;
constexpr int tile_cells = side * side;
constexpr size_t most_shared = 99 << 10;  // bytes that a block may have on every GPU from sm_80 on

__device__ __forceinline__ int warp() { return threadIdx.x / 32; }
__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int group() { return lane() / 4; }
__device__ __forceinline__ int member() { return lane() % 4; }

constexpr unsigned whole_warp = 0xffffffffu;

// 2^x, within 2 units in the last place.
__device__ __forceinline__ float power_of_two(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

template <class A>
__device__ __forceinline__ A quad_sum(A x) {
  x += __shfl_xor_sync(whole_warp, x, 1);
  return x + __shfl_xor_sync(whole_warp, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(whole_warp, x, 1));
  return fmaxf(x, __shfl_xor_sync(whole_warp, x, 2));
}
// Over the lanes of one member of the quads.
__device__ __forceinline__ float group_sum(float x) {
  x += __shfl_xor_sync(whole_warp, x, 4);
  x += __shfl_xor_sync(whole_warp, x, 8);
  return x + __shfl_xor_sync(whole_warp, x, 16);
}

// x, computed where it is used: a loop around keeps nothing that depends on it in registers.
__device__ __forceinline__ int recomputed(int x) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// From one row to the next: an odd number of 16-byte words, so that eight rows lie in different banks.
template <class T, int D>
constexpr int row_stride = (D * int(sizeof(T)) / 16 | 1) * 16 / int(sizeof(T));

// Rows of D values in shared memory.
template <class T, int D, int count>
struct Rows {
  alignas(16) T values[count * row_stride<T, D>];

  __device__ __forceinline__ T* operator[](int n) { return values + n * row_stride<T, D>; }
};

// Whether rows of d values from here on can be moved 16 bytes at a time.
template <class T>
__device__ __forceinline__ bool in_words(const T* data, int64_t strides, int d) {
  return (reinterpret_cast<uintptr_t>(data) | strides) % 16 == 0 && d % (16 / sizeof(T)) == 0;
}

// Starts to fill `count` rows with the d values at from(row), or zeros where that is null, and zeros up to D.
template <class T, int D, class From>
__device__ __forceinline__ void start_rows(T* rows, int count, int d, bool words, const From& from) {
  constexpr int n = 16 / sizeof(T), parts = D / n;
  const int thread = recomputed(threadIdx.x), c = thread % parts * n;
  if (thread >= threads / parts * parts) return;
#pragma unroll 1
  for (int row = thread / parts; row < count; row += threads / parts) {
    const T* source = from(row);
    T* to = rows + row * row_stride<T, D> + c;
    if (source && words && c < d) {
      copy_async<16>(to, source + c);
    } else if (!source || c >= d) {
      Packed<T, n>{}.store(to);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) to[i] = c + i < d ? source[c + i] : T{};
    }
  }
}

// The other way round, 16 rows by a warp.
template <class T, int D, class To>
__device__ __forceinline__ void copy_out(const T* rows, int d, bool words, const To& to) {
  constexpr int n = 16 / sizeof(T), parts = D / n;
#pragma unroll 1
  for (int item = lane(); item < 16 * parts; item += 32) {
    const int row = item / parts, c = item % parts * n;
    T* target = to(row);
    const T* from = rows + row * row_stride<T, D> + c;
    if (!target || c >= d) continue;
    if (words) {
      Packed<T, n>::load(from).store(target + c);
    } else {
      for (int i = 0; i < n && c + i < d; ++i) target[c + i] = from[i];
    }
  }
}

// The blocks m and m + 1 of 8 columns of 16 rows as the left operand of a product; the last of an odd number alone.
template <class T, int D>
__device__ __forceinline__ void load_left(uint32_t (&to)[4], const T* rows, int m) {
  const int block = m + 1 < D / 8 ? m + lane() / 16 : m;
  load_matrices(to, rows + lane() % 16 * row_stride<T, D> + 8 * block);
}

// 16 rows as the left operand of products: a lane's pairs of values are (row g + 8 r, 8 m + 2t and + 1). Short rows of
// half types are kept in registers, others read from shared memory at every use.
template <class T, int D, bool in_registers = !is_float<T> && D <= 64>
struct LeftRows {
  uint32_t blocks[D / 8][2];

  __device__ __forceinline__ explicit LeftRows(const T* rows) {
#pragma unroll
    for (int m = 0; m < D / 8; m += 2) {
      uint32_t to[4];
      load_left<T, D>(to, rows, m);
      blocks[m][0] = to[0], blocks[m][1] = to[1];
      if (m + 1 < D / 8) blocks[m + 1][0] = to[2], blocks[m + 1][1] = to[3];
    }
  }

  __device__ __forceinline__ float2 pair(int r, int m) const { return floats_of(T(), r ? blocks[m][1] : blocks[m][0]); }

  __device__ __forceinline__ void get(uint32_t (&to)[4], int m) const {
    to[0] = blocks[m][0], to[1] = blocks[m][1];
    if (m + 1 < D / 8) to[2] = blocks[m + 1][0], to[3] = blocks[m + 1][1];
  }
};

template <class T, int D>
struct LeftRows<T, D, false> {
  const T* rows;

  __device__ __forceinline__ explicit LeftRows(const T* rows) : rows(rows) {}

  __device__ __forceinline__ float2 pair(int r, int m) const {
    const Floats<2> x = load<2>(rows + (group() + 8 * r) * row_stride<T, D> + 8 * m + 2 * member());
    return {x[0], x[1]};
  }

  __device__ __forceinline__ void get(uint32_t (&to)[4], int m) const { load_left<T, D>(to, rows, m); }
};

// sums += left . right of 16 rows with 8.
template <class T, int D>
__device__ __forceinline__ void multiply(float (&sums)[4], const LeftRows<T, D>& left, const T* right) {
  if constexpr (is_float<T>) {
    const float* rows = left.rows + group() * row_stride<T, D>;
    const float* columns = right + 2 * member() * row_stride<T, D>;
#pragma unroll 2
    for (int c = 0; c < D; c += 4) {
      const Floats<4> a[2] = {load<4>(rows + c), load<4>(rows + 8 * row_stride<T, D> + c)};
      const Floats<4> b[2] = {load<4>(columns + c), load<4>(columns + row_stride<T, D> + c)};
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n] += a[n / 2][i] * b[n % 2][i];
    }
  } else {
#pragma unroll
    for (int first = 0; first < D / 8; first += 4) {
      const int block = first + lane() / 8 < D / 8 ? first + lane() / 8 : D / 8 - 1;
      uint32_t b[4];
      load_matrices(b, right + lane() % 8 * row_stride<T, D> + 8 * block);
#pragma unroll
      for (int i = 0; i < 4 && first + i < D / 8; i += 2) {
        uint32_t a[4];
        left.get(a, first + i);
        if (first + i + 1 < D / 8) mma_16x8x16(T(), sums, a, {b[i], b[i + 1]});
        else mma_16x8x8(T(), sums, {a[0], a[1]}, b[i]);
      }
    }
  }
}

// 16 x 16 weights, as the left operand: of two results of 8 columns, or from rows of shared memory.
template <class T>
struct Weights {
  uint32_t pairs[4];

  static __device__ __forceinline__ Weights of(const float (&first)[4], const float (&second)[4]) {
    return {{pair_of(T(), first[0], first[1]), pair_of(T(), first[2], first[3]), pair_of(T(), second[0], second[1]),
             pair_of(T(), second[2], second[3])}};
  }

  static __device__ __forceinline__ Weights load(const T* rows, int stride) {
    Weights to;
    load_matrices(to.pairs, rows + lane() % 16 * stride + lane() / 16 * 8);
    return to;
  }

  // Row n of the weights is column n of what is loaded.
  static __device__ __forceinline__ Weights load_transposed(const T* rows, int stride) {
    Weights to;
    load_matrices_transposed(to.pairs, rows + (lane() / 16 * 8 + lane() % 8) * stride + lane() / 8 % 2 * 8);
    return to;
  }
};

template <>
struct Weights<float> {
  float columns[2][4];

  static __device__ __forceinline__ Weights of(const float (&first)[4], const float (&second)[4]) {
    Weights to;
#pragma unroll
    for (int n = 0; n < 4; ++n) to.columns[0][n] = first[n], to.columns[1][n] = second[n];
    return to;
  }
};

// sums += weights . rows of 16 weights a row with 16 rows.
template <class T, int D>
__device__ __forceinline__ void weigh(float (&sums)[D / 8][4], const Weights<T>& weights, const T* rows) {
  if constexpr (is_float<T>) {
#pragma unroll D > 24 ? 1 : 4
    for (int source = 0; source < 4; ++source) {  // of the quad's lanes
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float upper = __shfl_sync(whole_warp, weights.columns[n / 2][n % 2], source, 4);
        const float lower = __shfl_sync(whole_warp, weights.columns[n / 2][2 + n % 2], source, 4);
        const T* row = rows + (n / 2 * 8 + 2 * source + n % 2) * row_stride<T, D>;
#pragma unroll
        for (int m = 0; m < D / 8; ++m) {
          const Floats<2> x = load<2>(row + 8 * m + 2 * member());
          sums[m][0] += upper * x[0], sums[m][1] += upper * x[1];
          sums[m][2] += lower * x[0], sums[m][3] += lower * x[1];
        }
      }
    }
  } else {
#pragma unroll
    for (int m = 0; m < D / 8; m += 2) {
      const int block = m + 1 < D / 8 ? m + lane() / 16 : m;
      uint32_t b[4];
      load_matrices_transposed(b, rows + lane() % 16 * row_stride<T, D> + 8 * block);
      mma_16x8x16(T(), sums[m], weights.pairs, {b[0], b[1]});
      if (m + 1 < D / 8) mma_16x8x16(T(), sums[m + 1], weights.pairs, {b[2], b[3]});
    }
  }
}

// Puts a result of 16 rows into shared memory, in the maps' type.
template <class T, int D>
__device__ __forceinline__ void put_rows(T* rows, const float (&values)[D / 8][4]) {
#pragma unroll
  for (int m = 0; m < D / 8; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      store(rows + (group() + 8 * r) * row_stride<T, D> + 8 * m + 2 * member(),
            Floats<2>{values[m][2 * r], values[m][2 * r + 1]});
    }
}

}  // namespace foveal::cuda
