// window_scores, window_sum and their gradients on tensors of the CPU.
#include "window.h"

#include "doors.h"
#include "window_tensors.h"

namespace foveal {
namespace {

enum class Product { dot, weigh, collect };

// The product of two maps, into a new one with this many channels. `d` is that of keys or values.
Tensor product(Product kind, const Tensor& left, const Tensor& right, int64_t window_size, int64_t channels,
               double outside = 0) {
  const Tensor dense_left = with_dense_rows(left), dense_right = with_dense_rows(right);
  const int64_t batch = right.size(0), height = right.size(1), width = right.size(2), heads = right.size(3);
  Tensor out = empty(right, {batch, height, width, heads, channels}, right.scalar_type());
  if (out.numel() == 0) return out;
  with_computed(right, [&](auto type) {
    using A = typename decltype(type)::type;
    const WindowProblem<A> problem{width,
                                   right.size(4),
                                   window_size,
                                   right.scalar_type() == ScalarType::BFloat16,
                                   row_parts(batch, height, heads),
                                   head_map(dense_left),
                                   head_map(dense_right),
                                   head_map(out),
                                   A(outside)};
    if (kind == Product::dot) window_dot(problem);
    if (kind == Product::weigh) window_weigh(problem);
    if (kind == Product::collect) window_collect(problem);
  });
  return out;
}

Tensor scores(const Tensor& q, const Tensor& k, int64_t window_size) {
  check_window("q", q, "k", k, window_size);
  return product(Product::dot, q, k, window_size, window_size * window_size, -__builtin_inf());
}

std::tuple<Tensor, Tensor> scores_gradients(const Tensor& grad, const Tensor& q, const Tensor& k, int64_t window_size,
                                            int64_t wanted) {
  check_window("q", q, "k", k, window_size);
  check_window("q", q, "grad", grad, window_size, true);
  const int64_t d = q.size(4);
  return {wanted & 1 ? product(Product::weigh, grad, k, window_size, d) : no_gradient(grad),
          wanted & 2 ? product(Product::collect, grad, q, window_size, d) : no_gradient(grad)};
}

Tensor sum(const Tensor& weights, const Tensor& v, int64_t window_size) {
  check_window("v", v, "weights", weights, window_size, true);
  return product(Product::weigh, weights, v, window_size, v.size(4));
}

std::tuple<Tensor, Tensor> sum_gradients(const Tensor& grad, const Tensor& weights, const Tensor& v,
                                         int64_t window_size, int64_t wanted) {
  check_window("v", v, "weights", weights, window_size, true);
  check_window("v", v, "grad", grad, window_size);
  return {wanted & 1 ? product(Product::dot, grad, v, window_size, window_size * window_size) : no_gradient(grad),
          wanted & 2 ? product(Product::collect, weights, grad, window_size, v.size(4)) : no_gradient(grad)};
}

}  // namespace
}  // namespace foveal

STABLE_TORCH_LIBRARY_IMPL(foveal, CPU, m) {
  m.impl("window_scores", TORCH_BOX(&foveal::scores));
  m.impl("window_scores_backward", TORCH_BOX(&foveal::scores_gradients));
  m.impl("window_sum", TORCH_BOX(&foveal::sum));
  m.impl("window_sum_backward", TORCH_BOX(&foveal::sum_gradients));
}
