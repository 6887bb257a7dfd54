// aggregated_attention, backward: what its kernels share. Everything is recomputed from q, k, v and the log-sum-exp.
//
// With w the weights of the softmax, m = w + q^ . T + bT those of the window, and g the upstream gradient:
//   dm = dw = g . v,  ds = w (dw - sum of w dw),  and the positional path takes dm as it is.
// ds is summed in three ways, each by a kernel of its own, and every sum has one order, so runs repeat bit for bit:
//   over the keys of a query: q and its parameters (query_gradients, which comes first and leaves the sum of w dw);
//   over the queries whose windows hold a key: k, v (key_gradients);  over all queries: pooled k, v (pooled_gradients);
//   over images, by query_gradients too, then over all pairs that share an entry of the table (table_gradient).
// The log-sum-exp is rounded, so the weights are made to add up to 1 again, or an error common to all would remain. The
// sum of w dw is not taken from the result, whose rounding would outweigh all others.
#pragma once

#include "cuda/attention/band.cuh"
#include "cuda/attention/plain.cuh"

namespace foveal::cuda {

template <int D>
constexpr int backward_occupancy = D <= 24 ? 3 : 2;

// What query_gradients leaves of a query: 1 / (sum of exp(logit - lse)), and the sum of w dw.
struct alignas(8) Mean {
  float share, product;
};

// A query as its keys see it. Off the map the log-sum-exp is infinite, so that all weights are zero.
struct alignas(8) Query {
  float unit, embedded, product;  // as in QueryScale
  float lse;
  Mean mean;

  template <class T>
  __device__ __forceinline__ float weight(float logit) const { return weight_of<T>(logit, lse) * mean.share; }
};

struct QueryStatistics {
  const float* lse;  // (B, H, W, heads)
  Mean* means;       // the same

  __device__ __forceinline__ static int64_t place(const Attention& p, int image, int i, int j, int head) {
    return ((int64_t(image) * p.height + i) * p.width + j) * p.heads + head;
  }
  __device__ __forceinline__ float lse_of(const Attention& p, int image, int i, int j, int head) const {
    return p.inside(i, j) ? lse[place(p, image, i, j, head)] : infinity;
  }

  // `scale` is that of the head, `unit` 1 / |q|.
  __device__ __forceinline__ Query query(const Attention& p, int image, int i, int j, int head, float scale,
                                         float unit) const {
    if (!p.inside(i, j)) return {unit, 0.0f, 0.0f, infinity, {0.0f, 0.0f}};
    const float embedded = scale * p.length(i, j);
    const int64_t at = place(p, image, i, j, head);
    return {unit, embedded, embedded * unit, lse[at], means[at]};
  }
};

// 1 / |row| as an operand of gradients. In float16, where it would overflow, rows shorter than 2^-14 count as zero.
template <class T>
__device__ __forceinline__ float operand_unit(float unit) {
  if constexpr (std::is_same_v<T, float16>) return unit > 16384.0f ? 0.0f : unit;
  return unit;
}

// From the gradient of x / |x| to that of x, for row r of 16 rows x.
template <class T, int D>
__device__ __forceinline__ void unnormalize(float (&grad)[D / 8][4], const LeftRows<T, D>& rows, int r, float unit) {
  float along = 0;
#pragma unroll
  for (int m = 0; m < D / 8; ++m) {
    const float2 x = rows.pair(r, m);
    along += x.x * grad[m][2 * r] + x.y * grad[m][2 * r + 1];
  }
  along = quad_sum(along) * unit;
#pragma unroll
  for (int m = 0; m < D / 8; ++m) {
    const float2 x = rows.pair(r, m);
    grad[m][2 * r] = (grad[m][2 * r] - x.x * unit * along) * unit;
    grad[m][2 * r + 1] = (grad[m][2 * r + 1] - x.y * unit * along) * unit;
  }
}

template <int D>
__device__ __forceinline__ void unnormalize(Share<D>& grad, const Share<D>& x, float unit) {
  float along = dot<D>(x, grad) * unit;
#pragma unroll
  for (int i = 0; i < D / 4; ++i) grad[i] = (grad[i] - x[i] * unit * along) * unit;
}

// Adds factor * vector to row r, the vector lying in shared memory.
template <int D>
__device__ __forceinline__ void add_vector(float (&sums)[D / 8][4], int r, float factor, const float* vector) {
  add_scaled<D>(sums, r, factor, share_of<D>(vector));
}

template <int D>
__device__ __forceinline__ void load_embedding(float* to, const Attention& p, int head) {
  for (int c = threadIdx.x; c < D; c += threads) {
    to[c] = c < p.d ? p.query_embedding.get(int64_t(head) * p.d + c) : 0.0f;
  }
}

}  // namespace foveal::cuda
