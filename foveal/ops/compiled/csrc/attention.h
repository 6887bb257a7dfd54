// aggregated_attention: one call as plain numbers and pointers, and the arithmetic of one query (equations 1-5, 10-14).
#pragma once

#include "window.h"

namespace foveal {

// The table of the pooled bias, laid out so that neighbouring queries of a row read neighbouring entries: query (i, j)
// and key (a, b) of a head meet at table[rows[i * Hp + a] * width + origins[b] + j].
template <class A>
struct BiasTable {
  const A* data;  // (heads, height * width) and room for one more vector; null without a bias
  int64_t height, width;
  const int64_t* rows;
  const int64_t* origins;
};

// A: the type computed in, float for float and bfloat16 maps. Parameters are null where absent.
template <class A>
struct AttentionProblem {
  int64_t batch, height, width, heads, d, pool_height, pool_width, window_size;
  RowParts row_parts;
  bool bfloat16_maps, length_scaled, normalize;
  HeadMap q, k, v, k_pool, v_pool, out;
  A* lse;                      // (B, H, W, heads); null where nobody asks for it
  const A* input_bias;         // (3, heads, d), added to q, k and v
  const A* scale;              // (heads,)
  const A* query_embedding;    // (heads, d)
  const A* window_bias;        // (heads, k * k)
  const A* positional_tokens;  // (heads, k * k, d)
  const A* positional_bias;    // (heads, k * k)
  BiasTable<A> pool_bias;

  FOVEAL_HOST_DEVICE int64_t keys() const { return pool_height * pool_width; }
  FOVEAL_HOST_DEVICE int64_t cells() const { return window_size * window_size; }
  FOVEAL_HOST_DEVICE int64_t radius() const { return window_size / 2; }
  FOVEAL_HOST_DEVICE int64_t parts() const { return row_parts.parts; }
};

// Bit i of `wanted` asks for the gradient of the schema's tensor i.
enum Wanted : int64_t {
  want_q = 1 << 0,
  want_k = 1 << 1,
  want_v = 1 << 2,
  want_k_pool = 1 << 3,
  want_v_pool = 1 << 4,
  want_scale = 1 << 5,
  want_query_embedding = 1 << 6,
  want_window_bias = 1 << 7,
  want_pool_bias = 1 << 8,
  want_positional_tokens = 1 << 11,
  want_positional_bias = 1 << 12,
};

// Where the gradients of one head's parameters lie, one after the other.
struct ParameterGradients {
  int64_t scale, query_embedding, window_bias, positional_tokens, positional_bias, count;

  FOVEAL_HOST_DEVICE ParameterGradients(int64_t d, int64_t cells)
      : scale(0),
        query_embedding(1),
        window_bias(query_embedding + d),
        positional_tokens(window_bias + cells),
        positional_bias(positional_tokens + cells * d),
        count(positional_bias + cells) {}
};

template <class A>
struct AttentionBackward {
  AttentionProblem<A> problem;  // lse is that of forward, out is not used
  int64_t wanted;
  HeadMap grad;
  HeadMap q, k, v, k_pool, v_pool;  // gradients
  // What each part of the rows found, to be added up in order: (heads, parts, ...).
  A* parameter_parts;  // ParameterGradients
  A* pool_bias_parts;  // the table of one head as the kernels read it, and room for one more vector
  // (heads, B + parts - 1, Hp * Wp, d): what part p found for image b is at b + p.
  A* k_pool_parts;  // of the normalised keys; added up by the kernel
  A* v_pool_parts;
};

// Vectors are scaled to unit length by 1 / |x|. One shorter than 1e-12 becomes zero and, by the same factor, passes no
// gradient.
template <class A, class T>
FOVEAL_HOST_DEVICE T normalizing_factor(T norm) {  // T: A or a vector of it
  return norm < A(1e-12) ? T{} : A(1) / norm;
}

}  // namespace foveal

FOVEAL_KERNEL(attention_forward, AttentionProblem<float>)
FOVEAL_KERNEL(attention_forward, AttentionProblem<double>)
FOVEAL_KERNEL(attention_backward, AttentionBackward<float>)
FOVEAL_KERNEL(attention_backward, AttentionBackward<double>)
