// The pooled keys that a tile of queries sees, a chunk at a time.
#pragma once

#include "cuda/attention/attention.cuh"

namespace foveal::cuda {

constexpr float infinity = __builtin_huge_valf();

template <class T>
__device__ __forceinline__ bool in_words(const HeadMap& map, int d) {
  return in_words(reinterpret_cast<const T*>(map.data), map.batch | map.row | map.column | map.head, d);
}

template <class T>
__device__ __forceinline__ T* at(const HeadMap& map, int image, int i, int j, int head) {
  return reinterpret_cast<T*>(map.at(image, i, j, head));
}

// Of a chunk.
template <class T, int D>
constexpr int pooled_keys = D > 64 ? 16 : D > 32 && is_float<T> ? 32 : 64;

template <class T, int D, int keys_at_once = pooled_keys<T, D>>
struct Pooled {
  static constexpr int size = keys_at_once, tiles = size / 8;

  Rows<T, D, size> keys, values;
  Factors factors[size];

  // The keys from `first` on; a barrier later, their factors.
  __device__ __forceinline__ void start(const Attention& p, int image, int head, int first) {
    const auto from = [&](const HeadMap& map) {
      return [&, image, head, first](int row) -> const T* {
        const int n = first + row;
        return n < p.keys() ? at<T>(map, image, n / p.pool_width, n % p.pool_width, head) : nullptr;
      };
    };
    start_rows<T, D>(keys.values, size, p.d, in_words<T>(p.k_pool, p.d), from(p.k_pool));
    start_rows<T, D>(values.values, size, p.d, in_words<T>(p.v_pool, p.d), from(p.v_pool));
  }

  __device__ __forceinline__ void find_factors(const Attention& p, const float* query_embedding) {
    for (int n = threadIdx.x; n < size; n += threads) {
      factors[n] = row_factors<T, D>(keys[n], query_embedding, p.normalize);
    }
  }

  // All of a chunk that is not the first, at a point where nobody reads the one before.
  __device__ __forceinline__ void replace(const Attention& p, int image, int head, int first,
                                          const float* query_embedding) {
    __syncthreads();
    start(p, image, head, first);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    find_factors(p, query_embedding);
    __syncthreads();
  }
};

// put(tile, the biases of the lane's two queries and two keys) for a chunk's tiles; -inf beyond the last key.
template <int tiles, class Put>
__device__ __forceinline__ void for_bias(const Attention& p, const TilePlace& place, int first, const Put& put) {
  Walk walk = Walk::from(first + 2 * member(), p.pool_width);
#pragma unroll
  for (int tile = 0; tile < tiles; ++tile) {
    Floats<4> bias = {};
    if (p.table) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const Walk key = n % 2 ? walk.after(1, p.pool_width) : walk;
        bias[n] = p.pooled_bias(place.head, place.row + n / 2, place.column, key.row, key.column);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (first + 8 * tile + 2 * member() + n % 2 >= p.keys()) bias[n] = -infinity;
    }
    put(tile, bias);
    walk = walk.after(8, p.pool_width);
  }
}

// What the logits of the lane's two queries are scaled by.
struct QueryScale {
  float unit[2], length[2], embedded[2];  // 1 / |q|; by length; of q^ + QE

  __device__ __forceinline__ void set_lengths(const Attention& p, const TilePlace& place) {
    const float scale = p.scale[place.head];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      length[r] = p.length(place.row + r, place.column);
      embedded[r] = scale * length[r];
    }
  }

  template <class T, int D>
  __device__ __forceinline__ void set_units(const LeftRows<T, D>& queries, bool normalize) {
    unit_factors(queries, normalize, unit);
  }

  // Of the product of raw vectors.
  __device__ __forceinline__ float product(int r) const { return embedded[r] * unit[r]; }
};

// Turns the products of raw queries and keys into logits.
__device__ __forceinline__ float logit(float product, float query_product, float query_embedded, const Factors& key,
                                       float bias) {
  return product * query_product * key.unit + (query_embedded * key.embedded + bias);
}

template <class T, int D, int size>
__device__ __forceinline__ void pooled_logits(float (&logits)[4], const LeftRows<T, D>& queries,
                                              const QueryScale& scale, Pooled<T, D, size>& pooled, int tile,
                                              const Floats<4>& bias) {
  float products[4] = {};
  multiply<T, D>(products, queries, pooled.keys[8 * tile]);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const Factors key = pooled.factors[8 * tile + 2 * member() + n % 2];
    logits[n] = logit(products[n], scale.product(n / 2), scale.embedded[n / 2], key, bias[n]);
  }
}

// exp(logit - base), for a logit that is no larger.
template <class T>
__device__ __forceinline__ float weight_of(float logit, float base) {
  if constexpr (is_float<T>) return expf(logit - base);
  constexpr float log2_e = 1.4426950408889634f;
  return power_of_two(fmaf(logit, log2_e, -(base * log2_e)));
}

}  // namespace foveal::cuda
