// What the kernels of an op, of CPU and GPU, accept: whatever they would otherwise read outside of, or never end.
// Every dimension may be zero unless a check says more.
#pragma once

#include <algorithm>
#include <sstream>

#include "tensor.h"

namespace foveal {

using Shape = std::vector<int64_t>;

template <class Sizes>
std::string as_text(const Sizes& sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ')';
  return text.str();
}

inline void check_floating(const char* name, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  const auto accepted = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half};
  STD_TORCH_CHECK(std::find(accepted.begin(), accepted.end(), type) != accepted.end(), name,
                  " must be floating point, got ", type);
}

inline void check_dim(const char* name, const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(x.dim() == dim, name, " must have ", dim, " dimensions, got ", as_text(x.sizes()));
}

inline void check_shape(const char* name, const Tensor& x, const Shape& shape) {
  const bool same = x.dim() == int64_t(shape.size()) && std::equal(shape.begin(), shape.end(), x.sizes().begin());
  STD_TORCH_CHECK(same, name, " must have shape ", as_text(shape), ", got ", as_text(x.sizes()));
}

// The arguments of a call beside its main one, whose device they share.
class Door {
 public:
  Door(const char* name, const Tensor& x, int64_t dim) : name_(name), x_(x) {
    check_dim(name, x, dim);
    check_floating(name, x);
  }

  // What the kernels read as it is: of the main argument's dtype.
  void map(const char* name, const Tensor& x, const Shape& shape) const { map(name, x, shape, x_.scalar_type()); }

  void map(const char* name, const Tensor& x, const Shape& shape, ScalarType dtype) const {
    check(name, x, shape);
    STD_TORCH_CHECK(x.scalar_type() == dtype, name, " must have dtype ", dtype, " for this ", name_, ", got ",
                    x.scalar_type());
  }

  // What is converted to the type computed in; it may be absent.
  void parameter(const char* name, const std::optional<Tensor>& x, const Shape& shape) const {
    if (!x) return;
    check(name, *x, shape);
    check_floating(name, *x);
  }

  void index(const char* name, const Tensor& x, const Shape& shape) const {
    check(name, x, shape);
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Long || type == ScalarType::Int, name, " must be int64 or int32, got ", type);
  }

 private:
  void check(const char* name, const Tensor& x, const Shape& shape) const {
    check_shape(name, x, shape);
    STD_TORCH_CHECK(x.is_cuda() == x_.is_cuda() && x.get_device_index() == x_.get_device_index(), name,
                    " must be on the device of ", name_);
  }

  const char* name_;
  const Tensor& x_;
};

// Its square counts the cells, in 32 bits.
inline void check_window_size(int64_t size) {
  STD_TORCH_CHECK(size > 0 && size % 2 == 1 && size < 1 << 15, "window_size must be odd and in [1, 32767], got ", size);
}

// grad is null in the forward.
inline void check_gate(const Tensor* grad, const Tensor& x, const std::optional<Tensor>& input_bias,
                       const Tensor& weight, const std::optional<Tensor>& bias) {
  const Door door("x", x, 4);
  check_dim("weight", weight, 4);
  const int64_t channels = weight.size(0), size = weight.size(3);
  STD_TORCH_CHECK(size % 2 == 1, "weight must have an odd kernel size, got ", size);
  STD_TORCH_CHECK(x.size(3) % 2 == 0 && x.size(3) / 2 == channels, "x must have 2C channels for a weight of C = ",
                  channels, ", got ", x.size(3));
  door.parameter("weight", weight, {channels, 1, size, size});
  door.parameter("input_bias", input_bias, {x.size(3)});
  door.parameter("bias", bias, {channels});
  if (grad) door.map("grad", *grad, {x.size(0), x.size(1), x.size(2), channels});
}

// The pooled map has shape (B, *grid, C).
inline void check_pool(const Tensor& x, const std::optional<Tensor>& input_bias, const std::vector<int64_t>& grid) {
  const Door door("x", x, 4);
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0, "x must have a cell to average, got ", as_text(x.sizes()));
  STD_TORCH_CHECK(grid.size() == 2 && grid[0] > 0 && grid[1] > 0, "grid must be two positive integers, got ",
                  as_text(grid));
  door.parameter("input_bias", input_bias, {x.size(3)});
}

inline void check_pool_gradient(const Tensor& grad, const Tensor& x) {
  check_dim("grad", grad, 4);
  check_pool(x, std::nullopt, {grad.size(1), grad.size(2)});
  Door("x", x, 4).map("grad", grad, {x.size(0), grad.size(1), grad.size(2), x.size(3)});
}

// A map (B, H, W, heads, d), and another tensor of its size with d or, of weights, k * k channels.
inline void check_window(const char* name, const Tensor& x, const char* other, const Tensor& y, int64_t window_size,
                         bool weights = false) {
  check_window_size(window_size);
  const Door door(name, x, 5);
  door.map(other, y, {x.size(0), x.size(1), x.size(2), x.size(3), weights ? window_size * window_size : x.size(4)});
}

// The values of the indices are left to the caller: looking at them would make a GPU wait.
inline void check_pool_bias(const Door& door, const std::optional<Tensor>& table, const std::optional<Tensor>& rows,
                            const std::optional<Tensor>& columns, const Tensor& q, const Tensor& k_pool) {
  STD_TORCH_CHECK(bool(table) == bool(rows) && bool(rows) == bool(columns),
                  "pool_bias, pool_rows and pool_columns must come together");
  if (!table) return;
  check_dim("pool_bias", *table, 3);
  door.parameter("pool_bias", table, {q.size(3), table->size(1), table->size(2)});
  door.index("pool_rows", *rows, {q.size(1), k_pool.size(1)});
  door.index("pool_columns", *columns, {q.size(2), k_pool.size(2)});
}

inline void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_pool,
                            const Tensor& v_pool, const Tensor& scale, const std::optional<Tensor>& query_embedding,
                            const std::optional<Tensor>& window_bias, const std::optional<Tensor>& pool_bias,
                            const std::optional<Tensor>& pool_rows, const std::optional<Tensor>& pool_columns,
                            const std::optional<Tensor>& positional_tokens,
                            const std::optional<Tensor>& positional_bias, int64_t window_size) {
  check_window_size(window_size);
  const Door door("q", q, 5);
  check_dim("k_pool", k_pool, 5);
  const int64_t heads = q.size(3), d = q.size(4), cells = window_size * window_size;
  STD_TORCH_CHECK(d <= 128, "a head dimension of ", d, " is not served (at most 128)");
  STD_TORCH_CHECK(k_pool.size(1) > 0 && k_pool.size(2) > 0, "a pooled map without cells is not served, got ",
                  as_text(k_pool.sizes()));
  const Shape map{q.size(0), q.size(1), q.size(2), heads, d}, pool{q.size(0), k_pool.size(1), k_pool.size(2), heads, d};
  door.map("k", k, map);
  door.map("v", v, map);
  door.map("k_pool", k_pool, pool);
  door.map("v_pool", v_pool, pool);
  door.parameter("scale", scale, {heads});
  door.parameter("query_embedding", query_embedding, {heads, d});
  door.parameter("window_bias", window_bias, {heads, cells});
  door.parameter("positional_tokens", positional_tokens, {heads, d, cells});
  door.parameter("positional_bias", positional_bias, {heads, cells});
  check_pool_bias(door, pool_bias, pool_rows, pool_columns, q, k_pool);
}

// What the backward takes besides.
inline void check_attention_gradient(const Tensor& grad, const Tensor& lse, const Tensor& q) {
  const Door door("q", q, 5);
  door.map("grad", grad, {q.size(0), q.size(1), q.size(2), q.size(3), q.size(4)});
  door.map("lse", lse, {q.size(0), q.size(1), q.size(2), q.size(3)}, compute_type(q));
}

}  // namespace foveal
