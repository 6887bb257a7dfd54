// Tensors at the door of the attention's kernels.
#pragma once

#include "cuda/attention/launches.cuh"
#include "cuda/launch.cuh"
#include "doors.h"
#include "window_tensors.h"

namespace foveal::cuda {

inline Parameter::Kind kind_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Parameter::float32;
    case ScalarType::Half: return Parameter::float16;
    case ScalarType::BFloat16: return Parameter::bfloat16;
    case ScalarType::Double: return Parameter::float64;
    default: STD_TORCH_CHECK(false, "aggregated_attention takes floating-point tensors");
  }
}

inline Parameter parameter(const Tensor& x) { return {x.data_ptr(), kind_of(x)}; }

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

// A call as numbers and pointers, and the tensors that they point to.
class Call {
 public:
  Attention problem{};

  Call(const Maps& maps, const Parameters& parameters, const PoolBias& bias, int64_t window_size, bool length_scaled,
       bool normalize, int widest_band) {
    Attention& p = problem;
    const Tensor& q = maps.q;
    p.type = kind_of(q);
    STD_TORCH_CHECK(p.type != Parameter::float64, "the kernels of GPUs do not serve float64");
    p.batch = int(q.size(0)), p.height = int(q.size(1)), p.width = int(q.size(2));
    p.heads = int(q.size(3)), p.d = int(q.size(4));
    p.pool_height = int(maps.k_pool.size(1)), p.pool_width = int(maps.k_pool.size(2));
    p.window_size = int(window_size), p.length_scaled = length_scaled, p.normalize = normalize;
    const int64_t cells = std::max(q.size(1) * q.size(2), maps.k_pool.size(1) * maps.k_pool.size(2));
    STD_TORCH_CHECK(cells <= 1 << 30, "maps of ", cells, " cells are not served (at most 2^30)");
    p.q = map(q), p.k = map(maps.k), p.v = map(maps.v), p.k_pool = map(maps.k_pool), p.v_pool = map(maps.v_pool);
    p.scale = dense_parameter(parameters.scale);
    p.query_embedding = dense_parameter(parameters.query_embedding);
    p.window_bias = dense_parameter(parameters.window_bias);
    const bool banded = served_by_band(p, widest_band);
    p.positional_tokens = dense_parameter(
        banded ? parameters.positional_tokens : dense(parameters.positional_tokens, ScalarType::Float));
    p.positional_bias = dense_parameter(parameters.positional_bias);
    if (!bias.table) return;
    p.table = data<float>(keep(dense(*bias.table, ScalarType::Float)));
    const int64_t entries = bias.table->size(1) * bias.table->size(2);
    const int64_t most = std::max({entries, bias.rows->numel(), bias.columns->numel()});
    STD_TORCH_CHECK(most < int64_t(1) << 31, "a pooled bias of ", most, " entries a head is not served");
    p.table_height = int(bias.table->size(1)), p.table_width = int(bias.table->size(2));
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

}  // namespace foveal::cuda
