// aggregated_attention: from tensors to one problem in numbers and pointers.
#include "attention.h"

#include <stdexcept>

#include "doors.h"
#include "window_tensors.h"

namespace foveal {
namespace {

const int64_t* indices(const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); }

// Raises what the definition raises: an IndexError.
void check_indices(const Tensor& x, int64_t size, const char* name) {
  for (int64_t i = 0; i < x.numel(); ++i) {
    if (indices(x)[i] >= 0 && indices(x)[i] < size) continue;
    throw std::out_of_range(std::string(name) + " must lie in [0, " + std::to_string(size) + "), got " +
                            std::to_string(indices(x)[i]));
  }
}

// How the columns of the pooled bias's table are laid out for the kernels. Where the column of a query rises by the same
// step from one query to the next, for every key, the table's columns are sorted by their remainder to that step, which
// makes the step 1. Any other index is expanded: a column for every key and query.
class ColumnLayout {
 public:
  ColumnLayout(const Tensor& columns, int64_t table_width)
      : index_(indices(columns)), queries_(columns.size(0)), keys_(columns.size(1)), table_width_(table_width) {
    step_ = queries_ > 1 ? index_[keys_] - index_[0] : queries_;
    for (int64_t j = 1; j < queries_; ++j)
      for (int64_t b = 0; b < keys_; ++b)
        if (index_[j * keys_ + b] != index_[b] + step_ * j) step_ = 0;
    if (step_ < 0) step_ = 0;
    origins.resize(keys_);
    for (int64_t b = 0; b < keys_; ++b) origins[b] = step_ ? place(index_[b]) : b * queries_;
    width = step_ ? step_ * run() : keys_ * queries_;
  }

  // visit(place in the kernels' row, column of the table) for all that kernels read.
  template <class F>
  void for_columns(const F& visit) const {
    for (int64_t rest = 0; rest < step_; ++rest)
      for (int64_t c = rest, to = rest * run(); c < table_width_; c += step_) visit(to++, c);
    for (int64_t b = 0; !step_ && b < keys_; ++b)
      for (int64_t j = 0; j < queries_; ++j) visit(origins[b] + j, index_[j * keys_ + b]);
  }

  std::vector<int64_t> origins;
  int64_t width;

 private:
  int64_t run() const { return (table_width_ + step_ - 1) / step_; }
  int64_t place(int64_t column) const { return column % step_ * run() + column / step_; }

  const int64_t* index_;
  int64_t queries_, keys_, table_width_, step_;
};

struct Optional {
  std::optional<Tensor> query_embedding, window_bias, pool_bias, pool_rows, pool_columns, positional_tokens,
      positional_bias;
};

// The tensors of a call in the shape that kernels want them, kept alive beside the pointers to them.
template <class A>
class Call {
 public:
  static constexpr ScalarType computed = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
  static constexpr int64_t spare = 64 / sizeof(A);  // the widest vector: a tile may read so far past a table's end

  AttentionProblem<A> problem{};
  std::optional<ColumnLayout> columns;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_pool, const Tensor& v_pool,
       const Tensor& scale, const Optional& optional, int64_t window_size, bool length_scaled, bool normalize) {
    check_attention(q, k, v, k_pool, v_pool, scale, optional.query_embedding, optional.window_bias, optional.pool_bias,
                    optional.pool_rows, optional.pool_columns, optional.positional_tokens, optional.positional_bias,
                    window_size);
    AttentionProblem<A>& p = problem;
    p.batch = q.size(0), p.height = q.size(1), p.width = q.size(2), p.heads = q.size(3), p.d = q.size(4);
    p.pool_height = k_pool.size(1), p.pool_width = k_pool.size(2), p.window_size = window_size;
    p.bfloat16_maps = q.scalar_type() == ScalarType::BFloat16;
    p.length_scaled = length_scaled, p.normalize = normalize;
    p.q = map(q), p.k = map(k), p.v = map(v), p.k_pool = map(k_pool), p.v_pool = map(v_pool);
    p.scale = parameter(scale);
    p.query_embedding = parameter(optional.query_embedding);
    p.window_bias = parameter(optional.window_bias);
    if (optional.positional_tokens) {
      p.positional_tokens = parameter(torch::stable::transpose(*optional.positional_tokens, 1, 2));
    }
    p.positional_bias = parameter(optional.positional_bias);
    p.row_parts = row_parts(p.batch, p.height, p.heads);
    if (optional.pool_bias) add_pool_bias(*optional.pool_bias, *optional.pool_rows, *optional.pool_columns);
  }

  HeadMap map(const Tensor& x) { return head_map(keep(with_dense_rows(x))); }

  Tensor keep(const Tensor& x) {
    kept_.push_back(x);
    return x;
  }

  const A* parameter(const std::optional<Tensor>& x) {
    return x ? static_cast<const A*>(keep(dense(*x, computed)).const_data_ptr()) : nullptr;
  }

 private:
  void add_pool_bias(const Tensor& table, const Tensor& rows, const Tensor& column_index) {
    BiasTable<A>& bias = problem.pool_bias;
    const Tensor row_index = keep(dense(rows, ScalarType::Long));
    check_indices(row_index, table.size(1), "pool_rows");
    const Tensor dense_columns = keep(dense(column_index, ScalarType::Long));
    check_indices(dense_columns, table.size(2), "pool_columns");
    columns.emplace(dense_columns, table.size(2));

    bias.height = table.size(1), bias.width = columns->width;
    bias.rows = indices(row_index), bias.origins = columns->origins.data();
    const A* from = parameter(table);
    const int64_t height = problem.heads * bias.height, width = table.size(2);
    const int64_t size = height * bias.width + spare;
    A* to = static_cast<A*>(keep(torch::stable::new_zeros(table, {&size, 1}, computed)).data_ptr());
    torch::stable::parallel_for(0, height, 64, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        columns->for_columns([&](int64_t place, int64_t column) { to[t * bias.width + place] = from[t * width + column]; });
    });
    bias.data = to;
  }

  std::vector<Tensor> kept_;
};

// The log-sum-exp, like the output's first four dimensions, is for the backward: with an input bias there is none.
std::tuple<Tensor, Tensor> attention_with(
    const std::optional<Tensor>& input_bias, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_pool, const Tensor& v_pool, const Tensor& scale,
    const std::optional<Tensor>& query_embedding, const std::optional<Tensor>& window_bias,
    const std::optional<Tensor>& pool_bias, const std::optional<Tensor>& pool_rows,
    const std::optional<Tensor>& pool_columns, const std::optional<Tensor>& positional_tokens,
    const std::optional<Tensor>& positional_bias, int64_t window_size, bool length_scaled, bool normalize) {
  const Optional optional{query_embedding, window_bias,       pool_bias,      pool_rows,
                          pool_columns,    positional_tokens, positional_bias};
  return with_computed(q, [&](auto type) {
    using A = typename decltype(type)::type;
    Call<A> call(q, k, v, k_pool, v_pool, scale, optional, window_size, length_scaled, normalize);
    AttentionProblem<A>& p = call.problem;
    Tensor out = empty(q, {p.batch, p.height, p.width, p.heads, p.d}, q.scalar_type());
    Tensor lse = input_bias ? no_gradient(q) : empty(q, {p.batch, p.height, p.width, p.heads}, compute_type(q));
    if (input_bias) Door("q", q, 5).parameter("input_bias", input_bias, {3, p.heads, p.d});
    p.out = head_map(out);
    p.lse = input_bias ? nullptr : static_cast<A*>(lse.data_ptr());
    p.input_bias = call.parameter(input_bias);
    if (lse.numel() > 0 || out.numel() > 0) attention_forward(p);
    return std::make_tuple(out, lse);
  });
}

std::tuple<Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_pool, const Tensor& v_pool, const Tensor& scale,
    const std::optional<Tensor>& query_embedding, const std::optional<Tensor>& window_bias,
    const std::optional<Tensor>& pool_bias, const std::optional<Tensor>& pool_rows,
    const std::optional<Tensor>& pool_columns, const std::optional<Tensor>& positional_tokens,
    const std::optional<Tensor>& positional_bias, int64_t window_size, bool length_scaled, bool normalize) {
  return attention_with(std::nullopt, q, k, v, k_pool, v_pool, scale, query_embedding, window_bias, pool_bias, pool_rows,
                        pool_columns, positional_tokens, positional_bias, window_size, length_scaled, normalize);
}

Tensor attention_with_input_bias(
    const Tensor& input_bias, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_pool,
    const Tensor& v_pool, const Tensor& scale, const std::optional<Tensor>& query_embedding,
    const std::optional<Tensor>& window_bias, const std::optional<Tensor>& pool_bias,
    const std::optional<Tensor>& pool_rows, const std::optional<Tensor>& pool_columns,
    const std::optional<Tensor>& positional_tokens, const std::optional<Tensor>& positional_bias, int64_t window_size,
    bool length_scaled, bool normalize) {
  return std::get<0>(attention_with(input_bias, q, k, v, k_pool, v_pool, scale, query_embedding, window_bias, pool_bias,
                                    pool_rows, pool_columns, positional_tokens, positional_bias, window_size,
                                    length_scaled, normalize));
}

// Bytes of the bias table's gradients by part of the rows; huge tables are shared by fewer, larger parts.
constexpr int64_t max_table_parts = 256 << 20;

// The gradient of a call's parameters, added up over the parts of the rows.
template <class A>
class PartSums {
 public:
  PartSums(const A* parts, int64_t heads, int64_t count, int64_t size)
      : parts_(parts), heads_(heads), count_(count), size_(size) {}

  // sum(head, place) of all parts.
  A operator()(int64_t head, int64_t place) const {
    A sum = 0;
    for (int64_t part = 0; part < count_; ++part) sum += parts_[(head * count_ + part) * size_ + place];
    return sum;
  }

  // A tensor like x whose element n of head h is the sum at place(n).
  template <class F>
  Tensor gradient(const Tensor& x, const F& place) const {
    Tensor grad = torch::stable::new_empty(x, x.sizes(), Call<A>::computed);
    A* to = static_cast<A*>(grad.data_ptr());
    const int64_t size = x.numel() / heads_;
    for (int64_t h = 0; h < heads_; ++h)
      for (int64_t n = 0; n < size; ++n) to[h * size + n] = (*this)(h, place(n));
    return dense(grad, x.scalar_type());
  }

  Tensor table_gradient(const Tensor& table, const ColumnLayout& columns) const {
    Tensor grad = torch::stable::new_zeros(table, table.sizes(), Call<A>::computed);
    A* to = static_cast<A*>(grad.data_ptr());
    const int64_t height = table.size(1), width = table.size(2);
    torch::stable::parallel_for(0, heads_ * height, 16, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        columns.for_columns([&](int64_t place, int64_t column) {
          to[t * width + column] += (*this)(t / height, t % height * columns.width + place);
        });
      }
    });
    return dense(grad, table.scalar_type());
  }

 private:
  const A* parts_;
  int64_t heads_, count_, size_;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor>;

Gradients attention_gradients(
    const Tensor& grad, const Tensor& /*out*/, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& k_pool, const Tensor& v_pool, const Tensor& scale, const std::optional<Tensor>& query_embedding,
    const std::optional<Tensor>& window_bias, const std::optional<Tensor>& pool_bias,
    const std::optional<Tensor>& pool_rows, const std::optional<Tensor>& pool_columns,
    const std::optional<Tensor>& positional_tokens, const std::optional<Tensor>& positional_bias, int64_t window_size,
    bool length_scaled, bool normalize, int64_t wanted) {
  const Optional optional{query_embedding, window_bias,       pool_bias,      pool_rows,
                          pool_columns,    positional_tokens, positional_bias};
  return with_computed(q, [&](auto type) -> Gradients {
    using A = typename decltype(type)::type;
    Call<A> call(q, k, v, k_pool, v_pool, scale, optional, window_size, length_scaled, normalize);
    check_attention_gradient(grad, lse, q);
    if (!pool_bias) wanted &= ~want_pool_bias;
    if (grad.numel() == 0) {  // without a query every gradient is zero
      const auto zero = [&](const std::optional<Tensor>& x, int64_t want) {
        return x && wanted & want ? torch::stable::new_zeros(*x, x->sizes()) : no_gradient(grad);
      };
      return {zero(q, want_q),
              zero(k, want_k),
              zero(v, want_v),
              zero(k_pool, want_k_pool),
              zero(v_pool, want_v_pool),
              zero(scale, want_scale),
              zero(query_embedding, want_query_embedding),
              zero(window_bias, want_window_bias),
              zero(pool_bias, want_pool_bias),
              no_gradient(grad),
              no_gradient(grad),
              zero(positional_tokens, want_positional_tokens),
              zero(positional_bias, want_positional_bias)};
    }
    AttentionBackward<A> args{};
    AttentionProblem<A>& p = args.problem;
    p = call.problem;
    const int64_t table = pool_bias ? p.pool_bias.height * p.pool_bias.width + call.spare : 0;
    if (wanted & want_pool_bias) {
      const int64_t affordable = max_table_parts / (p.heads * table * int64_t(sizeof(A)));
      p.row_parts.parts = std::clamp<int64_t>(affordable, 1, p.parts());
    }
    args.wanted = wanted;
    args.grad = call.map(grad);
    p.lse = static_cast<A*>(call.keep(torch::stable::contiguous(lse)).data_ptr());

    const auto like = [&](const Tensor& x, int64_t want, HeadMap& map) {
      if (!(wanted & want)) return no_gradient(grad);
      Tensor result = torch::stable::new_empty(x, x.sizes());
      map = head_map(result);
      return result;
    };
    Tensor grad_q = like(q, want_q, args.q), grad_k = like(k, want_k, args.k), grad_v = like(v, want_v, args.v);
    Tensor grad_k_pool = like(k_pool, want_k_pool, args.k_pool), grad_v_pool = like(v_pool, want_v_pool, args.v_pool);

    const auto memory = [&](bool is_wanted, int64_t size) -> A* {
      if (!is_wanted) return nullptr;
      return static_cast<A*>(call.keep(empty(q, {p.heads * size}, compute_type(q))).data_ptr());
    };
    const int64_t parameters = ParameterGradients(p.d, p.cells()).count;
    const int64_t pooled = (p.batch + p.parts() - 1) * p.keys() * p.d;
    args.parameter_parts = memory(true, p.parts() * parameters);
    args.pool_bias_parts = memory(wanted & want_pool_bias, p.parts() * table);
    args.k_pool_parts = memory(wanted & want_k_pool, pooled);
    args.v_pool_parts = memory(wanted & want_v_pool, pooled);
    attention_backward(args);

    const ParameterGradients places(p.d, p.cells());
    const PartSums<A> sums(args.parameter_parts, p.heads, p.parts(), parameters);
    const auto parameter = [&](const std::optional<Tensor>& x, int64_t want, int64_t first) {
      if (!x || !(wanted & want)) return no_gradient(grad);
      return sums.gradient(*x, [&](int64_t n) { return first + n; });
    };
    Tensor grad_tokens = no_gradient(grad), grad_table = no_gradient(grad);
    if (positional_tokens && wanted & want_positional_tokens) {  // (d, k * k), and (k * k, d) in the kernels
      grad_tokens = sums.gradient(*positional_tokens, [&](int64_t n) {
        return places.positional_tokens + n % p.cells() * p.d + n / p.cells();
      });
    }
    if (pool_bias && wanted & want_pool_bias) {
      grad_table = PartSums<A>(args.pool_bias_parts, p.heads, p.parts(), table).table_gradient(*pool_bias, *call.columns);
    }
    return {grad_q,
            grad_k,
            grad_v,
            grad_k_pool,
            grad_v_pool,
            parameter(scale, want_scale, places.scale),
            parameter(query_embedding, want_query_embedding, places.query_embedding),
            parameter(window_bias, want_window_bias, places.window_bias),
            grad_table,
            no_gradient(grad),
            no_gradient(grad),
            grad_tokens,
            parameter(positional_bias, want_positional_bias, places.positional_bias)};
  });
}

}  // namespace
}  // namespace foveal

STABLE_TORCH_LIBRARY_IMPL(foveal, CPU, m) {
  m.impl("aggregated_attention", TORCH_BOX(&foveal::attention));
  m.impl("aggregated_attention_with_input_bias", TORCH_BOX(&foveal::attention_with_input_bias));
  m.impl("aggregated_attention_backward", TORCH_BOX(&foveal::attention_gradients));
}
