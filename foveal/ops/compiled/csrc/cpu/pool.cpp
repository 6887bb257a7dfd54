// activate_and_pool and its gradient on tensors of the CPU.
#include "pool.h"

#include "doors.h"

namespace foveal {
namespace {

Tensor pool(const Tensor& x, const std::optional<Tensor>& input_bias, const std::vector<int64_t>& grid,
            const std::string& act) {
  check_pool(x, input_bias, grid);
  const Tensor map = with_dense_rows(x);
  const auto added = dense(input_bias, x.scalar_type());
  const PoolShape shape{x.size(0), x.size(1), x.size(2), x.size(3), grid[0], grid[1]};
  Tensor out = empty(x, {shape.batch, grid[0], grid[1], shape.channels}, x.scalar_type());
  activate_and_pool_forward({shape, dtype_of(x), act_named(act), map.const_data_ptr(), pointer(added),
                             map_strides(map), out.mutable_data_ptr()});
  return out;
}

Tensor forward(const Tensor& x, const std::vector<int64_t>& grid, const std::string& act) {
  return pool(x, std::nullopt, grid, act);
}

Tensor forward_with_input_bias(const Tensor& x, const Tensor& input_bias, const std::vector<int64_t>& grid,
                               const std::string& act) {
  return pool(x, input_bias, grid, act);
}

Tensor backward(const Tensor& grad, const Tensor& x, const std::string& act) {
  check_pool_gradient(grad, x);
  const Tensor upstream = with_dense_rows(grad), map = with_dense_rows(x);
  const PoolShape shape{x.size(0), x.size(1), x.size(2), x.size(3), grad.size(1), grad.size(2)};
  Tensor grad_x = empty(x, {shape.batch, shape.height, shape.width, shape.channels}, x.scalar_type());
  activate_and_pool_backward({shape, dtype_of(x), act_named(act), upstream.const_data_ptr(), map.const_data_ptr(),
                              map_strides(upstream), map_strides(map), grad_x.mutable_data_ptr()});
  return grad_x;
}

}  // namespace
}  // namespace foveal

STABLE_TORCH_LIBRARY_IMPL(foveal, CPU, m) {
  m.impl("activate_and_pool", TORCH_BOX(&foveal::forward));
  m.impl("activate_and_pool_with_input_bias", TORCH_BOX(&foveal::forward_with_input_bias));
  m.impl("activate_and_pool_backward", TORCH_BOX(&foveal::backward));
}
