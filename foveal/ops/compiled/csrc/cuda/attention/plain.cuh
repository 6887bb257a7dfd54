// Any window on ordinary cores, for what the band does not serve: a quad takes a query and one cell after the other,
// its lanes the channels that are theirs in the products' results (8 m + 2t and + 1), straight from the maps.
#pragma once

#include "cuda/attention/pooled.cuh"

namespace foveal::cuda {

// The lane's channels of a vector.
template <int D>
using Share = Floats<D / 4>;

template <class T, int D>
__device__ __forceinline__ Share<D> share_of(const T* row, int d) {
  Share<D> to;
  const bool pairs = reinterpret_cast<uintptr_t>(row) % (2 * sizeof(T)) == 0;
#pragma unroll
  for (int m = 0; m < D / 8; ++m) {
    const int c = 8 * m + 2 * member();
    Floats<2> x = {};
    if (row && pairs && c + 1 < d) {
      x = load<2>(row + c);
    } else if (row) {
      if (c < d) x[0] = load<1>(row + c)[0];
      if (c + 1 < d) x[1] = load<1>(row + c + 1)[0];
    }
    to[2 * m] = x[0], to[2 * m + 1] = x[1];
  }
  return to;
}

template <class T, int D>
__device__ __forceinline__ void write_share(T* row, int d, const Share<D>& x) {
  const bool pairs = reinterpret_cast<uintptr_t>(row) % (2 * sizeof(T)) == 0;
#pragma unroll
  for (int m = 0; m < D / 8; ++m) {
    const int c = 8 * m + 2 * member();
    if (pairs && c + 1 < d) {
      store(row + c, Floats<2>{x[2 * m], x[2 * m + 1]});
    } else {
      if (c < d) store(row + c, Floats<1>{x[2 * m]});
      if (c + 1 < d) store(row + c + 1, Floats<1>{x[2 * m + 1]});
    }
  }
}

// Of a vector of D in shared memory.
template <int D>
__device__ __forceinline__ Share<D> share_of(const float* vector) {
  Share<D> to;
#pragma unroll
  for (int m = 0; m < D / 8; ++m) {
    const Floats<2> x = load<2>(vector + 8 * m + 2 * member());
    to[2 * m] = x[0], to[2 * m + 1] = x[1];
  }
  return to;
}

// The product of a vector with row r of the lane's two, or with a vector of D in shared memory.
template <class T, int D>
__device__ __forceinline__ float dot(const LeftRows<T, D>& rows, int r, const Share<D>& x) {
  float sum = 0;
#pragma unroll
  for (int m = 0; m < D / 8; ++m) {
    const float2 row = rows.pair(r, m);
    sum += row.x * x[2 * m];
    sum += row.y * x[2 * m + 1];
  }
  return quad_sum(sum);
}

template <class A, int D>
__device__ __forceinline__ float dot(const float* vector, const Share<D>& x) {
  A sum = 0;
#pragma unroll
  for (int m = 0; m < D / 8; ++m) {
    const Floats<2> y = load<2>(vector + 8 * m + 2 * member());
    sum += A(y[0]) * x[2 * m];
    sum += A(y[1]) * x[2 * m + 1];
  }
  return float(quad_sum(sum));
}

template <int D>
__device__ __forceinline__ float dot(const Share<D>& a, const Share<D>& b) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < D / 4; ++i) sum += a[i] * b[i];
  return quad_sum(sum);
}

template <int D>
__device__ __forceinline__ void add_scaled(Share<D>& sums, float factor, const Share<D>& x) {
#pragma unroll
  for (int i = 0; i < D / 4; ++i) sums[i] += factor * x[i];
}

// Calls f(r) with an r that the compiler knows: registers have no index that is found at run time.
template <class F>
__device__ __forceinline__ void with_row(int r, const F& f) {
  if (r == 0) f(0);
  else f(1);
}

// Adds to row r of a result of 16 rows.
template <int D>
__device__ __forceinline__ void add_scaled(float (&sums)[D / 8][4], int r, float factor, const Share<D>& x) {
  with_row(r, [&](int row) {
#pragma unroll
    for (int i = 0; i < D / 4; ++i) sums[i / 2][2 * row + i % 2] += factor * x[i];
  });
}

// The one of the lane's row r.
template <class X>
__device__ __forceinline__ X picked(const X (&pair)[2], int r) {
  return r ? pair[1] : pair[0];
}

// A cell of the window of the lane's row r: number n, at (i, j). `sign` as in BandPlace.
struct NearCell {
  int n, i, j;
  bool inside;

  __device__ __forceinline__ NearCell(const Attention& p, const TilePlace& place, int r, int n, int sign = 1)
      : n(n),
        i(place.row + r + sign * (n / p.window_size - p.radius())),
        j(place.column + sign * (n % p.window_size - p.radius())),
        inside(p.inside(i, j) && p.inside(place.row + r, place.column)) {}

  template <class T, int D>
  __device__ __forceinline__ Share<D> of(const Attention& p, const HeadMap& map, int image, int head) const {
    return share_of<T, D>(inside ? at<T>(map, image, i, j, head) : nullptr, p.d);
  }
};

// The factors of a key.
template <class T, int D>
__device__ __forceinline__ Factors share_factors(const Share<D>& key, const float* query_embedding, bool normalize) {
  const float unit = unit_factor<T>(normalize, dot<D>(key, key));
  return {unit, dot<EmbeddedSum<T>, D>(query_embedding, key) * unit};
}

// A query's positional weight of cell n; q^ is `unit` times the query. Here the tokens are float32.
template <int D>
__device__ __forceinline__ Share<D> token_share(const Attention& p, int head, int n) {
  const float* tokens = static_cast<const float*>(p.positional_tokens.data) + int64_t(head) * p.d * p.cells() + n;
  Share<D> to;
#pragma unroll
  for (int i = 0; i < D / 4; ++i) {
    const int c = i / 2 * 8 + 2 * member() + i % 2;
    to[i] = c < p.d ? tokens[c * p.cells()] : 0.0f;
  }
  return to;
}

// `product` gives the query's product with a share.
template <int D, class Product>
__device__ __forceinline__ float positional_weight(const Attention& p, int head, int n, float unit,
                                                   const Product& product) {
  const float found = p.positional_tokens ? product(token_share<D>(p, head, n)) : 0.0f;
  return found * unit + p.positional_bias.get(int64_t(head) * p.cells() + n);
}

}  // namespace foveal::cuda
