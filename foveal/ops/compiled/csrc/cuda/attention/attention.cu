// aggregated_attention, forward and backward, from tensors to launches.
#include "cuda/attention/call.cuh"
#include "cuda/attention/parameter_gradients.cuh"

namespace foveal::cuda {
namespace {

constexpr int64_t window_parameters = want_window_bias | want_positional_tokens | want_positional_bias;

std::tuple<Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_pool, const Tensor& v_pool, const Tensor& scale,
    const std::optional<Tensor>& query_embedding, const std::optional<Tensor>& window_bias,
    const std::optional<Tensor>& pool_bias, const std::optional<Tensor>& pool_rows,
    const std::optional<Tensor>& pool_columns, const std::optional<Tensor>& positional_tokens,
    const std::optional<Tensor>& positional_bias, int64_t window_size, bool length_scaled, bool normalize) {
  check_attention(q, k, v, k_pool, v_pool, scale, query_embedding, window_bias, pool_bias, pool_rows, pool_columns,
                  positional_tokens, positional_bias, window_size);
  const Device device(q);
  Tensor out = empty(q, {q.size(0), q.size(1), q.size(2), q.size(3), q.size(4)}, q.scalar_type());
  Tensor lse = empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  const Call call({q, k, v, k_pool, v_pool},
                  {scale, query_embedding, window_bias, positional_tokens, positional_bias},
                  {pool_bias, pool_rows, pool_columns}, window_size, length_scaled, normalize, forward_band);
  launch_forward(device, call.problem, head_map(out), mutable_data<float>(lse));
  return {out, lse};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor>;

class Backward {
 public:
  Backward(const Device& device, Call& call, const Tensor& q, const Tensor& grad, const Tensor& lse, int64_t wanted)
      : device_(device),
        call_(call),
        p_(call.problem),
        q_(q),
        banded_(served_by_band(call.problem, backward_band)),
        wanted_(wanted),
        grad_(call.map(grad)) {
    statistics_.lse = data<float>(call.keep(torch::stable::contiguous(lse)));
    statistics_.means = reinterpret_cast<Mean*>(memory(2 * lse.numel()));
    if (!p_.positional_tokens) wanted_ &= ~want_positional_tokens;
  }

  bool wants(int64_t gradients) const { return wanted_ & gradients; }

  // First of all: the others need the means.
  void queries(const HeadMap& q, Tensor& table_gradient) {
    const Grid grid(p_);
    const int64_t groups = grid.blocks.y, tiles = p_.tiles();
    const int64_t a_tile = p_.heads * groups * p_.keys() * tile_cells;
    const bool table_wanted = p_.table && wants(want_pool_bias);
    const int64_t at_once = table_wanted ? std::clamp<int64_t>(max_table_sums / (4 * a_tile), 1, tiles) : tiles;
    QueryGradients args{wanted_, grid.images_per_block, 0, 0, grad_, q, statistics_, nullptr, nullptr};
    if (wants(want_scale | want_query_embedding) || (banded_ && wants(window_parameters))) {
      const int cells = banded_ ? 9 : 0;
      const int64_t parts = tiles * groups;
      args.parameter_parts = memory(p_.heads * parts * ParameterGradients(p_.d, cells).count);
      from_queries_ = {args.parameter_parts, parts, cells};
    }
    if (table_wanted) {
      args.table_sums = memory(at_once * a_tile);
      start_table(at_once < tiles);
    }
    for (int64_t first = 0; first < tiles; first += at_once) {
      args.first_tile = int(first), args.tiles = int(std::min(at_once, tiles - first));
      const dim3 blocks(unsigned(p_.heads * args.tiles), unsigned(groups));
      launch_query_gradients(device_, blocks, p_, args);
      const bool last = first + at_once >= tiles;
      if (table_wanted) add_to_table(args, int(groups), last ? parameter(table_gradient) : Parameter{});
    }
  }

  void keys(const HeadMap& k, const HeadMap& v) {
    if (!wants(want_k | want_v)) return;
    const Grid grid(p_);
    const KeyGradients args{wanted_, grid.images_per_block, grad_, k, v, statistics_};
    launch_key_gradients(device_, grid, p_, args);
  }

  void pooled(const HeadMap& k, const HeadMap& v) {
    if (!wants(want_k_pool | want_v_pool)) return;
    const int64_t rows = int64_t(p_.batch) * p_.heads * p_.keys();
    const dim3 blocks(unsigned(p_.heads * ceil_div(p_.keys(), pooled_rows)), clamped(p_.batch));
    const int64_t steps = ceil_div(int64_t(p_.height) * p_.width, tile_cells);
    const int64_t wanted_parts = std::max<int64_t>(2048 / (int64_t(blocks.x) * blocks.y), 1);
    const int64_t parts = std::min({wanted_parts, ceil_div(steps, enough_steps), max_blocks});
    PooledGradients args{wanted_, int(parts), grad_, k, v, statistics_, nullptr, nullptr};
    if (wants(want_k_pool)) args.k_parts = memory(parts * rows * p_.d);
    if (wants(want_v_pool)) args.v_parts = memory(parts * rows * p_.d);
    launch_pooled_gradients(device_, dim3(blocks.x, blocks.y, unsigned(parts)), p_, args);
  }

  void window() {
    if (banded_) from_window_ = from_queries_;
    if (banded_ || !wants(window_parameters)) return;
    const int64_t tasks = int64_t(p_.batch) * p_.tiles(), blocks = int64_t(p_.heads) * p_.cells();
    const int64_t parts = std::min({ceil_div(4096, blocks), tasks, max_blocks});
    float* to = memory(p_.heads * parts * ParameterGradients(p_.d, p_.cells()).count);
    from_window_ = {to, parts, p_.cells()};
    const WindowParameterGradients args{grad_, statistics_, to};
    launch_window_parameter_gradients(device_, dim3(unsigned(blocks), unsigned(parts)), p_, args);
  }

  void parameters(ParameterSum args) {
    args.queries = from_queries_, args.window = from_window_;
    if (!wants(want_scale | want_query_embedding | window_parameters)) return;
    const int64_t count = ParameterGradients(p_.d, p_.cells()).count;
    device_.launch(parameter_gradients_sum, dim3(unsigned(ceil_div(count, 32)), unsigned(p_.heads)), dim3(32, sum_rows),
                   sizeof(float[sum_rows][32]), p_, args);
  }

 private:
  float* memory(int64_t size) {
    return static_cast<float*>(call_.keep(empty(q_, {size}, ScalarType::Float)).data_ptr());
  }

  InverseIndex inverse(const int64_t* index, int64_t count, int64_t size) {
    const Tensor memory = call_.keep(empty(q_, {size + 1 + count}, ScalarType::Int));
    int* to = static_cast<int*>(memory.data_ptr());
    const InverseIndex result{to, to + size + 1};
    device_.launch(invert_index, clamped(ceil_div(size + 1, threads)), threads, 0, index, count, size, result);
    return result;
  }

  void start_table(bool in_several) {
    rows_ = inverse(p_.rows, int64_t(p_.height) * p_.pool_height, p_.table_height);
    columns_ = inverse(p_.columns, int64_t(p_.width) * p_.pool_width, p_.table_width);
    if (in_several) table_total_ = memory(int64_t(p_.heads) * p_.table_height * p_.table_width);
  }

  void add_to_table(const QueryGradients& from, int groups, const Parameter& gradient) {
    const TableGradient args{from.table_sums, groups,   from.first_tile, from.tiles,
                             rows_,           columns_, table_total_,    gradient};
    const unsigned columns = unsigned(ceil_div(p_.table_width, threads));
    device_.launch(table_gradient, dim3(columns, clamped(p_.table_height), unsigned(p_.heads)), threads, 0, p_, args);
  }

  const Device& device_;
  Call& call_;
  const Attention& p_;
  const Tensor& q_;
  bool banded_;
  int64_t wanted_;
  HeadMap grad_;
  QueryStatistics statistics_{};
  float* table_total_ = nullptr;
  ParameterParts from_queries_{}, from_window_{};
  InverseIndex rows_{}, columns_{};
};

Gradients attention_gradients(
    const Tensor& grad, const Tensor& /*out*/, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& k_pool, const Tensor& v_pool, const Tensor& scale, const std::optional<Tensor>& query_embedding,
    const std::optional<Tensor>& window_bias, const std::optional<Tensor>& pool_bias,
    const std::optional<Tensor>& pool_rows, const std::optional<Tensor>& pool_columns,
    const std::optional<Tensor>& positional_tokens, const std::optional<Tensor>& positional_bias, int64_t window_size,
    bool length_scaled, bool normalize, int64_t wanted) {
  check_attention(q, k, v, k_pool, v_pool, scale, query_embedding, window_bias, pool_bias, pool_rows, pool_columns,
                  positional_tokens, positional_bias, window_size);
  check_attention_gradient(grad, lse, q);
  const Device device(q);
  const auto gradient_of = [&](const std::optional<Tensor>& x, int64_t want) {
    if (!x || !(wanted & want)) return no_gradient(grad);
    // Without a query every gradient of a parameter is zero.
    return grad.numel() > 0 ? torch::stable::new_empty(*x, x->sizes()) : torch::stable::new_zeros(*x, x->sizes());
  };
  Tensor grad_q = gradient_of(q, want_q), grad_k = gradient_of(k, want_k), grad_v = gradient_of(v, want_v);
  Tensor grad_k_pool = gradient_of(k_pool, want_k_pool), grad_v_pool = gradient_of(v_pool, want_v_pool);
  Tensor grad_scale = gradient_of(scale, want_scale);
  Tensor grad_embedding = gradient_of(query_embedding, want_query_embedding);
  Tensor grad_window_bias = gradient_of(window_bias, want_window_bias);
  Tensor grad_table = gradient_of(pool_bias, want_pool_bias);
  Tensor grad_tokens = gradient_of(positional_tokens, want_positional_tokens);
  Tensor grad_positional_bias = gradient_of(positional_bias, want_positional_bias);

  if (grad.numel() > 0) {
    Call call({q, k, v, k_pool, v_pool}, {scale, query_embedding, window_bias, positional_tokens, positional_bias},
              {pool_bias, pool_rows, pool_columns}, window_size, length_scaled, normalize, backward_band);
    Backward backward(device, call, q, grad, lse, wanted);
    const auto map_of = [](const Tensor& x) { return x.dim() == 5 ? head_map(x) : HeadMap{}; };
    backward.queries(map_of(grad_q), grad_table);
    backward.keys(map_of(grad_k), map_of(grad_v));
    backward.pooled(map_of(grad_k_pool), map_of(grad_v_pool));
    backward.window();
    const auto to = [](const Tensor& x) { return x.numel() > 0 ? parameter(x) : Parameter{}; };
    backward.parameters({{}, {}, to(grad_scale), to(grad_embedding), to(grad_window_bias), to(grad_tokens),
                         to(grad_positional_bias)});
  }
  return {grad_q,           grad_k,     grad_v,          grad_k_pool,       grad_v_pool,
          grad_scale,       grad_embedding, grad_window_bias, grad_table,   no_gradient(grad),
          no_gradient(grad), grad_tokens, grad_positional_bias};
}

}  // namespace
}  // namespace foveal::cuda

FOVEAL_CUDA_LIBRARY(m) {
  m.impl("aggregated_attention", TORCH_BOX(&foveal::cuda::attention));
  m.impl("aggregated_attention_backward", TORCH_BOX(&foveal::cuda::attention_gradients));
}
