// The kernels of aggregated_attention that are compiled in files of their own: their grids, arguments and launches.
#pragma once

#include "cuda/attention/gradients.cuh"
#include "cuda/stream.cuh"

namespace foveal::cuda {

// The widest padded d whose shared memory every GPU has for the kernels with the band.
constexpr int forward_band = 64, backward_band = 32;

// Whether a call runs on those, being made for a padded d up to `widest`.
inline bool served_by_band(const Attention& p, int widest) {
  return p.window_size == 3 && p.type != Parameter::float32 && p.d <= widest;
}

#if defined(__CUDACC__)
constexpr int64_t enough_blocks = 4096;        // for all multiprocessors: beyond, blocks take several images
constexpr int64_t enough_steps = 4;            // of 64 queries, for a block that walks over queries
constexpr int64_t max_table_sums = 256 << 20;  // bytes of logits' gradients that wait to be added up into the table's
#else  // in tests: so that small inputs take every path
constexpr int64_t enough_blocks = 4, enough_steps = 1, max_table_sums = 32 << 10;
#endif

// A block for every head and tile, each with as many images as leave enough blocks.
struct Grid {
  dim3 blocks;
  int images_per_block;

  explicit Grid(const Attention& p) {
    constexpr int64_t most = 32;
    const int64_t heads_and_tiles = int64_t(p.heads) * p.tiles();
    images_per_block = int(std::clamp<int64_t>(p.batch * heads_and_tiles / enough_blocks, 1, most));
    images_per_block = std::max(images_per_block, int(ceil_div(p.batch, max_blocks)));
    blocks = dim3(unsigned(heads_and_tiles), unsigned(ceil_div(p.batch, images_per_block)));
  }
};

template <class Value, int dim, bool band>
struct KernelOf {
  using T = Value;
  static constexpr int D = dim;
  static constexpr bool banded = band;
};

template <class F>
void with_type(const Attention& p, const F& f) {
  switch (p.type) {
    case Parameter::float16: return f(Type<float16>());
    case Parameter::bfloat16: return f(Type<bfloat16>());
    default: f(Type<float>());
  }
}

// Calls f(KernelOf<T, D, false>()), D being d padded to one that there are kernels for.
template <class F>
void with_dim(const Attention& p, const F& f) {
  with_type(p, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.d <= 24) return f(KernelOf<T, 24, false>());
    if (p.d <= 64) return f(KernelOf<T, 64, false>());
    f(KernelOf<T, 128, false>());
  });
}

// The same with the band, where it serves.
template <int widest, class F>
void with_band(const Attention& p, const F& f) {
  with_type(p, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!is_float<T>) {
      if (p.d <= 24) return f(KernelOf<T, 24, true>());
      if (p.d <= 32) return f(KernelOf<T, 32, true>());
      if constexpr (widest > 32) f(KernelOf<T, widest, true>());
    }
  });
}

template <int widest, class F>
void with_kernel(const Attention& p, const F& f) {
  if (served_by_band(p, widest)) with_band<widest>(p, f);
  else with_dim(p, f);
}

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
  HeadMap grad;
  QueryStatistics statistics;
  float* parameter_parts;  // (heads, parts, ParameterGradients)
};

void launch_forward(const Stream&, const Attention&, const HeadMap& out, float* lse);
void launch_query_gradients(const Stream&, dim3 blocks, const Attention&, const QueryGradients&);
void launch_plain_query_gradients(const Stream&, dim3 blocks, const Attention&, const QueryGradients&);
void launch_key_gradients(const Stream&, const Grid&, const Attention&, const KeyGradients&);
void launch_plain_key_gradients(const Stream&, const Grid&, const Attention&, const KeyGradients&);
void launch_pooled_gradients(const Stream&, dim3 blocks, const Attention&, const PooledGradients&);
void launch_window_parameter_gradients(const Stream&, dim3 blocks, const Attention&, const WindowParameterGradients&);

}  // namespace foveal::cuda
