// activate_and_pool: activation, then adaptive average pooling, (B, H, W, C) to (B, Hp, Wp, C).
#pragma once

#include "activation.h"
#include "map.h"

namespace foveal {

struct PoolShape {
  int64_t batch, height, width, channels, pooled_height, pooled_width;
};

struct PoolForward {
  PoolShape shape;
  Dtype dtype;
  Act act;
  const void *x, *input_bias;  // the bias (C,), added to x first, is of its dtype; null where absent
  MapStrides x_strides;
  void* out;  // (B, Hp, Wp, C), dense
};

struct PoolBackward {
  PoolShape shape;
  Dtype dtype;
  Act act;
  const void *grad, *x;
  MapStrides grad_strides, x_strides;
  void* grad_x;  // (B, H, W, C), dense
};

namespace FOVEAL_ISA {

// I: int64_t or, for sides of up to 65535, uint32_t, which GPUs divide faster.
template <class I>
struct Bin {
  I first, end;
};

// The cells that bin a of `bins` averages on a side of `cells`. The rule is its own inverse: `bin_of(cell, cells, bins)`
// are the bins that hold a cell.
template <class I>
FOVEAL_HOST_DEVICE Bin<I> bin_of(I a, I bins, I cells) {
  return {a * cells / bins, ((a + 1) * cells + bins - 1) / bins};
}

}  // namespace FOVEAL_ISA
}  // namespace foveal

FOVEAL_KERNEL(activate_and_pool_forward, PoolForward)
FOVEAL_KERNEL(activate_and_pool_backward, PoolBackward)
