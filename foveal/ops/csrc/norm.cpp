// add_layer_norm on tensors of the CPU.
#include "norm.h"
#include "tensor.h"

namespace foveal {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& added,
                                   const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
  const Tensor rows = torch::stable::contiguous(x);
  const auto others = dense(added, x.scalar_type()), w = dense(weight, compute_type(x)), b = dense(bias, compute_type(x));
  const int64_t channels = x.size(x.dim() - 1);
  Tensor norm = empty(x, x.sizes(), x.scalar_type());
  Tensor sum = added ? empty(x, x.sizes(), x.scalar_type()) : empty(x, {0}, x.scalar_type());
  if (x.numel() > 0) {
    add_layer_norm_forward({x.numel() / channels, channels, eps, dtype_of(x), rows.const_data_ptr(), pointer(others),
                            pointer(w), pointer(b), sum.mutable_data_ptr(), norm.mutable_data_ptr()});
  }
  return {sum, norm};
}

}  // namespace
}  // namespace foveal

STABLE_TORCH_LIBRARY_IMPL(foveal, CPU, m) { m.impl("add_layer_norm", TORCH_BOX(&foveal::forward)); }
