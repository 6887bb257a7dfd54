// The kernels of aggregated_attention's backward that are compiled in files of their own: their arguments and launches.
#pragma once

#include "attention_call.cuh"
#include "attention_gradients.cuh"

namespace foveal::cuda {

// The widest padded d whose shared memory every GPU has.
constexpr int backward_band = 32;

struct QueryGradients {
  int64_t wanted;
  int images_per_block, first_tile, tiles;  // of this launch
  HeadMap grad, q;
  QueryStatistics statistics;
  float* parameter_parts;  // (heads, all tiles, groups of images, ParameterGradients)
  float* table_sums;       // (heads, groups of images, tiles, keys, cells of a tile): the logits' gradients
};

struct KeyGradients {
  int64_t wanted;
  int images_per_block;
  HeadMap grad, k, v;
  QueryStatistics statistics;
};

struct PooledGradients {
  int64_t wanted;
  int parts;
  HeadMap grad, k, v;
  QueryStatistics statistics;
  float *k_parts, *v_parts;  // (parts, B, heads, keys, d), of the normalised keys
};

constexpr int pooled_rows = 16 * warps;  // that a block of pooled_gradients keeps

// Of the window's parameters, where the band does not serve: a block for every head, cell of the window and part of the
// tiles of all images. What it finds lies where ParameterGradients says.
struct WindowParameterGradients {
  int parts;
  HeadMap grad;
  QueryStatistics statistics;
  float* parameter_parts;  // (heads, parts, ParameterGradients)
};

// Of a call on maps like q.
void launch_query_gradients(const Device&, const Tensor& q, dim3 blocks, const Attention&, const QueryGradients&);
void launch_key_gradients(const Device&, const Tensor& q, const Grid&, const Attention&, const KeyGradients&);
void launch_pooled_gradients(const Device&, const Tensor& q, dim3 blocks, const Attention&, const PooledGradients&);
void launch_window_parameter_gradients(const Device&, const Tensor& q, dim3 blocks, const Attention&,
                                       const WindowParameterGradients&);

}  // namespace foveal::cuda
