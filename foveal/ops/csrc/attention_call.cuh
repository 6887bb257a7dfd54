// Tensors at the door of the attention's kernels.
#pragma once

#include "attention.cuh"
#include "launch.cuh"
#include "window_tensors.h"

namespace foveal::cuda {

inline Parameter parameter(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return {x.data_ptr(), Parameter::float32};
    case ScalarType::Half: return {x.data_ptr(), Parameter::float16};
    case ScalarType::BFloat16: return {x.data_ptr(), Parameter::bfloat16};
    case ScalarType::Double: return {x.data_ptr(), Parameter::float64};
    default: STD_TORCH_CHECK(false, "parameters of aggregated_attention must be floating-point tensors");
  }
}

struct Maps {
  const Tensor &q, &k, &v, &k_pool, &v_pool;
};
struct Parameters {
  const Tensor& scale;
  const std::optional<Tensor>&query_embedding, &window_bias, &positional_tokens, &positional_bias;
};
struct PoolBias {
  const std::optional<Tensor>&table, &rows, &columns;
};

// Whether a call runs on the kernels with the band, which are made for a padded d up to `widest`.
inline bool served_by_band(const Tensor& q, int64_t window_size, int widest) {
  return window_size == 3 && q.scalar_type() != ScalarType::Float && q.size(4) <= widest;
}

// A call as numbers and pointers, and the tensors that they point to.
class Call {
 public:
  Attention problem{};

  Call(const Maps& maps, const Parameters& parameters, const PoolBias& bias, int64_t window_size, bool length_scaled,
       bool normalize, int widest_band) {
    Attention& p = problem;
    const Tensor& q = maps.q;
    p.batch = int(q.size(0)), p.height = int(q.size(1)), p.width = int(q.size(2));
    p.heads = int(q.size(3)), p.d = int(q.size(4));
    p.pool_height = int(maps.k_pool.size(1)), p.pool_width = int(maps.k_pool.size(2));
    p.window_size = int(window_size), p.length_scaled = length_scaled, p.normalize = normalize;
    STD_TORCH_CHECK(p.d <= 128, "a head dimension of ", p.d, " is not served (at most 128)");
    p.q = map(q), p.k = map(maps.k), p.v = map(maps.v), p.k_pool = map(maps.k_pool), p.v_pool = map(maps.v_pool);
    p.scale = dense_parameter(parameters.scale);
    p.query_embedding = dense_parameter(parameters.query_embedding);
    p.window_bias = dense_parameter(parameters.window_bias);
    const bool banded = served_by_band(q, window_size, widest_band);
    p.positional_tokens = dense_parameter(
        banded ? parameters.positional_tokens : dense(parameters.positional_tokens, ScalarType::Float));
    p.positional_bias = dense_parameter(parameters.positional_bias);
    if (!bias.table) return;
    p.table = data<float>(keep(dense(*bias.table, ScalarType::Float)));
    p.table_height = bias.table->size(1), p.table_width = bias.table->size(2);
    p.rows = data<int64_t>(keep(dense(*bias.rows, ScalarType::Long)));
    p.columns = data<int64_t>(keep(dense(*bias.columns, ScalarType::Long)));
  }

  HeadMap map(const Tensor& x) { return head_map(keep(with_dense_rows(x))); }

  Tensor keep(const Tensor& x) {
    kept_.push_back(x);
    return x;
  }

 private:
  Parameter dense_parameter(const std::optional<Tensor>& x) {
    return x ? parameter(keep(torch::stable::contiguous(*x))) : Parameter{};
  }

  std::vector<Tensor> kept_;
};

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

// Calls f(KernelOf<T, D, false>()), D being d padded to one that there are kernels for.
template <class F>
void with_dim(const Tensor& q, const F& f) {
  with_type(q, [&](auto type) {
    using T = typename decltype(type)::type;
    if (q.size(4) <= 24) return f(KernelOf<T, 24, false>());
    if (q.size(4) <= 64) return f(KernelOf<T, 64, false>());
    f(KernelOf<T, 128, false>());
  });
}

// The same for kernels that know the band.
template <int widest, class F>
void with_kernel(const Tensor& q, int64_t window_size, const F& f) {
  if (!served_by_band(q, window_size, widest)) return with_dim(q, f);
  with_type(q, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!is_float<T>) {
      if (q.size(4) <= 24) return f(KernelOf<T, 24, true>());
      if (q.size(4) <= 32) return f(KernelOf<T, 32, true>());
      if constexpr (widest > 32) f(KernelOf<T, widest, true>());
    }
  });
}

}  // namespace foveal::cuda
