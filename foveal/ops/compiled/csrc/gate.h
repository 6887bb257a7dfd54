// depthwise_gate: act(dwconv(gate) + bias) * value over (B, H, W, 2C), the gate's channels first.
#pragma once

#include "activation.h"
#include "map.h"

namespace foveal {

struct GateShape {
  int64_t batch, height, width, channels, size;  // size: side of the kernel, odd
};

// Weights are (C, size * size) and, like the bias (C,) or null, of the compute type of x. What is to be added to x first,
// (2C,) or null, is of the type of x.
struct GateForward {
  GateShape shape;
  Dtype dtype;
  Act act;
  const void *x, *input_bias, *weight, *bias;
  MapStrides x_strides;
  void* out;  // (B, H, W, C), dense
};

// Null outputs are not computed; parameter gradients are of the compute type.
struct GateBackward {
  GateShape shape;
  Dtype dtype;
  Act act;
  const void *grad, *x, *weight, *bias;
  MapStrides grad_strides, x_strides;
  void *grad_x, *grad_weight, *grad_bias;  // dense, shaped like their inputs
};

namespace FOVEAL_ISA {

template <Act act, class S, class V>
FOVEAL_HOST_DEVICE V gate_pixel(V convolved, V value) {
  return activate<act, S>(convolved) * value;
}

template <class V>
struct GatePixelGradient {
  V convolved, value;
};

template <Act act, class S, class V>
FOVEAL_HOST_DEVICE GatePixelGradient<V> gate_pixel_gradient(V grad, V convolved, V value) {
  const Activated<V> gate = activate_with_slope<act, S>(convolved);
  return {through_activation<act, S>(grad * value, gate.slope), grad * gate.value};
}

}  // namespace FOVEAL_ISA
}  // namespace foveal

FOVEAL_KERNEL(depthwise_gate_forward, GateForward)
FOVEAL_KERNEL(depthwise_gate_backward, GateBackward)
