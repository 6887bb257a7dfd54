// add_layer_norm on tensors of the CPU.
#include "cpu/norm.h"
#include "doors.h"

namespace foveal {
namespace {

using Parameter = std::optional<Tensor>;

// x, added and parameters of one dtype; sum, dense, may be x.
Tensor normalize(const Tensor& x, const std::optional<Tensor>& added, const Parameter& added_bias,
                 const Parameter& weight, const Parameter& bias, double eps, Tensor* sum) {
  STD_TORCH_CHECK(x.dim() > 0, "x must have channels, got a scalar");
  const Door door("x", x, x.dim());
  const int64_t channels = x.size(x.dim() - 1);
  const auto check = [&](const char* name, const Parameter& y, const Shape& shape) {
    if (y) door.map(name, *y, shape);
  };
  check("y", added, Shape(x.sizes().begin(), x.sizes().end()));
  check("y_bias", added_bias, {channels});
  check("weight", weight, {channels});
  check("bias", bias, {channels});
  const ScalarType dtype = x.scalar_type();
  const Tensor rows = torch::stable::contiguous(x);
  const auto others = dense(added, dtype), shift = dense(added_bias, dtype), w = dense(weight, dtype), b = dense(bias, dtype);
  Tensor norm = empty(x, x.sizes(), dtype);
  if (x.numel() > 0) {
    add_layer_norm_forward({x.numel() / channels, channels, eps, dtype_of(x), rows.const_data_ptr(), pointer(others),
                            pointer(shift), pointer(w), pointer(b), sum ? sum->mutable_data_ptr() : nullptr,
                            norm.mutable_data_ptr()});
  }
  return norm;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& added, const Parameter& added_bias,
                                   const Parameter& weight, const Parameter& bias, double eps) {
  if (!added) return {empty(x, {0}, x.scalar_type()), normalize(x, added, added_bias, weight, bias, eps, nullptr)};
  Tensor sum = empty(x, x.sizes(), x.scalar_type());
  Tensor norm = normalize(x, added, added_bias, weight, bias, eps, &sum);
  return {sum, norm};
}

Tensor in_place(Tensor x, const Tensor& added, const Parameter& added_bias, const Parameter& weight,
                const Parameter& bias, double eps) {
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous to be overwritten");
  return normalize(x, added, added_bias, weight, bias, eps, &x);
}

}  // namespace
}  // namespace foveal

STABLE_TORCH_LIBRARY_IMPL(foveal, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&foveal::forward));
  m.impl("add_layer_norm_", TORCH_BOX(&foveal::in_place));
}
