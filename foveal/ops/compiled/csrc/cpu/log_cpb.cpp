// log_cpb_table and its gradient on tensors of the CPU.
#include "cpu/log_cpb.h"
#include "doors.h"

namespace foveal {
namespace {

// The first layer's weight, (hidden, 2), with its columns laid apart: (2, hidden).
Tensor laid_apart(const Tensor& weight1, ScalarType dtype) { return dense(torch::stable::transpose(weight1, 0, 1), dtype); }

const void* second_half(const Tensor& x) {
  return static_cast<const char*>(x.const_data_ptr()) + x.numel() / 2 * x.element_size();
}

void check(const Tensor& rows, const Tensor& columns, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2) {
  const Door door("weight2", weight2, 2);
  check_dim("rows", rows, 1);
  check_dim("columns", columns, 1);
  door.parameter("rows", rows, {rows.size(0)});
  door.parameter("columns", columns, {columns.size(0)});
  door.parameter("weight1", weight1, {weight2.size(1), 2});
  door.parameter("bias1", bias1, {weight2.size(1)});
}

Tensor forward(const Tensor& rows, const Tensor& columns, const Tensor& weight1, const Tensor& bias1,
               const Tensor& weight2, const Tensor& bias2) {
  check(rows, columns, weight1, bias1, weight2);
  Door("weight2", weight2, 2).parameter("bias2", bias2, {weight2.size(0)});
  const ScalarType type = compute_type(weight2);
  const Tensor r = dense(rows, type), c = dense(columns, type), w1 = laid_apart(weight1, type), b1 = dense(bias1, type);
  const Tensor w2 = dense(weight2, type), b2 = dense(bias2, type);
  Tensor table = empty(w2, {w2.size(0), r.size(0), c.size(0)}, type);
  log_cpb_forward({r.size(0), c.size(0), w2.size(1), w2.size(0), dtype_of(w2), r.const_data_ptr(), c.const_data_ptr(),
                   w1.const_data_ptr(), second_half(w1), b1.const_data_ptr(), w2.const_data_ptr(),
                   b2.const_data_ptr(), table.mutable_data_ptr()});
  return table;
}

// All four gradients come out of one pass; `wanted` decides which are returned.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& rows, const Tensor& columns,
                                                    const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                                                    const Tensor& bias2, int64_t wanted) {
  check(rows, columns, weight1, bias1, weight2);
  Door("weight2", weight2, 2).parameter("grad", grad, {weight2.size(0), rows.size(0), columns.size(0)});
  const ScalarType type = compute_type(weight2);
  const Tensor r = dense(rows, type), c = dense(columns, type), w1 = laid_apart(weight1, type), b1 = dense(bias1, type);
  const Tensor w2 = dense(weight2, type), g = dense(grad, type);
  Tensor grad_w1 = empty(w1, {2, w1.size(1)}, type), grad_b1 = empty(b1, {b1.size(0)}, type);
  Tensor grad_w2 = empty(w2, {w2.size(0), w2.size(1)}, type);
  if (wanted & 0b111) {
    log_cpb_backward({r.size(0), c.size(0), w2.size(1), w2.size(0), dtype_of(w2), r.const_data_ptr(),
                      c.const_data_ptr(), w1.const_data_ptr(), second_half(w1), b1.const_data_ptr(),
                      w2.const_data_ptr(), g.const_data_ptr(), grad_w1.mutable_data_ptr(),
                      const_cast<void*>(second_half(grad_w1)), grad_b1.mutable_data_ptr(), grad_w2.mutable_data_ptr()});
  }
  const auto unless = [&](int bit, auto&& result) { return wanted >> bit & 1 ? result() : no_gradient(grad); };
  return {unless(0, [&] { return dense(torch::stable::transpose(grad_w1, 0, 1), weight1.scalar_type()); }),
          unless(1, [&] { return dense(grad_b1, bias1.scalar_type()); }),
          unless(2, [&] { return dense(grad_w2, weight2.scalar_type()); }),
          unless(3, [&] { return dense(torch::stable::sum(torch::stable::flatten(g, 1, 2), {{1}}), bias2.scalar_type()); })};
}

}  // namespace
}  // namespace foveal

STABLE_TORCH_LIBRARY_IMPL(foveal, CPU, m) {
  m.impl("log_cpb_table", TORCH_BOX(&foveal::forward));
  m.impl("log_cpb_table_backward", TORCH_BOX(&foveal::backward));
}
