// depthwise_gate and its gradient on tensors of the CPU.
#include "gate.h"

#include "doors.h"

namespace foveal {
namespace {

GateShape gate_shape(const Tensor& x, const Tensor& weight) {
  return {x.size(0), x.size(1), x.size(2), weight.size(0), weight.size(3)};
}

Tensor gate(const Tensor& x, const std::optional<Tensor>& input_bias, const Tensor& weight,
            const std::optional<Tensor>& bias, const std::string& act) {
  check_gate(nullptr, x, input_bias, weight, bias);
  const Tensor map = with_dense_rows(x), w = dense(weight, compute_type(x));
  const auto added = dense(input_bias, x.scalar_type()), b = dense(bias, compute_type(x));
  const GateShape shape = gate_shape(x, weight);
  Tensor out = empty(x, {shape.batch, shape.height, shape.width, shape.channels}, x.scalar_type());
  const GateForward args{shape, dtype_of(x), act_named(act), map.const_data_ptr(), pointer(added), w.const_data_ptr(),
                         pointer(b), map_strides(map), out.mutable_data_ptr()};
  if (out.numel() > 0) depthwise_gate_forward(args);
  return out;
}

Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::string& act) {
  return gate(x, std::nullopt, weight, bias, act);
}

Tensor forward_with_input_bias(const Tensor& x, const Tensor& input_bias, const Tensor& weight,
                               const std::optional<Tensor>& bias, const std::string& act) {
  return gate(x, input_bias, weight, bias, act);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                            const std::optional<Tensor>& bias, const std::string& act, int64_t wanted) {
  check_gate(&grad, x, std::nullopt, weight, bias);
  const Tensor upstream = with_dense_rows(grad), map = with_dense_rows(x), w = dense(weight, compute_type(x));
  const auto b = dense(bias, compute_type(x));
  const GateShape shape = gate_shape(x, weight);
  GateBackward args{shape, dtype_of(x), act_named(act), upstream.const_data_ptr(), map.const_data_ptr(),
                    w.const_data_ptr(), pointer(b), map_strides(upstream), map_strides(map), nullptr, nullptr, nullptr};
  Tensor grad_x = no_gradient(grad), grad_weight = no_gradient(grad), grad_bias = no_gradient(grad);
  if (wanted & 1) {
    grad_x = empty(x, {shape.batch, shape.height, shape.width, 2 * shape.channels}, x.scalar_type());
    args.grad_x = grad_x.mutable_data_ptr();
  }
  if (wanted & 2) {
    grad_weight = zeros(x, {shape.channels, 1, shape.size, shape.size}, compute_type(x));
    args.grad_weight = grad_weight.mutable_data_ptr();
  }
  if (wanted & 4 && bias) {
    grad_bias = zeros(x, {shape.channels}, compute_type(x));
    args.grad_bias = grad_bias.mutable_data_ptr();
  }
  if (wanted && grad.numel() > 0) depthwise_gate_backward(args);
  if (args.grad_weight) grad_weight = dense(grad_weight, weight.scalar_type());
  if (args.grad_bias) grad_bias = dense(grad_bias, bias->scalar_type());
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace foveal

STABLE_TORCH_LIBRARY_IMPL(foveal, CPU, m) {
  m.impl("depthwise_gate", TORCH_BOX(&foveal::forward));
  m.impl("depthwise_gate_with_input_bias", TORCH_BOX(&foveal::forward_with_input_bias));
  m.impl("depthwise_gate_backward", TORCH_BOX(&foveal::backward));
}
