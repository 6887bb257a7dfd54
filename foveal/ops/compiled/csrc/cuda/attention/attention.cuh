// aggregated_attention on a GPU: one call as plain numbers and pointers, and what its kernels look up.
//
// A block of 4 warps serves one head and a tile of 8 x 8 cells, a warp 2 rows of 8: the 16 rows of a tensor core's left
// operand. Lane 4 g + t of a warp holds what belongs to the cells (0, g) and (1, g) of its two rows, shared by the four
// lanes of a quad, t = 0 to 3. A block walks over several images, so what depends on the tile alone is read once.
//
// Half types are multiplied by tensor cores as they are stored: norms, scales and biases join the products in float32.
// So nothing is rounded but the operands of products with softmax weights and with their gradients.
#pragma once

#include "attention.h"
#include "cuda/attention/products.cuh"

namespace foveal::cuda {

// A parameter of any floating-point type, read and written as floats. Null where it is absent.
struct Parameter {
  enum Kind { float32, float16, bfloat16, float64 };

  void* data;
  Kind kind;

  FOVEAL_HOST_DEVICE explicit operator bool() const { return data; }

  __device__ __forceinline__ float operator[](int64_t i) const {
    switch (kind) {
      case float32: return static_cast<const float*>(data)[i];
      case float16: return floats_of(foveal::float16(), static_cast<const uint16_t*>(data)[i]).x;
      case bfloat16: return floats_of(foveal::bfloat16(), static_cast<const uint16_t*>(data)[i]).x;
      default: return float(static_cast<const double*>(data)[i]);
    }
  }

  __device__ __forceinline__ void store(int64_t i, float x) const {
    switch (kind) {
      case float32: static_cast<float*>(data)[i] = x; break;
      case float16: static_cast<uint16_t*>(data)[i] = uint16_t(pair_of(foveal::float16(), x, 0.0f)); break;
      case bfloat16: static_cast<uint16_t*>(data)[i] = uint16_t(pair_of(foveal::bfloat16(), x, 0.0f)); break;
      default: static_cast<double*>(data)[i] = x;
    }
  }

  __device__ __forceinline__ float get(int64_t i) const { return data ? (*this)[i] : 0.0f; }
};

struct Attention {
  Parameter::Kind type;  // of the maps
  int batch, height, width, heads, d, pool_height, pool_width, window_size;
  bool length_scaled, normalize;
  HeadMap q, k, v, k_pool, v_pool;
  Parameter scale;              // (heads,)
  Parameter query_embedding;    // (heads, d)
  Parameter window_bias;        // (heads, k * k)
  Parameter positional_tokens;  // (heads, d, k * k)
  Parameter positional_bias;    // (heads, k * k)
  const float* table;           // (heads, table_height, table_width)
  int table_height, table_width;
  const int64_t* rows;     // (height, pool_height)
  const int64_t* columns;  // (width, pool_width)

  FOVEAL_HOST_DEVICE int keys() const { return pool_height * pool_width; }
  FOVEAL_HOST_DEVICE int cells() const { return window_size * window_size; }
  FOVEAL_HOST_DEVICE int radius() const { return window_size / 2; }
  FOVEAL_HOST_DEVICE int tile_columns() const { return (width + side - 1) / side; }
  FOVEAL_HOST_DEVICE int tiles() const { return (height + side - 1) / side * tile_columns(); }

  __device__ __forceinline__ bool inside(int i, int j) const {
    return unsigned(i) < unsigned(height) && unsigned(j) < unsigned(width);
  }

  // The factor of the logits of the query (i, j), beside the scale; 0 off the map.
  __device__ __forceinline__ float length(int i, int j) const {
    if (!inside(i, j)) return 0.0f;
    if (!length_scaled) return 1.0f;
    const int seen = int(cells_inside(i, height, radius())) * int(cells_inside(j, width, radius()));
    return logf(float(seen + keys()));
  }

  // The bias of the query (i, j) and the pooled key (a, b), where there is a table; those beyond the maps' ends get that
  // of the last. An index outside of the table makes NaN: the CPU's kernels raise, which here would wait for the GPU.
  __device__ __forceinline__ float pooled_bias(int head, int i, int j, int a, int b) const {
    i = i < height ? i : height - 1, j = j < width ? j : width - 1, a = a < pool_height ? a : pool_height - 1;
    const int64_t row = rows[i * pool_height + a], column = columns[j * pool_width + b];
    const bool found = uint64_t(row) < unsigned(table_height) && uint64_t(column) < unsigned(table_width);
    const int entry = int(row) * table_width + int(column);
    return found ? table[int64_t(head) * (table_height * table_width) + entry] : __uint_as_float(0x7fc00000);
  }
};

// A place in a grid, walked over in row-major order.
struct Walk {
  int row, column;

  static __device__ __forceinline__ Walk from(int n, int columns) { return {n / columns, n % columns}; }

  __device__ __forceinline__ Walk after(int steps, int columns) const {
    const int end = column + steps % columns, wraps = end >= columns;
    return {row + steps / columns + wraps, wraps ? end - columns : end};
  }
};

// A block's tile, and the lane's cells in it: (row + 0 and 1, column).
struct TilePlace {
  int head, top, left, row, column;

  __device__ __forceinline__ TilePlace(const Attention& p, int number) {
    const int tile = number / p.heads;
    head = number % p.heads;  // the heads of a pixel share sectors of memory: their blocks run together
    top = tile / p.tile_columns() * side;
    left = tile % p.tile_columns() * side;
    row = top + 2 * warp();
    column = left + group();
  }
};

// The factors of a row: 1 / |row| where vectors are scaled to unit length, and that times its product with the query
// embedding. Then q^ . k^ + QE . k^ = q . k * q.unit * k.unit + k.embedded.
struct alignas(8) Factors {
  float unit, embedded;
};

template <class T>
__device__ __forceinline__ float unit_factor(bool normalize, float squares) {
  if (!normalize) return 1.0f;
  if constexpr (is_float<T>) return normalizing_factor<float>(sqrtf(squares));
  return squares < 1e-24f ? 0.0f : rsqrtf(squares);
}

// What the product is summed in. Its error is one for all queries, so it does not vanish among theirs.
template <class T>
using EmbeddedSum = std::conditional_t<is_float<T>, double, float>;

template <class T, int D>
__device__ __forceinline__ Factors row_factors(const T* row, const float* query_embedding, bool normalize) {
  constexpr int n = 16 / sizeof(T);
  EmbeddedSum<T> product = 0;
  float squares = 0;
#pragma unroll (D > 32 ? 4 : D / n)
  for (int c = 0; c < D; c += n) {
    const Floats<n> x = load<n>(row + c);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      squares += x[i] * x[i];
      product += EmbeddedSum<T>(x[i]) * query_embedding[c + i];
    }
  }
  const float unit = unit_factor<T>(normalize, squares);
  return {unit, float(product) * unit};
}

// The same for the lane's two rows of a left operand, without an embedding.
template <class T, int D>
__device__ __forceinline__ void unit_factors(const LeftRows<T, D>& rows, bool normalize, float (&unit)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float squares = 0;
#pragma unroll
    for (int m = 0; m < D / 8; ++m) {
      const float2 x = rows.pair(r, m);
      squares += x.x * x.x + x.y * x.y;
    }
    unit[r] = unit_factor<T>(normalize, quad_sum(squares));
  }
}

}  // namespace foveal::cuda
